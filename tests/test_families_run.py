"""The whole line on other model families and other layouts on disk, each reloaded and verified."""

import json
from pathlib import Path

import pytest
import tiny_chat
import tiny_families
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from masquant_cli import load_quantized, pipeline
from masquant_cli.errors import RecipeError
from masquant_cli.models import loading
from masquant_cli.recipe import Recipe

QUESTION = {"role": "user", "content": [{"text": "{question}"}]}
ANSWER = {"role": "assistant", "content": [{"text": "{answer}"}]}
TEXT = {"dataset": "builtin:tiny-omni/calibration-text", "messages": [QUESTION, ANSWER], "limit": 6}


def with_media(kind: str, name: str) -> dict:
    first = {"role": "user", "content": [{kind: kind}, {"text": "{question}"}]}
    return {
        "dataset": f"builtin:tiny-omni/calibration-{name}",
        "messages": [first, ANSWER],
        "limit": 6,
    }


def recipe(folder: Path, modalities: list[str], sources: list[dict], **more) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "family",
            "model": {"path": str(folder)},
            "modalities": modalities,
            "calibration": {"sources": sources, "rows": 32, "min_tokens": 1},
            "smoothing": {"epochs": 1},
            **more,
        }
    )


def shard(folder: Path, parts: int, prefix: str = "", extra: dict | None = None) -> None:
    """Split model.safetensors into shards with an index, as large checkpoints are."""
    whole = {prefix + k: t for k, t in load_file(folder / "model.safetensors").items()}
    whole |= extra or {}
    (folder / "model.safetensors").unlink()
    index = {}
    for i in range(parts):
        name = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        part = {k: t for j, (k, t) in enumerate(sorted(whole.items())) if j % parts == i}
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.fixture
def full_omni(tmp_path) -> Path:
    """A full Omni checkpoint as on the hub: thinker tensors prefixed, a talker beside them."""
    folder = tmp_path / "omni"
    thinker = tiny_chat.omni()
    thinker.save_pretrained(folder)
    tiny_chat.processor().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    outer = {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "thinker_config": config,
    }
    (folder / "config.json").write_text(json.dumps(outer))
    shard(folder, 3, prefix="thinker.", extra={"talker.model.norm.weight": torch.ones(4)})
    return folder


def test_a_full_omni_checkpoint_in_shards_becomes_a_thinker_folder(full_omni, tmp_path):
    sources = [with_media("image", "vision"), with_media("audio", "audio"), TEXT]
    job = recipe(full_omni, ["text", "vision", "audio"], sources)
    done = pipeline.run(job, tmp_path / "run")
    verified = done["stages"]["export"]["verified"]
    assert set(verified) == {"text", "vision", "audio"} and max(verified.values()) < 1e-5
    folder = Path(done["export_dir"])
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    on_disk = {k for f in folder.glob("*.safetensors") for k in load_file(f)}
    assert on_disk == set(index) and len(set(index.values())) == 3
    assert not [k for k in on_disk if k.startswith(("thinker.", "talker."))]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2_5_omni_thinker"


def test_a_shard_that_is_missing(full_omni, tmp_path):
    (full_omni / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(RecipeError) as caught:
        pipeline.run(recipe(full_omni, ["text"], [TEXT]), tmp_path / "run")
    assert caught.value.hint


def test_a_vision_language_model(tmp_path, monkeypatch):
    processor = tiny_chat.processor()
    token = processor.tokenizer.convert_tokens_to_ids
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(processor.tokenizer),
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [2, 3, 3],
                    "rope_theta": 1e4,
                },
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 14,
                "out_hidden_size": 64,
                "fullatt_block_indexes": [0],
                "window_size": 56,
            },
            image_token_id=token("<|IMAGE|>"),
            video_token_id=token("<|VIDEO|>"),
            vision_start_token_id=token("<|vision_bos|>"),
            vision_end_token_id=token("<|vision_eos|>"),
        )
    )
    folder = tmp_path / "vl"
    model.save_pretrained(folder)
    # Qwen2.5-VL's own processor needs torchvision; this one makes the same inputs.
    monkeypatch.setattr(loading, "load_processor", lambda _: processor)
    job = recipe(folder, ["text", "vision"], [with_media("image", "vision"), TEXT])
    done = pipeline.run(job, tmp_path / "run")
    verified = done["stages"]["export"]["verified"]
    assert set(verified) == {"text", "vision"} and max(verified.values()) < 1e-5
    with pytest.raises(RecipeError, match="has no audio tokens"):
        audio = recipe(folder, ["text", "audio"], [TEXT])
        pipeline.run(audio, tmp_path / "other")


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
GEMMA = {  # one layer looks back eight tokens, the other at all of them
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
TEXT_MODELS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM, GEMMA),
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
}


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_text_only_model_degenerates_to_learned_smoothing(name, tmp_path):
    tokenizer = tiny_chat.tokenizer()
    config, model_class, more = TEXT_MODELS[name]
    torch.manual_seed(0)
    model = model_class(config(vocab_size=len(tokenizer), **SMALL, **more))
    folder = tmp_path / "text"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    verify = name != "phi3"  # a process of its own, which takes longer than all the rest
    job = recipe(folder, ["text"], [TEXT], export={"verify": verify})
    done = pipeline.run(job, tmp_path / "run")
    assert not verify or done["stages"]["export"]["verified"]["text"] < 1e-5
    reloaded = load_quantized(done["export_dir"])
    tied = reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert tied == (name != "phi3")
    assert done["stages"]["compensate"]["mean_residual_energy_left"] is None


def test_a_model_and_processor_of_other_families(tmp_path):
    """LLaVA as it comes: its own processor, a CLIP tower, a Llama, files in the old layout."""
    tokenizer = tiny_chat.tokenizer()
    image = tokenizer.convert_tokens_to_ids("<|IMAGE|>")
    tower = {"model_type": "clip_vision_model", **tiny_families.TOWER}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), **SMALL}
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=image)
    folder = tmp_path / "llava"
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    side = {"height": tiny_families.SIDE, "width": tiny_families.SIDE}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=tiny_families.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|IMAGE|>",
        chat_template=tiny_chat.TEMPLATE,
    ).save_pretrained(folder)
    sources = [with_media("image", "vision"), TEXT]
    done = pipeline.run(recipe(folder, ["text", "vision"], sources), tmp_path / "run")
    assert done["stages"]["calibrate"]["tokens"]["vision"] == 6 * 16
    assert max(done["stages"]["export"]["verified"].values()) < 1e-5
    disk = load_file(Path(done["export_dir"]) / "model.safetensors")
    assert "language_model.model.layers.1.self_attn.attn_in.lr_a" in disk
