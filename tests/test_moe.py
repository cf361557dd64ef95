"""Mixture-of-experts models: experts by name, their sites, their tensors on disk, the runtime."""

import copy
from pathlib import Path

import pytest
import tiny_moe
import torch
from masquant_kernels import dispatch, quantize_weight
from safetensors.torch import load_file, save_file
from tiny_families import job_of
from tiny_quantized import scheme_of, site_tensors, solved_site

from masquant_cli import load_quantized
from masquant_cli.algo.linear import compensated_linear
from masquant_cli.errors import ArtifactError, RecipeError
from masquant_cli.models import loading, skeleton
from masquant_cli.models.checkpoint import open_checkpoint
from masquant_cli.models.experts import Experts, is_fused, pieces, routed, routes, unfuse
from masquant_cli.models.families import family_of
from masquant_cli.models.modality import modality_ids
from masquant_cli.models.names import disk_names, new_disk_names
from masquant_cli.models.sites import find_sites
from masquant_cli.runtime.install import install
from masquant_cli.runtime.mas_linear import MasLinear
from masquant_cli.stages import fresh
from masquant_cli.stages.export import export

FAMILIES = list(tiny_moe.MODELS)
TINY = tiny_moe.EXPERTS * 2  # linears that one mlp_in site holds


def unfused(name: str):
    return unfuse(copy.deepcopy(tiny_moe.MODELS[name]()))


