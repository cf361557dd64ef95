"""Mixture-of-experts models through the stages: what experts saw, and what becomes of the rest."""

import copy
import functools
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_moe
import torch
from safetensors.torch import load_file, save_file
from test_families_run import TEXT, recipe, shard, with_media

from masquant_cli import load_quantized, pipeline, shards
from masquant_cli.algo.site import heldout_error
from masquant_cli.cli.render import stages
from masquant_cli.data.inputs import model_inputs
from masquant_cli.errors import RecipeError
from masquant_cli.models.experts import Experts, unfuse
from masquant_cli.models.loading import load_processor
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.models.sites import Site, layers_path
from masquant_cli.progress import NullProgress
from masquant_cli.recipe import Calibration
from masquant_cli.stages import calibrate as calibrating
from masquant_cli.stages.coverage import keeps_gram, rows_kept, scarcity, stand_ins
from masquant_cli.stages.job import Job
from masquant_cli.stages.samples import choose_samples, encode_group, groups
from masquant_cli.stages.smooth import site_problem

SOURCES = {"vision": with_media("image", "vision"), "audio": with_media("audio", "audio")}
EXPERTS = tiny_moe.EXPERTS


class Warnings(NullProgress):
    def __init__(self):
        self.said = []

    def warn(self, text):
        self.said.append(text)


def job_on(folder: Path, *modalities: str, **more):
    sources = [TEXT, *(SOURCES[m] for m in modalities)]
    return recipe(folder, ["text", *modalities], sources, **more)


def counts(run: Path, modality: str) -> list[list[int]]:
    """Tokens of every expert, layer by layer, as calibrate wrote them."""
    found = []
    for path in sorted((run / "calibrate" / "layers").iterdir()):
        tensors = load_file(path)
        found.append([int(tensors[f"mlp_out.{e}.{modality}.count"]) for e in range(EXPERTS)])
    return found


@pytest.fixture(scope="module")
def full_omni(tmp_path_factory):
    """A full Qwen3-Omni as on the hub, quantized and verified in a fresh process."""
    folder = tmp_path_factory.mktemp("omni")
    tiny_moe.save("qwen3_omni_moe_thinker", folder / "float")
    config = json.loads((folder / "float" / "config.json").read_text())
    outer = {"architectures": ["Qwen3OmniMoeForConditionalGeneration"],
             "model_type": "qwen3_omni_moe", "thinker_config": config}  # fmt: skip
    (folder / "float" / "config.json").write_text(json.dumps(outer))
    talker = {"talker.model.layers.0.mlp.experts.0.down_proj.weight": torch.ones(4, 4)}
    shard(folder / "float", 3, prefix="thinker.", extra=talker)
    progress = Warnings()
    done = pipeline.run(
        job_on(folder / "float", "vision", "audio"), folder / "run", progress=progress
    )
    return folder, done, progress.said


def test_a_full_omni_becomes_a_thinker_whose_experts_have_names(full_omni):
    _, done, _ = full_omni
    verified = done["stages"]["export"]["verified"]
    assert set(verified) == {"text", "vision", "audio"} and max(verified.values()) < 1e-5
    exported = Path(done["export_dir"])
    on_disk = {k: t for file in exported.glob("*.safetensors") for k, t in load_file(file).items()}
    assert not [k for k in on_disk if k.startswith(("thinker.", "talker."))]
    block = "model.layers.1.mlp.experts"
    assert {k for k in on_disk if k.startswith((f"{block}.7.", f"{block}.mlp_in"))} == {
        *(f"{block}.mlp_in.{t}" for t in ("smooth_inv", "lr_a")),
        *(f"{block}.7.mlp_out.{t}" for t in ("smooth_inv", "lr_a")),
        *(
            f"{block}.7.{linear}.{t}"
            for linear in ("gate_proj", "up_proj", "down_proj")
            for t in ("weight_packed", "weight_scale", "lr_b")
        ),
    }
    assert on_disk["model.layers.1.mlp.gate.weight"].dtype == torch.float32  # routers stay
    assert json.loads((exported / "config.json").read_text())["model_type"] == (
        "qwen3_omni_moe_thinker"
    )
    with torch.no_grad():
        model = load_quantized(exported)
        given = tiny_moe.inputs(model)
        assert model.generate(**given, max_new_tokens=2).shape[1] > given["input_ids"].shape[1]


