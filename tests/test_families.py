"""Every family on a tiny model of its real class: found, walked, quantized, reloaded."""

import copy
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_families
import tiny_moe
import torch
import transformers
from masquant_kernels import dispatch
from safetensors.torch import load_file
from tiny_families import AUDIO, CASES, IMAGE, VIDEO, job_of
from tiny_quantized import by_definition, quantized, scheme_of
from torch import nn

from masquant_cli import load_quantized
from masquant_cli.data.inputs import encode
from masquant_cli.data.samples import Sample
from masquant_cli.errors import RecipeError
from masquant_cli.inspect.support import support
from masquant_cli.models import loading
from masquant_cli.models.capture import embed, run_layer
from masquant_cli.models.experts import unfuse
from masquant_cli.models.families import DECODERS, FAMILIES, Family, model_class
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.models.names import disk_names
from masquant_cli.models.sites import find_sites, layers_path
from masquant_cli.models.skeleton import load_skeleton
from masquant_cli.recipe import Model
from masquant_cli.runtime import modality_ids as forced_ids
from masquant_cli.stages import fresh, walk
from masquant_cli.stages.export import export as stages_export

pytestmark = pytest.mark.filterwarnings("ignore")
every = pytest.mark.parametrize("name", CASES)
with_experts = pytest.mark.parametrize("name", [*CASES, *tiny_moe.MODELS])
TIED = ("internvl", "gemma3", "mistral3", "llama", "gemma2", "gemma3_text", "smollm3")
HYBRID = "minicpmv4_6"  # its first layer attends linearly


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: its float model as save_pretrained writes it}, each written when first asked for."""
    written = {}

    def folder(name):
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name)
            made = tiny_moe.MODELS.get(name, lambda: tiny_families.model(name))
            made().save_pretrained(written[name])
        return written[name]

    return folder


@pytest.fixture
def skeleton(name, folders, monkeypatch):
    monkeypatch.setattr(loading, "load_processor", lambda folder: None)
    return load_skeleton(Model(path=str(folders(name)), dtype="float32"), "cpu")


def tiny(name: str):
    """A float model whose experts, if it has any, have names, and inputs for it."""
    if name in CASES:
        return tiny_families.model(name), tiny_families.inputs(name)
    model = unfuse(copy.deepcopy(tiny_moe.MODELS[name]()))
    return model, tiny_moe.inputs(model)


def relative(got, want) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def real_logits(model, inputs) -> torch.Tensor:
    """[real tokens, vocabulary]; padding attends to nothing and may hold anything."""
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def test_every_family_has_a_tiny_model():
    # A full Omni checkpoint is loaded as its thinker.
    full = {name for name, family in FAMILIES.items() if family.subconfig}
    assert set(CASES) | set(tiny_moe.MODELS) == set(FAMILIES) - full


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
def test_a_skeleton_is_the_model(name, skeleton):
    model, inputs = tiny_families.model(name), tiny_families.inputs(name)
    want = real_logits(model, inputs)
    with skeleton.materialised(""):
        assert torch.equal(real_logits(skeleton.model, inputs), want)
    assert all(p.is_meta for p in skeleton.model.parameters())


@with_experts
@torch.no_grad()
def test_layer_by_layer_equals_the_full_forward(name, skeleton):
    model, inputs = tiny(name)
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


def words_alone(name: str, inputs: dict) -> dict:
    """The same rows with a word wherever a placeholder stood, and no media."""
    known = {i for ids in token_ids_of(tiny(name)[0].config).values() for i in ids}
    ids = inputs["input_ids"]
    ids = torch.where(torch.isin(ids, torch.tensor(sorted(known), dtype=ids.dtype)), 7, ids)
    return {"input_ids": ids, "attention_mask": inputs["attention_mask"]}


@with_experts
@torch.no_grad()
def test_walking_it_part_by_part_gives_its_logits(name, skeleton, monkeypatch):
    """As verification does it: words by the row, a tower's block or a layer at a time, the head."""
    monkeypatch.setattr(walk, "HEAD", 700)  # the head in several slices
    model, inputs = tiny(name)
    probes = {"all": inputs, "words": words_alone(name, inputs)}
    real = inputs["attention_mask"].flatten().nonzero()[1::2, 0]

    def run(index, work):
        with skeleton.materialised(f"{layers_path(skeleton.model)}.{index}"):
            for batch in work:
                run_layer(skeleton, index, batch)

    ids = torch.zeros_like(inputs["input_ids"])
    everywhere = dict.fromkeys(probes, ids), dict.fromkeys(probes, real)
    got = walk.walk(skeleton, probes, *everywhere, run)
    for kind, probe in probes.items():
        assert relative(got[kind], model(**probe).logits.flatten(0, 1)[real]) < 1e-6, kind
    assert all(p.is_meta for p in skeleton.model.parameters())


@with_experts
@torch.no_grad()
def test_of_a_tower_one_block_is_in_memory(name, skeleton):
    inputs, blocks = tiny(name)[1], walk.tower_blocks(skeleton)
    assert bool(blocks) == (len(inputs) > 2)  # there are media
    held = []

    def note(*_):
        held.extend(
            path
            for path in blocks
            if any(not p.is_meta for p in skeleton.module(path).parameters())
        )

    for path in blocks:
        skeleton.module(path).register_forward_pre_hook(note)
    skeleton.model.get_decoder().norm.register_forward_pre_hook(note)
    with walk.before_layers(skeleton):
        note()
        hidden = embed(skeleton, inputs, torch.zeros_like(inputs["input_ids"])).hidden
    layers = skeleton.module(layers_path(skeleton.model))
    assert len(walk._head(skeleton, layers, hidden[0])) == hidden.shape[1]
    assert not held


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
    exported = Path(stages_export(job, tmp_path, "")["export_dir"])
    loaded = load_quantized(exported)
    assert torch.equal(real_logits(loaded, inputs), got)
    real = {"x": inputs["attention_mask"].flatten().nonzero()[:, 0]}
    with torch.no_grad(), dispatch.force("reference"):
        walked = fresh._walked(exported, "cpu", {"x": inputs}, {"x": ids}, real)["x"]
        assert relative(walked, real_logits(loaded, inputs)) < 1e-5
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


def test_doctor_says_what_a_processor_does_not_take(tmp_path):
    for name in ("voxtral", "glm4v", "qwen2_audio"):
        tiny_families.CASES[name].config().save_pretrained(tmp_path / name)
        found = support(str(tmp_path / name))
        said = [line for line in found["warnings"] if "cannot be calibrated with" in line]
        assert found["supported"] and len(said) == (name != "qwen2_audio")
        kind = "video" if name == "glm4v" else "audio"
        assert all(line.startswith(f"{kind} cannot") for line in said)


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
