"""Every family on a tiny model of its real class: found, walked, quantized, reloaded."""

import types

import numpy as np
import pytest
import tiny_families
import torch
import transformers
from masquant_kernels import dispatch
from safetensors.torch import load_file
from tiny_families import AUDIO, CASES, IMAGE, VIDEO
from tiny_quantized import by_definition, quantized, scheme_of, solved_site
from torch import nn

from masquant_cli import load_quantized
from masquant_cli.data.inputs import encode
from masquant_cli.data.samples import Sample
from masquant_cli.errors import RecipeError
from masquant_cli.models import loading
from masquant_cli.models.capture import embed, run_layer
from masquant_cli.models.families import DECODERS, FAMILIES, Family, model_class
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.models.names import disk_names
from masquant_cli.models.sites import find_sites, layers_path
from masquant_cli.models.skeleton import load_skeleton
from masquant_cli.progress import NullProgress
from masquant_cli.recipe import Model, Recipe
from masquant_cli.runtime import modality_ids as forced_ids
from masquant_cli.stages.export import export as stages_export
from masquant_cli.stages.job import Job

pytestmark = pytest.mark.filterwarnings("ignore")
every = pytest.mark.parametrize("name", CASES)
TIED = ("internvl", "gemma3", "mistral3", "llama", "gemma2", "gemma3_text", "smollm3")
HYBRID = "minicpmv4_6"  # its first layer attends linearly


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: its float model as save_pretrained writes it}, each written when first asked for."""
    written = {}

    def folder(name):
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name)
            tiny_families.model(name).save_pretrained(written[name])
        return written[name]

    return folder


def relative(got, want) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def real_logits(model, inputs) -> torch.Tensor:
    """[real tokens, vocabulary]; padding attends to nothing and may hold anything."""
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def test_every_family_has_a_tiny_model():
    # A full Omni checkpoint is loaded as its thinker; experts have tests of their own.
    others = {name for name in FAMILIES if "moe" in name} | {"qwen2_5_omni", "mixtral"}
    assert set(CASES) == set(FAMILIES) - others


@every
def test_sites_hold_every_linear_of_the_decoder(name):
    model = tiny_families.model(name)
    layers = find_sites(model)
    path = layers_path(model)
    inside = {
        f"{path}.{n}"
        for n, module in model.get_submodule(path).named_modules()
        if isinstance(module, nn.Linear) and "linear_attn" not in n
    }
    found = [linear for layer in layers for site in layer.sites for linear in site.linears]
    assert len(found) == len(set(found)) and set(found) == inside
    kinds = ["attn_in", "attn_out", "mlp_in", "mlp_out"]
    assert [site.kind for site in layers[1].sites] == kinds
    assert [site.kind for site in layers[0].sites] == (kinds[2:] if name == HYBRID else kinds)
    mlp = layers[0]["mlp_in"]
    assert (mlp.in_features, sum(mlp.out_features)) == (64, 192)
    attention = layers[1]["attn_in"]
    gated = 2 if name == HYBRID else 1  # q_proj makes a gate as well
    assert (attention.in_features, sum(attention.out_features)) == (64, gated * 64 + 2 * 32)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    assert find_sites(skeleton) == layers


@every
def test_every_token_has_its_modality(name):
    config, case = tiny_families.model(name).config, CASES[name]
    known = {"vision": [IMAGE], "video": [VIDEO], "audio": [AUDIO]}
    assert token_ids_of(config) == {m: known[m] for m in FAMILIES[name].modalities}
    modalities = ("text", *(m for m in ("vision", "audio") if m in token_ids_of(config)))
    ids = modality_ids(tiny_families.inputs(name)["input_ids"], config, modalities)
    assert ids.unique().tolist() == list(range(len(modalities)))
    for token, count in case.tokens.items():
        index = modalities.index({IMAGE: "vision", AUDIO: "audio"}[token])
        assert (ids == index).sum(1).tolist() == [count, count]


@every
def test_media_reach_the_decoder(name):
    """Else everything below would hold for a model that is blind."""
    model, inputs = tiny_families.model(name), tiny_families.inputs(name)
    want = real_logits(model, inputs)
    for key in ("pixel_values", "image_pixel_values", "input_features", "audio_input_features"):
        if key in inputs:
            changed = real_logits(model, {**inputs, key: inputs[key].flip(-1)})
            assert relative(changed, want) > 1e-3, key


@every
def test_names_on_disk(name, folders):
    model = tiny_families.model(name)
    disk = load_file(folders(name) / "model.safetensors")
    names = disk_names(model, disk)
    assert sorted(names.values()) == sorted(disk)
    state = model.state_dict()
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert set(names) == set(state) - ({"lm_head.weight"} if tied else set())
    assert tied == (name in TIED)
    for key, on_disk in names.items():
        assert torch.equal(disk[on_disk], state[key]), key


INNER = ("qwen2_audio", "voxtral", "llava", "llava_next", "llava_onevision", "internvl")
PUBLISHED = {
    **dict.fromkeys((*INNER, "gemma3", "mistral3"), "language_model.model.layers"),
    **dict.fromkeys(("qwen2_vl", "phi4_multimodal", "phi3", "gemma3_text"), "model.layers"),
    **dict.fromkeys(("qwen3_vl", "glm4v", "minicpmv4_6"), "model.language_model.layers"),
    **dict.fromkeys(("idefics3", "smolvlm"), "model.text_model.layers"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_of_published_checkpoints(name):
    """The layout of the files on the hub, whatever the module tree is called in this release."""
    model = tiny_families.model(name)
    disk = f"{PUBLISHED[name]}.1.mlp.down_proj.weight"
    linear = find_sites(model)[1]["mlp_out"].linears[0]
    assert disk_names(model, [disk]) == {f"{linear}.weight": disk}
    assert PUBLISHED[name] in DECODERS


@every
def test_a_skeleton_is_the_model(name, folders, monkeypatch):
    monkeypatch.setattr(loading, "load_processor", lambda folder: None)
    skeleton = load_skeleton(Model(path=str(folders(name)), dtype="float32"), "cpu")
    model, inputs = tiny_families.model(name), tiny_families.inputs(name)
    want = real_logits(model, inputs)
    with skeleton.materialised(""):
        assert torch.equal(real_logits(skeleton.model, inputs), want)
    assert all(p.is_meta for p in skeleton.model.parameters())


@every
@torch.no_grad()
def test_layer_by_layer_equals_the_full_forward(name, folders, monkeypatch):
    monkeypatch.setattr(loading, "load_processor", lambda folder: None)
    skeleton = load_skeleton(Model(path=str(folders(name)), dtype="float32"), "cpu")
    model, inputs = tiny_families.model(name), tiny_families.inputs(name)
    seen = []
    hook = model.get_decoder().norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**inputs)
    hook.remove()
    ids = torch.zeros_like(inputs["input_ids"])
    with skeleton.materialised_names(skeleton.names_outside_layers()):
        batch = embed(skeleton, inputs, ids)
    for layer in find_sites(skeleton.model):
        with skeleton.materialised(layer.module):
            run_layer(skeleton, layer.layer, batch)
    assert torch.equal(batch.hidden, seen[0])


class Solved(Job):
    """A job whose stages before the export are made up, as tiny_quantized makes them up."""

    def read(self, stage: str, layer: int, prefix="", suffix="") -> dict[str, torch.Tensor]:
        found = {}
        for site in self.layers[layer].sites:
            scale, low_rank = solved_site(site, self.scheme, seed=layer)
            if stage == "smooth":
                found[f"{site.key}.scale"] = scale
            else:
                for modality, (a, b) in low_rank.items():
                    found[f"{site.key}.{modality}.lr_a"] = a
                    found[f"{site.key}.{modality}.lr_b"] = b
        return found


def job_of(name: str, folder) -> Solved:
    known = FAMILIES[name].modalities
    modalities = ["text", *(m for m in ("vision", "audio") if m in known)]
    source = {"dataset": "builtin:tiny-omni/calibration-text", "messages": [
        {"role": "user", "content": [{"text": "{question}"}]},
    ]}  # fmt: skip
    recipe = {
        "name": "made-up",
        "model": {"path": str(folder), "dtype": "float32"},
        "modalities": modalities,
        "calibration": {"sources": [source]},
        "device": "cpu",
        "export": {"verify": False},
    }
    calibrated = types.SimpleNamespace(summary={"tokens": dict.fromkeys(modalities, 7)})
    return Solved(
        Recipe.model_validate(recipe), NullProgress(), {"calibrate": (folder, calibrated)}
    )


@every
def test_quantized_it_computes_the_definition_and_reloads_the_same(
    name, folders, tmp_path, monkeypatch
):
    monkeypatch.setattr(loading, "load_processor", lambda folder: None)
    model, inputs = tiny_families.model(name), tiny_families.inputs(name)
    exact = scheme_of(model, activation_bits=16)
    ids = modality_ids(inputs["input_ids"], exact.token_ids, exact.modalities)
    with by_definition(model, exact, ids):
        want = real_logits(model, inputs)
    with dispatch.force("reference"):
        assert relative(real_logits(quantized(model, exact), inputs), want) < 1e-5
    assert relative(real_logits(model, inputs), want) > 5e-2
    job = job_of(name, folders(name))
    scheme = job.scheme
    with by_definition(model, scheme, ids):
        want = real_logits(model, inputs)
    ours = quantized(model, scheme)
    got = real_logits(ours, inputs)
    assert relative(got, want) < 2e-2  # a rounding may fall the other way
    if len(scheme.modalities) > 1:
        assert min(scheme.ranks.values()) > 0
        with forced_ids(ours, torch.zeros_like(ids)):
            assert relative(real_logits(ours, inputs), want) > 2e-2
    loaded = load_quantized(stages_export(job, tmp_path, "")["export_dir"])
    assert torch.equal(real_logits(loaded, inputs), got)
    made = loaded.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert made.shape[1] == inputs["input_ids"].shape[1] + 3
    assert torch.equal(made[:, -3], got_next(ours, inputs))


def got_next(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits[:, -1].argmax(-1)


def test_a_row_of_a_newer_transformers_is_a_clear_error():
    row = Family("qwen2", "Qwen9ForCausalLM")
    with pytest.raises(RecipeError, match=r"needs a newer transformers.*Qwen9ForCausalLM"):
        model_class(row)
    assert model_class(FAMILIES["qwen2"]) is transformers.Qwen2ForCausalLM


def test_a_processor_without_audio_is_named():
    """Voxtral's takes audio only inside the chat templates of its own tokenizer."""

    class Deaf:
        tokenizer = types.SimpleNamespace()
        feature_extractor = types.SimpleNamespace(sampling_rate=16000)

        def __call__(self, text, **kwargs):
            raise AssertionError

    content = [{"type": "audio", "audio": np.zeros(16, np.float32)}]
    sample = Sample([{"role": "user", "content": content}], {}, "", "row 7")
    with pytest.raises(RecipeError, match="Deaf takes no audio") as caught:
        encode(Deaf(), [sample], for_generation=False)
    assert caught.value.where == "row 7"