def test_tokens_are_told_apart_by_expert_and_modality(full_omni):
    """Counts and ranges against the model's own routers, run whole on the same samples."""
    folder, done, warned = full_omni
    model = unfuse(copy.deepcopy(tiny_moe.qwen3_omni_moe()))
    job = job_on(folder / "float", "vision", "audio")
    wanted = {m: torch.zeros(2, EXPERTS, dtype=torch.long) for m in job.modalities}
    ranges = {m: torch.zeros(2, EXPERTS, tiny_moe.INNER) for m in job.modalities}
    chosen_by, entered = {}, {}
    for layer, module in enumerate(model.get_submodule(layers_path(model))):
        note = functools.partial(chosen_by.__setitem__, layer)
        module.mlp.gate.register_forward_hook(lambda _m, _x, y, note=note: note(y[2]))
        for e in range(EXPERTS):
            note = functools.partial(entered.__setitem__, (layer, e))
            own = module.mlp.experts.get_submodule(f"{e}.down_proj")
            own.register_forward_hook(lambda _m, x, _y, note=note: note(x[0]))
    spec = SimpleNamespace(processor=load_processor(folder / "float"), config=model.config)
    chosen = choose_samples(job, spec, NullProgress())
    for group in groups(job, chosen):
        batch = encode_group(chosen, group, spec.processor)
        with torch.no_grad():
            model(**model_inputs(model, batch))
        ids = modality_ids(batch["input_ids"], token_ids_of(model.config), job.modalities)
        ids[~batch["attention_mask"].bool()] = -1
        for layer, e in itertools.product(range(2), range(EXPERTS)):
            mine = ids.flatten()[(chosen_by[layer] == e).any(1)]
            for index, name in enumerate(job.modalities):
                wanted[name][layer, e] += (mine == index).sum()
                if (mine == index).any():
                    seen = entered[layer, e][mine == index].abs().amax(0)
                    ranges[name][layer, e] = ranges[name][layer, e].maximum(seen)
    said = done["stages"]["calibrate"]["experts"]
    for name, expected in wanted.items():
        assert counts(folder / "run", name) == expected.tolist()
        for layer, e in itertools.product(range(2), range(EXPERTS)):
            tensors = load_file(folder / f"run/calibrate/layers/{layer:03d}.safetensors")
            found = tensors[f"mlp_out.{e}.{name}.absmax"]
            assert torch.allclose(found, ranges[name][layer, e], rtol=1e-3, atol=1e-5)
        every = sorted(expected.flatten().tolist())
        middle = (every[7] + every[8]) / 2
        assert said[name] == {"min": every[0], "median": middle, "without": every.count(0)}
    assert said["vision"]["without"] > 0  # or this test sees too little
    scarce = int((wanted["text"] < 32).sum())
    assert warned[0].startswith(f"text: {scarce} of 16 experts saw fewer than 32 tokens")
    lines = [w for w in warned[1:] if "scale and no" in w]
    lacking = [m for m in ("vision", "audio") if said[m]["without"]]
    assert len(warned) == 1 + len(lines) and [w.split(":")[0] for w in lines] == lacking
    assert lines[0].startswith(f"vision: {said['vision']['without']} of 16 experts, in layer")


