"""Exports on disk: from_pretrained, save_pretrained, load_quantized, and broken files."""

import json
import os
import subprocess
import sys

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_quantized import export, quantized, scheme_of
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import masquant_cli
from masquant_cli.errors import ArtifactError, EnvironmentProblem
from masquant_cli.runtime.mas_linear import MasLinear
from masquant_cli.runtime.scheme import Scheme

CASES = {
    "omni": (tiny_models.omni_thinker, tiny_models.omni_inputs, None),
    "qwen2_5_vl": (tiny_models.qwen2_5_vl, tiny_models.vision_inputs, AutoModelForImageTextToText),
    "qwen2_vl": (tiny_models.qwen2_vl, tiny_models.vision_inputs, AutoModelForImageTextToText),
    "qwen2": (tiny_models.qwen2, tiny_models.text_inputs, AutoModelForCausalLM),
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(float model, scheme, inputs, auto class, exported folder)."""
    make, inputs, auto = CASES[request.param]
    model = make()
    scheme = scheme_of(model)
    folder = export(model, scheme, tmp_path_factory.mktemp(request.param))
    return model, scheme, inputs(), auto or type(model), folder


@pytest.fixture(scope="module")
def omni_folder(tmp_path_factory):
    model = tiny_models.omni_thinker()
    return export(model, scheme_of(model), tmp_path_factory.mktemp("omni"))


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_from_pretrained_gives_the_exported_model_exactly(case):
    model, scheme, inputs, auto, folder = case
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    assert torch.equal(logits(loaded, inputs), logits(quantized(model, scheme), inputs))
    assert sum(isinstance(m, MasLinear) for m in loaded.modules()) == 14
    assert not loaded.training


def test_save_pretrained_writes_the_same_folder_again(case, tmp_path):
    _, scheme, inputs, _, folder = case
    loaded = masquant_cli.load_quantized(folder)
    loaded.save_pretrained(tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert torch.equal(value, after[key]), key
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == scheme.to_dict()
    again = masquant_cli.load_quantized(tmp_path)
    assert torch.equal(logits(again, inputs), logits(loaded, inputs))


def test_loading_in_another_dtype_leaves_scales_and_factors_as_they_are(case):
    _, _, inputs, _, folder = case
    loaded = masquant_cli.load_quantized(folder, dtype=torch.bfloat16)
    for key, value in loaded.state_dict().items():
        ending = key.rpartition(".")[2]
        expected = {
            "smooth_inv": torch.float32,
            "weight_scale": torch.float32,
            "lr_a": torch.float16,
            "lr_b": torch.float16,
            "weight_packed": torch.int8,
        }.get(ending, torch.bfloat16)
        assert value.dtype == expected, key
    low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    assert logits(loaded, low).dtype == torch.bfloat16


def test_a_full_omni_folder_loads_its_thinker(tmp_path):
    model = tiny_models.omni_thinker()
    outer = {
        "model_type": "qwen2_5_omni",
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "dtype": "float32",
    }
    folder = export(model, scheme_of(model), tmp_path, prefix="thinker.", outer=outer)
    keys = load_file(folder / "model.safetensors")
    assert "thinker.model.layers.0.self_attn.attn_in.smooth_inv" in keys
    loaded = masquant_cli.load_quantized(folder)
    inputs = tiny_models.omni_inputs()
    want = logits(quantized(model, scheme_of(model)), inputs)
    assert torch.equal(logits(loaded, inputs), want)


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_bits": 8},
        {"symmetric": False, "group_size": 8, "activation_bits": 16},
        {"rank": 0},
        {"sites": ("attn_in", "mlp_in"), "rank": 0},
    ],
)
def test_every_scheme_round_trips(fields, tmp_path):
    model = tiny_models.qwen2_vl()
    scheme = scheme_of(model, **fields)
    loaded = masquant_cli.load_quantized(export(model, scheme, tmp_path))
    inputs = tiny_models.vision_inputs()
    assert torch.equal(logits(loaded, inputs), logits(quantized(model, scheme), inputs))


def broken(folder, target, change):
    """A copy of an export whose tensors went through `change(dict)`."""
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


SITE, LINEAR = "model.layers.1.mlp.mlp_in", "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{SITE}.smooth_inv"), r"mlp_in\.smooth_inv is missing"),
        (lambda t: t.pop(f"{LINEAR}.bias"), r"q_proj\.bias is missing"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight is missing"),
        (lambda t: t.update({f"{SITE}.lr_a": t[f"{SITE}.lr_a"].float()}), "lr_a should be"),
        (lambda t: t.update({f"{SITE}.lr_a": t[f"{SITE}.lr_a"][:1]}), "lr_a should be"),
        (
            lambda t: t.update({f"{LINEAR}.weight_zero_point": torch.zeros(96, 1).char()}),
            "weight_zero_point is in the checkpoint, but not described",
        ),
    ],
)
def test_files_that_do_not_match_their_config_are_refused(omni_folder, tmp_path, change, message):
    folder = broken(omni_folder, tmp_path, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        masquant_cli.load_quantized(folder)
    assert str(folder) in caught.value.where


def test_truncated_absent_and_foreign_folders_are_refused(omni_folder, tmp_path):
    folder = broken(omni_folder, tmp_path, lambda tensors: None)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 1, 100, 4, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match="not a whole safetensors file"):
            masquant_cli.load_quantized(folder)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        masquant_cli.load_quantized(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        masquant_cli.load_quantized(folder)
    with pytest.raises(ArtifactError, match="no such checkpoint"):
        masquant_cli.load_quantized(tmp_path / "nowhere")
    plain = tmp_path / "float"
    tiny_models.qwen2().save_pretrained(plain)
    with pytest.raises(ArtifactError, match="no masquant quantization_config"):
        masquant_cli.load_quantized(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2 is newer"),
        ({"format_version": "1"}, "not a masquant quantization_config"),
        ({"surprise": 1}, r"unknown keys, found \['surprise'\]"),
        (
            {"weights": {"bits": 4, "group_size": None}},
            r"weights lacks keys, found \['symmetric'\]",
        ),
        (
            {"weights": {"bits": 3, "group_size": None, "symmetric": True}},
            "must be 4 or 8, found 3",
        ),
        ({"activations": {"bits": 5}}, "4, 6, 8 or 16"),
        ({"modalities": ["text", "text"]}, "distinct"),
        ({"token_ids": {"vision": [90]}}, "lack a modality"),
        ({"token_ids": {"vision": [90], "audio": [90]}}, "two modalities"),
        ({"ranks": {"attn_in": -1}}, "whole number"),
        ({"sites": []}, "sites must"),
        ({"packing": {"layout": "nibble-block", "block": 64}}, "packing"),
        ({"weights": 4}, "malformed"),
    ],
)
def test_a_quantization_config_is_checked(omni_folder, tmp_path, change, message):
    folder = broken(omni_folder, tmp_path, lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message):
        masquant_cli.load_quantized(folder)
    with pytest.raises(ArtifactError, match=message):  # and by the plain road
        type(tiny_models.omni_thinker()).from_pretrained(folder)


def test_a_scheme_survives_its_json():
    scheme = Scheme(8, None, True, 6, ("text", "audio"), {"audio": (7, 9)}, {"mlp_in": 3})
    restored = Scheme.from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert restored.to_dict() == scheme.to_dict()
    assert restored.rank("mlp_in") == 3
    assert restored.rank("attn_in") == 0


def test_tensor_parallelism_is_refused(omni_folder):
    from masquant_cli.runtime.hf import MasquantConfig, MasquantHfQuantizer

    model = tiny_models.omni_thinker()
    model.config.distributed_config = object()
    values = scheme_of(model).to_dict()
    quantizer = MasquantHfQuantizer(MasquantConfig(**values))
    with pytest.raises(EnvironmentProblem, match="tp_plan"):
        quantizer._process_model_before_weight_loading(model)


LOAD = "Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained({folder!r})"
ORDERS = {
    "masquant first": "import masquant_cli, transformers as t; m = t." + LOAD,
    "transformers first": "from transformers import Qwen2_5OmniThinkerForConditionalGeneration\n"
    "import masquant_cli; m = " + LOAD,
    "load_quantized alone": "import masquant_cli; m = masquant_cli.load_quantized({folder!r})",
    "processor first": "from masquant_cli.models import omni_processor\n"
    "import masquant_cli; m = masquant_cli.load_quantized({folder!r})",
}


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("order", ORDERS)
def test_plain_from_pretrained_works_in_every_import_order(order, omni_folder):
    code = ORDERS[order].format(folder=str(omni_folder))
    code += """
from transformers.models.auto.processing_auto import processor_class_from_name
print(sum(type(x).__name__ == "MasLinear" for x in m.modules()))
print(processor_class_from_name("MasquantOmniProcessor").__module__)
"""
    assert python(code).split() == ["14", "masquant_cli.models.omni_processor"]


def test_the_import_loads_neither_torch_nor_transformers():
    code = (
        "import sys, masquant_cli, masquant_cli.models.families, masquant_cli.runtime\n"
        "print(masquant_cli.__version__, {'torch', 'transformers'} & set(sys.modules))"
    )
    assert python(code) == "0.1.0 set()"
