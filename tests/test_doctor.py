"""`masquant doctor --model`: what is found in models that are supported, broken or unknown."""

import json
import re

import pytest
import tiny_families
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_quantized import export, scheme_of

from masquant_cli.cli.app import main
from masquant_cli.errors import EnvironmentProblem, RecipeError
from masquant_cli.inspect import inspect
from masquant_cli.inspect.support import support
from masquant_cli.models.families import FAMILIES, Family
from masquant_cli.models.loading import read_config


def config_only(folder, config, **more):
    """A folder with nothing but config.json."""
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    return str(folder)


def test_config_json_alone_tells_everything(tmp_path, capsys):
    place = config_only(tmp_path, tiny_families.CASES["qwen3_vl"].config())
    assert main(["doctor", "--model", place, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = tiny_families.model("qwen3_vl")
    total = sum(p.numel() for p in model.parameters())
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96  # q, k, v, o; gate, up, down
    assert found["supported"] and found["problems"] == [] and found["files"] is None
    assert found["class"] == "Qwen3VLForConditionalGeneration"
    assert found["layers"] == {"at": "model.language_model.layers", "count": 2}
    assert found["decoder"] == "model.language_model"
    assert found["modalities"] == {"text": [], "vision": [120], "video": [122]}
    assert found["parameters"]["quantized"] == 2 * layer
    assert found["parameters"]["total"] == total and not found["tied_embeddings"]
    norms = 2 * (64 + 64 + 16 + 16)
    assert found["parameters"]["decoder_layers"] == 2 * layer + norms
    (group,) = found["sites"]
    assert group["layers"] == [0, 1]
    assert group["sites"]["attn_in"] == {
        "linears": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "in": 64,
        "out": [64, 32, 32],
        "experts": None,
    }
    kept = {part["module"]: part["parameters"] for part in found["left_float"]}
    assert sum(kept.values()) == total - 2 * layer
    assert {"model.visual", "lm_head", "model.language_model.layers.*.input_layernorm"} <= set(kept)
    assert [(w["inputs"], w["packed_to"]) for w in found["widths"]] == [(64, 128), (96, 128)]
    assert "96 inputs (mlp_out) are no multiple of 128" in found["warnings"][1]


def test_a_model_for_a_person(tmp_path, capsys):
    place = config_only(tmp_path, tiny_families.CASES["minicpmv4_6"].config())
    assert main(["doctor", "--model", place]) == 0
    out = capsys.readouterr().out
    assert out.index("layer 0\n") < out.index("layer 1\n")
    assert "text, vision (token 120), video (token 122)" in out
    assert "model.language_model.layers.*.linear_attn " in out  # one line for the whole block
    assert "config.json alone was read" in out and out.endswith("supported\n")


def test_the_embedded_model_with_its_weights():
    found = support("builtin:tiny-omni")
    assert found["supported"] and found["files"]["complete"] and found["files"]["shards"] == 1
    assert set(found["modalities"]) == {"text", "vision", "video", "audio"}


def test_tied_embeddings_count_once(tmp_path):
    found = support(config_only(tmp_path, tiny_families.CASES["llama"].config()))
    assert found["tied_embeddings"]
    parts = [part["module"] for part in found["left_float"]]
    assert "model.embed_tokens" in parts and "lm_head" not in parts


def test_a_quantized_checkpoint_is_no_start(tmp_path, capsys):
    config = tiny_families.CASES["qwen2"].config()
    place = config_only(tmp_path, config, quantization_config={"quant_method": "awq"})
    assert main(["doctor", "--model", place]) == 2
    out = capsys.readouterr().out
    assert "already quantized (awq)" in out and out.endswith("\nnot supported\n")
    assert "none here" not in out


@pytest.mark.parametrize(
    ("more", "method"),
    [
        ({"quantization_config": "gptq"}, "gptq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"a_config": {"text_config": {"quantization_config": {"bits": 8}}}}, "?"),
        ({"quantization_config": {}, "a_config": {"quantization_config": None}}, None),
    ],
)
def test_doctor_run_and_inspect_agree_on_what_is_quantized(tmp_path, more, method):
    place = config_only(tmp_path, tiny_families.CASES["qwen2"].config(), **more)
    found = support(place)
    assert found["quantized_by"] == method and found["supported"] == (method is None)
    save_file({"lm_head.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert inspect(place)["quantized_by"] == method
    if method is not None:
        assert found["problems"][0].startswith(f"already quantized ({method})")
        with pytest.raises(RecipeError, match=rf"already quantized \({re.escape(method)}\)"):
            read_config(tmp_path)


def test_a_config_that_its_class_refuses(tmp_path, capsys):
    refused = {"model_type": "qwen2", "num_hidden_layers": 3, "layer_types": ["full_attention"]}
    (tmp_path / "config.json").write_text(json.dumps({**refused, "vision_config": "none"}))
    assert main(["doctor", "--model", str(tmp_path), "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "cannot read this config.json: " in problem and "num_hidden_layers" in problem
    assert "\n" not in problem


def test_an_export_of_ours_is_no_start_either(tmp_path):
    model = tiny_families.model("qwen2")
    export(model, scheme_of(model), tmp_path)
    found = support(str(tmp_path))
    assert found["quantized_by"] == "masquant" and len(found["problems"]) == 1
    assert found["sites"] and found["files"] is None


def test_of_a_full_omni_checkpoint_the_thinker_is_shown(tmp_path):
    thinker = tiny_families.CASES["qwen2_5_omni_thinker"].config()
    config = transformers.Qwen2_5OmniConfig(thinker_config=thinker.to_dict())
    found = support(config_only(tmp_path, config))
    assert found["supported"] and found["model_type"] == "qwen2_5_omni"
    assert found["class"] == "Qwen2_5OmniThinkerForConditionalGeneration"
    assert found["modalities"] == {"text": [], "vision": [120], "video": [122], "audio": [121]}
    assert found["layers"]["count"] == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "truncated"),
        (lambda file: save_file({"lm_head.weight": torch.ones(128, 64)}, file), "lacks"),
    ],
)
def test_shards_that_are_not_whole(tmp_path, damage, message, capsys):
    tiny_families.model("qwen2").save_pretrained(tmp_path)
    assert support(str(tmp_path))["files"]["complete"]
    assert load_file(tmp_path / "model.safetensors")
    damage(tmp_path / "model.safetensors")
    found = support(str(tmp_path))
    assert not found["supported"] and found["files"] == {"complete": False}
    assert message in found["problems"][0]
    assert found["sites"]  # the rest is told all the same
    assert main(["doctor", "--model", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "damaged or incomplete" in out and "this checkpoint cannot be used" in out


MLLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "cross_attention_layers": [3],
    "pad_token_id": 0,
}


def test_what_an_unknown_family_has_and_lacks(tmp_path, capsys):
    config = transformers.MllamaConfig(text_config=MLLAMA, image_token_index=127)
    architectures = ["MllamaForConditionalGeneration"]
    place = config_only(tmp_path, config, architectures=architectures)
    assert main(["doctor", "--model", place]) == 2
    out = capsys.readouterr().out
    assert "model family 'mllama'" in out and "is not supported yet" in out
    found = support(place)
    decoder = found["looks_like_decoder"]
    assert decoder["layers"] == "model.language_model.layers" and decoder["count"] == 5
    assert decoder["linears"]["mlp.down_proj"] == [64, 96]
    assert found["placeholders"] == {"image_token_index": 127}
    assert "4 MllamaSelfAttentionDecoderLayer, 1 MllamaCrossAttention" in found["missing"][1]


def test_a_supported_family_around_an_unknown_decoder(tmp_path):
    """LLaVA may stand before any text model; this one names its linears otherwise."""
    text = {"model_type": "gpt_neox", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    text |= {"num_attention_heads": 4, "intermediate_size": 96}
    tower = {"model_type": "clip_vision_model", **tiny_families.TOWER}
    config = transformers.LlavaConfig(text_config=text, vision_config=tower, image_token_index=90)
    found = support(config_only(tmp_path, config))
    assert not found["supported"] and "expected a linear" in found["problems"][0]
    assert "attention.query_key_value" in found["problems"][0]
    assert found["looks_like_decoder"]["linears"]["attention.query_key_value"] == [192, 64]
    assert "attn_in" in found["missing"][0] and "mlp_out" in found["missing"][-1]


def test_a_model_type_that_transformers_does_not_know(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen9", "image_token_id": 7}')
    found = support(str(tmp_path))
    assert not found["supported"] and found["placeholders"] == {"image_token_id": 7}
    assert "cannot read this config.json" in found["problems"][0]


def test_a_class_that_this_transformers_lacks(tmp_path, monkeypatch):
    place = config_only(tmp_path, tiny_families.CASES["qwen2"].config())
    monkeypatch.setitem(FAMILIES, "qwen2", Family("qwen2", "Qwen9ForCausalLM"))
    assert "needs a newer transformers" in support(place)["problems"][0]


def test_places_without_a_model(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"no config\.json"):
        support(str(tmp_path))
    with pytest.raises(RecipeError, match="no such model folder"):
        support("a/b/c")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(RecipeError, match="not a mapping"):
        support(str(tmp_path))

    def offline(*_):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(EnvironmentProblem, match="cannot be reached"):
        support("someone/something-not-cached")