def test_what_is_said_of_experts_that_saw_little():
    enough = [40, 32, 99]
    assert scarcity("text", "text", {0: enough}) is None
    assert scarcity("vision", "text", {0: [1, 2, 3]}) is None
    assert scarcity("vision", "text", {2: [0, 5, 0], 3: enough, 5: [0, 1, 1]}) == (
        "vision: 3 of 9 experts, in layers 2, 5, saw no token; they get the text scale and no "
        "vision correction: more calibration samples would reach them"
    )
    assert "in layers 4-6, 9, saw" in scarcity("audio", "text", {4: [0], 5: [0], 6: [0], 9: [0]})
    said = scarcity("text", "text", {0: [31, 32, 0], 1: enough})
    assert said.startswith("text: 2 of 6 experts saw fewer than 32 tokens; 1 of 6 experts, in ")
    assert "in layer 0, saw no token and get another modality's scale" in said
    assert "no token" not in scarcity("text", "text", {0: [31, 32]})


def test_a_run_shows_what_experts_saw(full_omni, capsys):
    stages(full_omni[1])
    shown = capsys.readouterr().out.split("calibration tokens of an expert")[1]
    seen = full_omni[1]["stages"]["calibrate"]["experts"]
    for name, counts in seen.items():
        row = next(line for line in shown.splitlines() if line.startswith(name)).split()
        assert row[1:] == [f"{counts['min']}", f"{counts['median']:g}", f"{counts['without']}"]


def test_few_rows_and_no_gram_are_kept_of_an_expert(full_omni):
    folder, _, _ = full_omni
    tensors = load_file(folder / "run" / "calibrate" / "layers" / "000.safetensors")
    assert len(tensors["mlp_in.text.rows"]) == 32 and "mlp_in.text.gram" in tensors
    rows = [len(tensors[f"mlp_out.{e}.text.rows"]) for e in range(EXPERTS)]
    assert rows == [min(16, n) for n in counts(folder / "run", "text")[0]]
    assert not [key for key in tensors if key.startswith("mlp_out.") and key.endswith(".gram")]
    own = Site("mlp_out", 0, "", (), 512, (8,), experts="mlp.experts", expert=3)
    some = Calibration(sources=[TEXT], rows=400, gram=("mlp_out",))
    assert rows_kept(own, some) == 50 and keeps_gram(own, some)
    wide = Site("mlp_out", 0, "", (), 513, (8,), experts="mlp.experts", expert=3)
    assert not keeps_gram(wide, some)
    dense = Site("mlp_out", 0, "", (), 513, (8,))
    assert rows_kept(dense, some) == 400 and keeps_gram(dense, some)


def test_a_modality_that_an_expert_hardly_saw_takes_another_ones_scale(full_omni):
    own = Site("mlp_out", 0, "", (), 8, (8,), experts="mlp.experts", expert=3)
    assert stand_ins(own, [40, 7, 8]) == [0, 0, 2]
    assert stand_ins(own, [3, 0, 90]) == [2, 2, 2]
    assert stand_ins(own, [3, 1, 0]) == [0, 0, 0]
    assert stand_ins(own, [0, 0, 0]) == [0, 0, 0]
    assert stand_ins(Site("mlp_out", 0, "", (), 8, (8,)), [3, 1, 9]) == [0, 1, 2]
    folder, _, _ = full_omni
    told = 0
    for layer, (text, vision) in enumerate(
        zip(counts(folder / "run", "text"), counts(folder / "run", "vision"), strict=True)
    ):
        path = folder / "run" / "smooth" / "layers" / f"{layer:03d}.safetensors"
        scales, notes = load_file(path), shards.read_header(path)["notes"]
        for expert in range(EXPERTS):
            scale = scales[f"mlp_out.{expert}.scale"]
            if text[expert] >= 8 > vision[expert]:
                assert torch.equal(scale[1], scale[0])
                told += 1
            said = notes[f"mlp_out.{expert}"]["heldout_sqnr_db"]
            assert (said[1] is None) == (vision[expert] == 0)
    assert told > 4