def build(folder):
    config = loading.read_config(folder)
    family = family_of(config)
    model = skeleton.build(config, family, torch.float32)
    return model, open_checkpoint(folder, model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of the float models, written once."""
    made = {}

    def folder(name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny_moe.MODELS[name]().save_pretrained(made[name])
        return made[name]

    return folder


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_experts_by_name_give_what_the_fused_ones_give(name):
    model, other = tiny_moe.MODELS[name](), unfused(name)
    assert not [n for n, m in other.named_modules() if is_fused(m)]
    given = tiny_moe.inputs(model)
    want, got = model(**given).logits, other(**given).logits
    assert torch.allclose(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    # Views: the fused weights are not copied.
    experts = next(m for m in other.modules() if isinstance(m, Experts))
    up, gate = experts.get_submodule("3.up_proj"), experts.get_submodule("3.gate_proj")
    assert up.weight.untyped_storage().data_ptr() == gate.weight.untyped_storage().data_ptr()
    # ... and an expert matters.
    up.weight[0] += 1
    assert not torch.allclose(other(**given).logits, want, atol=1e-3)
    up.weight[0] -= 1


def test_routes_name_the_experts_of_every_token():
    chosen = torch.tensor([[4, 1], [1, 0], [4, 1]])
    found = [(e, tokens.tolist(), places.tolist()) for e, tokens, places in routes(chosen, 6)]
    assert found == [(0, [1], [1]), (1, [0, 1, 2], [1, 0, 1]), (4, [0, 2], [0, 0])]
    assert list(routes(torch.zeros(0, 2, dtype=torch.long), 6)) == []


def test_experts_laid_out_otherwise_are_refused():
    fused = torch.nn.Module()
    fused.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 6, 5))
    fused.down_proj = torch.nn.Parameter(torch.zeros(2, 5, 4))  # gates and ups are 3 wide
    fused.act_fn = torch.nn.SiLU()
    layer = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": fused})})
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList()})})
    model["model"]["layers"].append(layer)
    with pytest.raises(RecipeError, match="not supported yet") as caught:
        unfuse(model)
    assert caught.value.where == "model.layers.0.mlp.experts"
    fused.down_proj = torch.nn.Parameter(torch.zeros(2, 5, 3))
    fused.has_bias = True
    with pytest.raises(RecipeError):
        unfuse(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_site_for_what_experts_read_and_one_for_each_experts_own(name):
    model = unfused(name)
    layers = find_sites(model)
    keys = ["attn_in", "attn_out", "mlp_in", *(f"mlp_out.{e}" for e in range(tiny_moe.EXPERTS))]
    assert [site.key for site in layers[1].sites] == keys
    block = f"{layers[1].module}.mlp.experts"
    shared, own = layers[1]["mlp_in"], layers[1]["mlp_out.5"]
    assert (shared.module, shared.source) == (f"{block}.mlp_in", block)
    assert shared.linears[:3] == tuple(
        f"{block}.{n}" for n in ("0.gate_proj", "0.up_proj", "1.gate_proj")
    )
    assert shared.out_features == (tiny_moe.INNER,) * TINY and shared.in_features == tiny_moe.HIDDEN
    assert (own.module, own.source) == (f"{block}.5.mlp_out", f"{block}.5.down_proj")
    assert (own.in_features, own.out_features) == (tiny_moe.INNER, (tiny_moe.HIDDEN,))
    assert own.name == "layer 1 mlp_out.5"
    with torch.device("meta"):
        bare = type(model)(model.config)
    assert find_sites(unfuse(bare)) == layers
    linears = {n for layer in layers for site in layer.sites for n in site.linears}
    others = [
        n for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and ".layers." in n and n not in linears
        and n.startswith(layers[0].module.rpartition(".")[0])
    ]  # fmt: skip
    assert all("shared_expert" in n for n in others) and (name == "qwen2_moe") == bool(others)


def transposed(folder, to):
    """The folder as Qwen3-VL-MoE's are on the hub: [experts, in, out]."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    disk = load_file(to / "model.safetensors")
    turned = {k: t.transpose(1, 2).contiguous() for k, t in disk.items() if ".mlp.experts." in k}
    assert len(turned) == 4
    save_file(disk | turned, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("name", [*FAMILIES, "transposed"])
def test_every_expert_is_read_from_the_files(name, saved, tmp_path):
    turned, name = name == "transposed", "qwen3_vl_moe" if name == "transposed" else name
    folder = transposed(saved(name), tmp_path / "hub") if turned else saved(name)
    model, checkpoint = build(folder)
    want = unfused(name).state_dict()
    assert set(want) == set(checkpoint.stored)
    for key, tensor in want.items():
        assert torch.equal(checkpoint.read(key), tensor), key
    every = sum(t.nbytes for k, t in want.items() if ".experts." in k)
    assert sum(checkpoint.stored[k].nbytes for k in want if ".experts." in k) == every
    half = checkpoint.read(next(k for k in want if k.endswith("7.up_proj.weight")), torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.is_contiguous()
    # What an export adds lies beside the experts' own names.
    site = find_sites(model)[0]["mlp_out.7"]
    new = new_disk_names(
        [f"{site.module}.smooth_inv", f"{site.linears[0]}.weight_packed"],
        disk_names(model, checkpoint.tensors),
    )
    block, last = ("block_sparse_moe", "w2") if name == "mixtral" else ("mlp", "down_proj")
    path = "model.language_model.layers.0" if name == "qwen3_vl_moe" else "model.layers.0"
    assert set(new.values()) == {
        f"{path}.{block}.experts.7.mlp_out.smooth_inv",
        f"{path}.{block}.experts.7.{last}.weight_packed",
    }


def test_a_stacked_tensor_of_another_model_is_refused(saved, tmp_path):
    folder = transposed(saved("qwen3_vl_moe"), tmp_path / "hub")
    disk = load_file(folder / "model.safetensors")
    key = next(k for k in disk if k.endswith("layers.1.mlp.experts.down_proj"))
    save_file(disk | {key: disk[key][:7].contiguous()}, folder / "model.safetensors")
    with pytest.raises(RecipeError, match=r"\[7, 48, 64\]"):
        build(folder)
    del disk[key]
    save_file(disk, folder / "model.safetensors")
    with pytest.raises(RecipeError, match="lacks 8 tensors"):
        build(folder)


def defined(model, scheme, ids, **given):
    """Logits of an unfused float model whose linears follow equation 29 one by one."""
    handles = []
    for layer in find_sites(model):
        for site in layer.sites:
            scale, factors = solved_site(site, scheme, seed=layer.layer)
            start = 0
            for linear, out in zip(site.linears, site.out_features, strict=True):
                module = model.get_submodule(linear)
                base = quantize_weight(module.weight * scale[0], scheme.weight_bits)
                pairs = {
                    scheme.modalities.index(m): (a, b[:, start : start + out])
                    for m, (a, b) in factors.items()
                }
                start += out

                def hook(module, args, y, linear=linear, base=base, scale=scale, pairs=pairs):
                    here = routed(model, linear, ids).reshape(args[0].shape[:-1])
                    return compensated_linear(args[0], here, base, scale, 8, pairs, module.bias)

                handles.append(module.register_forward_hook(hook))
    try:
        return model(**given).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_runtime_is_equation_29_expert_by_expert(name):
    model = unfused(name)
    scheme = scheme_of(model, rank=3)
    quantized = copy.deepcopy(tiny_moe.MODELS[name]())
    install(quantized, scheme, site_tensors(model, scheme))
    given = tiny_moe.inputs(model)
    ids = modality_ids(given["input_ids"], scheme.token_ids, scheme.modalities)
    want = defined(model, scheme, ids, **given)
    with dispatch.force("reference"):
        got = quantized(**given).logits
        again = copy.deepcopy(quantized)(**given).logits
    real = given["attention_mask"].bool()
    assert float((got - want)[real].norm() / want[real].norm()) < 1e-5
    assert torch.equal(got, again)
    if len(scheme.modalities) > 1:  # ... and the modality of a routed token matters
        other = defined(model, scheme, torch.zeros_like(ids), **given)
        assert float((other - want)[real].norm() / want[real].norm()) > 1e-3


@torch.no_grad()
def test_a_token_runs_its_own_experts_alone(monkeypatch):
    model = unfused("qwen3_moe")
    scheme = scheme_of(model)
    quantized = copy.deepcopy(model)
    install(quantized, scheme, site_tensors(model, scheme))
    ran = []
    forward = MasLinear.forward
    monkeypatch.setattr(
        MasLinear, "forward", lambda self, *a: ran.append((self, len(a[0]))) or forward(self, *a)
    )
    quantized(input_ids=torch.tensor([[17]]))
    experts = {m: n for n, m in quantized.named_modules() if ".experts." in n}
    mine = [(experts[m], n) for m, n in ran if m in experts]
    assert len(mine) == 2 * tiny_moe.TOP * 3 and {n for _, n in mine} == {1}  # layers, linears
    shared = quantized.get_submodule("model.layers.0.mlp.experts.mlp_in")
    assert not shared.linears or shared.fused is None  # nothing joins all experts' weights


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_stages_export_reloads_walks_and_generates(name, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_processor", lambda folder: None)
    job = job_of(name, saved(name))
    model = copy.deepcopy(tiny_moe.MODELS[name]())
    install(model, job.scheme, site_tensors(unfused(name), job.scheme))
    exported = Path(export(job, tmp_path, "")["export_dir"])
    loaded = load_quantized(exported)
    given = tiny_moe.inputs(loaded)
    ids = modality_ids(given["input_ids"], job.scheme.token_ids, job.scheme.modalities)
    real = given["attention_mask"].flatten().nonzero()[:, 0]
    with dispatch.force("reference"):
        want = loaded(**given).logits
        assert torch.equal(want, model(**given).logits)
        walked = fresh._walked(exported, "cpu", {"x": given}, {"x": ids}, {"x": real})["x"]
        assert torch.allclose(
            walked, want.flatten(0, 1)[real], rtol=0, atol=1e-5 * want.abs().max()
        )
        written = loaded.generate(**given, max_new_tokens=3, do_sample=False)
    assert written.shape[1] > given["input_ids"].shape[1]
    # A file that lacks one expert's scales is refused, not filled with noise.
    disk = load_file(exported / "model.safetensors")
    lost = next(k for k in disk if k.endswith("experts.6.mlp_out.smooth_inv"))
    del disk[lost]
    save_file(disk, exported / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="missing"):
        load_quantized(exported)


def test_pieces_cover_the_stacked_tensors():
    model = unfused("qwen3_moe")
    found = pieces(model)
    up = found["model.layers.1.mlp.experts.6.up_proj.weight"]
    assert (up.whole, up.expert, up.start, up.outs) == (
        "model.layers.1.mlp.experts.gate_up_proj", 6, tiny_moe.INNER, 2 * tiny_moe.INNER,
    )  # fmt: skip
    assert len(found) == 2 * tiny_moe.EXPERTS * 3
