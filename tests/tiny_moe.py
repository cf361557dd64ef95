"""Tiny random mixture-of-experts models from the real Transformers classes: 8 experts, two a token.

Their token ids are those of tiny_chat's processor.
"""

import json
from functools import cache

import tiny_chat
import torch
import transformers

EXPERTS, TOP = 8, 2
HIDDEN, INNER = 64, 48
_MARKS = {"image": "<|IMAGE|>", "audio": "<|AUDIO|>", "video": "<|VIDEO|>"}


def _text(**more) -> dict:
    text = tiny_chat.tokenizer()
    return {
        "vocab_size": len(text),
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "moe_intermediate_size": INNER,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": text.pad_token_id,
        "eos_token_id": text.eos_token_id,
        "bos_token_id": None,
        **more,
    }


def _mrope(**more) -> dict:
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4}
    return _text(rope_parameters=rope, **more)


def _tower(**more) -> dict:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
        **more,
    }


def _tokens(*kinds: str) -> dict[str, int]:
    token = tiny_chat.tokenizer().convert_tokens_to_ids
    found = {f"{kind}_token_id": token(_MARKS[kind]) for kind in kinds}
    found |= {"vision_start_token_id": token("<|vision_bos|>")}
    return found | {"vision_end_token_id": token("<|vision_eos|>")}


def seeded(model_class, config):
    """Random weights that keep activations near one."""
    torch.manual_seed(0)
    model, generator = model_class(config), torch.Generator().manual_seed(0)
    text = tiny_chat.tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            elif parameter.ndim in (2, 3):
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        # A generated placeholder without media behind it would be an error of its own.
        for token in set(range(256, len(text))) - {text.eos_token_id}:
            model.lm_head.weight[token] = 0
    model.generation_config.eos_token_id = text.eos_token_id
    model.generation_config.pad_token_id = text.pad_token_id
    return model.eval()


@cache
def qwen3_vl_moe():
    """Qwen3-VL-MoE with deepstack features after the first layer. Cached, as all here are."""
    config = transformers.Qwen3VLMoeConfig(
        text_config=_mrope(tie_word_embeddings=False),
        vision_config=_tower(),
        **_tokens("image", "video"),
    )
    return seeded(transformers.Qwen3VLMoeForConditionalGeneration, config)


@cache
def qwen3_omni_moe():
    """The thinker of a Qwen3-Omni: text, vision and audio."""
    token = tiny_chat.tokenizer().convert_tokens_to_ids
    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config=_mrope(),
        vision_config=_tower(),
        audio_config={
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "num_mel_bins": 16,
            "output_dim": HIDDEN,
            "max_source_positions": 100,
            "n_window": 50,
            "downsample_hidden_size": 8,
        },
        audio_start_token_id=token("<|audio_bos|>"),
        audio_end_token_id=token("<|audio_eos|>"),
        **_tokens("image", "video", "audio"),
    )
    return seeded(transformers.Qwen3OmniMoeThinkerForConditionalGeneration, config)


@cache
def qwen3_moe():
    return seeded(transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**_text()))


@cache
def qwen2_moe():
    """With a shared expert beside the routed ones."""
    config = transformers.Qwen2MoeConfig(**_text(shared_expert_intermediate_size=40))
    return seeded(transformers.Qwen2MoeForCausalLM, config)


@cache
def mixtral():
    text = _text(intermediate_size=INNER, num_local_experts=EXPERTS, sliding_window=None)
    del text["num_experts"], text["moe_intermediate_size"]
    return seeded(transformers.MixtralForCausalLM, transformers.MixtralConfig(**text))


MODELS = {
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_omni_moe_thinker": qwen3_omni_moe,
    "qwen3_moe": qwen3_moe,
    "qwen2_moe": qwen2_moe,
    "mixtral": mixtral,
}


def inputs(model, batch: int = 2, pad: int = 3, seed: int = 0) -> dict:
    """What the model can take: text, a picture (4 tokens) and a sound (5 tokens) per row.

    Row 0 has `pad` words more, so the other rows are padded on the left.
    """
    generator, config = torch.Generator().manual_seed(seed), model.config

    def words(count: int):
        return torch.randint(3, 200, (count,), generator=generator)

    parts, given = [words(7)], {}
    if image := getattr(config, "image_token_id", None):
        start = getattr(config, "vision_start_token_id", None)
        end = getattr(config, "vision_end_token_id", None)
        parts += [torch.tensor([start, *[image] * 4, end]), words(3)]
        given["pixel_values"] = torch.randn(batch * 16, 3 * 2 * 14 * 14, generator=generator)
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]] * batch)
    if sound := getattr(config, "audio_token_id", None):
        marks = config.audio_start_token_id, config.audio_end_token_id
        parts += [torch.tensor([marks[0], *[sound] * 5, marks[1]]), words(2)]
        given["input_features"] = torch.randn(batch, 16, 40, generator=generator)
        given["feature_attention_mask"] = torch.ones(batch, 40, dtype=torch.long)
    row = torch.cat(parts)
    padding = torch.full((batch, pad), model.config.get_text_config().pad_token_id)
    ids = torch.cat([padding, row.expand(batch, -1)], 1)
    mask = torch.ones_like(ids)
    ids[0, :pad], mask[1:, :pad] = words(pad), 0
    if image and not sound:  # Qwen-VL derives its 3-D positions from these; Omni from the ids
        given["mm_token_type_ids"] = (ids == image).long()
    return {"input_ids": ids, "attention_mask": mask, **given}


def save(name: str, folder) -> None:
    """A float checkpoint with its processor's files, as on the hub but for the video's."""
    MODELS[name]().save_pretrained(folder)
    parts = tiny_chat.processor()
    parts.tokenizer.save_pretrained(folder)
    if "vl" not in name and "omni" not in name:
        return
    made = "Qwen3OmniMoeProcessor" if "omni" in name else "Qwen3VLProcessor"
    settings = {"processor_class": made, **parts.image_processor.to_dict()}
    if "omni" in name:
        settings = {**parts.feature_extractor.to_dict(), **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(tiny_chat.TEMPLATE)