def test_what_is_said_of_an_expert_is_of_the_scales_that_are_stored(full_omni):
    folder, _, _ = full_omni
    job = Job(job_on(folder / "float", "vision", "audio"), NullProgress())
    borrowed = 0
    for layer in job.layers:
        path = folder / "run" / "smooth" / "layers" / f"{layer.layer:03d}.safetensors"
        scales, notes = load_file(path), shards.read_header(path)["notes"]
        tensors = load_file(folder / "run" / "calibrate" / path.relative_to(folder / "run/smooth"))
        for site in layer.sites:
            problem = site_problem(job, site, tensors)
            if any(problem.tokens):
                borrowed += site.expert is not None and 0 < min(problem.tokens) < 8
                errors = heldout_error(problem, scales[f"{site.key}.scale"])
                for said, error in zip(notes[site.key]["heldout_sqnr_db"], errors, strict=True):
                    if said is not None:
                        assert said == pytest.approx(-10 * math.log10(error), abs=2e-3), site.key
    assert borrowed > 2


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory):
    """A Qwen3-VL-MoE whose routers send every token to the same two experts."""
    folder = tmp_path_factory.mktemp("lopsided")
    tiny_moe.save("qwen3_vl_moe", folder / "float")
    file = folder / "float" / "model.safetensors"
    disk = load_file(file)
    for key in disk:
        if key.endswith("mlp.gate.weight"):
            disk[key] = torch.zeros_like(disk[key])
        if ".mlp.experts." in key:  # as on the hub
            disk[key] = disk[key].transpose(1, 2).contiguous()
    save_file(disk, file, metadata={"format": "pt"})
    job = job_on(folder / "float", "vision", export={"verify": False})
    return folder, job, pipeline.run(job, folder / "run")


@torch.no_grad()
def test_experts_that_no_token_reached_are_quantized_all_the_same(lopsided):
    folder, _, done = lopsided
    tokens = done["stages"]["calibrate"]["tokens"]
    for layer in counts(folder / "run", "text"):
        assert sorted(layer) == [0] * 6 + [tokens["text"]] * 2
    assert done["stages"]["calibrate"]["experts"]["text"] == {
        "min": 0, "median": 0, "without": 12,
    }  # fmt: skip
    for stage in ("smooth", "compensate"):
        for path in (folder / "run" / stage / "layers").iterdir():
            for key, tensor in load_file(path).items():
                assert torch.isfinite(tensor.float()).all(), key
    # With a router that also chooses what calibration never saw, the model still works.
    exported = Path(done["export_dir"]) / "model.safetensors"
    disk, generator = load_file(exported), torch.Generator().manual_seed(1)
    routers = [k for k in disk if k.endswith("mlp.gate.weight")]
    for key in routers:
        disk[key] = torch.randn(disk[key].shape, generator=generator)
    save_file(disk, exported, metadata={"format": "pt"})
    quantized, model = load_quantized(exported.parent), tiny_moe.qwen3_vl_moe()
    before = {k: model.state_dict()[k].clone() for k in routers}
    model.load_state_dict({k: disk[k] for k in routers}, strict=False)
    given = tiny_moe.inputs(model)
    real = given["attention_mask"].bool()
    want, got = model(**given).logits[real], quantized(**given).logits[real]
    model.load_state_dict(before, strict=False)
    # W4A8 noise of two layers; a scale from nothing would give nonsense instead.
    assert float((got - want).norm() / want.norm()) < 0.5


def test_an_experts_layer_that_no_token_reaches_is_an_error(lopsided, monkeypatch, tmp_path):
    _, job, _ = lopsided
    monkeypatch.setattr(Experts, "forward", lambda self, x, index, weights: torch.zeros_like(x))
    with pytest.raises(RecipeError, match="no text token reached mlp_out") as caught:
        pipeline.run(job, tmp_path / "run", until="calibrate")
    assert "layer 0" in caught.value.where and caught.value.hint
    assert not calibrating.shards.is_done(tmp_path / "run/calibrate/layers/000.safetensors", "")
