"""Every method: what it must return, and the promise that adding one touches a file and a line."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from jobs import Interrupting, small
from masquant_kernels.quantizers import dequantize_weight, quantize_weight
from test_learning import site

from masquant_cli import pipeline, shards
from masquant_cli.algo.block import _split, layer_error, learn_block, modality_linear
from masquant_cli.algo.linear import fake_quant_rows, fake_quant_weight, fake_quant_weight_ste
from masquant_cli.algo.search import GRID, pooled_mean_abs, power_scale, search_beta
from masquant_cli.algo.site import eq12
from masquant_cli.data.inputs import encode_scored, model_inputs
from masquant_cli.errors import ArtifactError
from masquant_cli.methods import find
from masquant_cli.methods.method import Layer
from masquant_cli.models.capture import layer_output
from masquant_cli.models.loading import load_float
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.progress import NullProgress
from masquant_cli.recipe import Method, Smoothing
from masquant_cli.rundir import read_manifest
from masquant_cli.stages import samples
from masquant_cli.stages.base_weight import pooled_gram
from masquant_cli.stages.blocks import Blocks
from masquant_cli.stages.job import Job
from masquant_cli.stages.samples import choose_samples
from masquant_cli.stages.sensitivity import Sensitivity
from masquant_cli.stages.smooth import site_problem

METHODS = get_args(Method)
SRC = Path(pipeline.__file__).parent
NO_VERIFY = "export.verify=false"


def layer_of(problem, options=Smoothing(epochs=2, batch_rows=32), felt=(1.0, 0.25, 0.5)):  # noqa: B008
    def no_block():
        raise AssertionError("this method needs no decoder layer")

    return Layer(
        modalities=("text", "vision", "audio"),
        sites={"attn_in": problem},
        smoothing=options,
        seeds={"attn_in": 0},
        sensitivity=lambda: {"attn_in": torch.tensor(felt)},
        block=no_block,
    )


def solved(method, problem, **options):
    return find(method).solve(layer_of(problem, Smoothing(batch_rows=32, **options)))["attn_in"]


# --- registering one


def test_a_method_is_one_file_and_one_line():
    """The name `awq` stands in recipe.Method and nowhere else; its file has the rest.

    Only the report's figures may know names: to draw the paper's with the paper's markers.
    """
    for name in ("awq", "mbq", "text-scales"):
        holding = {
            path.relative_to(SRC).as_posix()
            for path in SRC.rglob("*.py")
            if path.parent.name != "report"
            and re.search(rf"[\"']{name}[\"']", path.read_text(encoding="utf-8"))
        }
        assert holding == {"recipe.py"}, name


def test_files_and_registered_names_are_the_same():
    files = {p.stem.replace("_", "-") for p in (SRC / "methods").glob("*.py")}
    assert files - {"--init--", "method"} == set(METHODS)
    assert all(callable(find(name).solve) for name in METHODS)


@pytest.mark.parametrize("name", [m for m in METHODS if m != "masquant-reference"])
def test_scales_are_positive_and_their_error_is_that_of_the_deployed_form(name):
    problem = site()
    found = solved(name, problem, epochs=1)
    assert found.scale.shape == problem.absmax.shape
    assert bool((found.scale > 0).all())
    base = dequantize_weight(quantize_weight(problem.weight * found.scale[0], 4))
    x = problem.heldout[0]
    y = x @ problem.weight.T
    error = y - fake_quant_rows(x / found.scale[0], 8) @ base.T
    assert found.error[0] == pytest.approx(float(error.square().sum() / y.square().sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["rtn", "smoothquant", "awq", "mbq", "omniquant-uniform"])
def test_methods_with_one_scale_have_one(name):
    scale = solved(name, replace(site(), rank=0), epochs=1).scale
    assert torch.equal(scale, scale[:1].expand_as(scale))
    assert not find(name).corrects


def test_text_scales_are_those_that_masquant_gives_to_text():
    problem = site()
    text = solved("text-scales", problem, epochs=2).scale
    own = solved("masquant", problem, epochs=2).scale
    assert torch.equal(text, own[:1].expand_as(own))
    assert not torch.equal(own[1], own[0])


def test_masquant_without_learning_is_eq_12():
    problem = site()
    expected = torch.stack([(a / problem.weight.abs().amax(0)).sqrt() for a in problem.absmax])
    found = solved("masquant", problem, learn=False).scale
    torch.testing.assert_close(found, expected)


def test_weights_of_the_modalities_cannot_matter_to_eq_14_of_one_linear():
    """Eq. 13 is then a sum of terms that share nothing."""
    other = replace(site(), loss_weights=(1.0, 0.1, 3.0))
    torch.testing.assert_close(
        solved("masquant", site(), epochs=2).scale, solved("masquant", other, epochs=2).scale
    )


def test_weights_of_the_modalities_matter_to_a_shared_scale():
    text, vision = (
        solved("omniquant-uniform", replace(site(rank=0), loss_weights=weights), epochs=3)
        for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    )
    assert text.error[0] < vision.error[0]
    assert vision.error[1] < text.error[1]


# --- searching beta


def literal_error(problem, beta, shares, power):
    """Eq. 9 in fp64, written out."""
    magnitude = pooled_mean_abs(problem).double()
    scale = magnitude**beta
    scale = scale / (scale.max() * scale.min()).sqrt()
    q = fake_quant_weight((problem.weight.double() * scale).float(), 4).double()
    total = 0.0
    for x, share in zip(problem.rows, shares, strict=True):
        x = x.double()
        y = x @ problem.weight.double().T
        out = fake_quant_rows((x / scale).float(), 8).double() @ q.T
        total += share * float((y - out).abs().pow(power).mean())
    return total


@pytest.mark.parametrize("shares", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.2, 0.5, 0.3)])
@pytest.mark.parametrize("power", [1, 2])
def test_the_search_finds_the_grids_minimum(shares, power):
    problem = site()
    scale, beta = search_beta(problem, pooled_mean_abs(problem), shares, power)
    errors = {b: literal_error(problem, b, shares, power) for b in GRID}
    assert errors[beta] <= min(errors.values()) * (1 + 1e-3)
    torch.testing.assert_close(scale, power_scale(pooled_mean_abs(problem), beta))


def test_the_mean_pools_tokens_and_not_modalities():
    problem = replace(site(), tokens=(900, 100, 0))
    expected = 0.9 * problem.mean_abs[0] + 0.1 * problem.mean_abs[1]
    torch.testing.assert_close(pooled_mean_abs(problem), expected)


def test_what_mbq_hears_of_the_gradients_moves_its_choice():
    problem = replace(site(rank=0), tokens=(100, 100, 100))
    deaf = find("mbq").solve(layer_of(problem, felt=(1.0, 0.0, 0.0)))["attn_in"]
    blind = find("mbq").solve(layer_of(problem, felt=(1.0, 1e3, 1.0)))["attn_in"]
    assert deaf.error[0] < blind.error[0]
    assert blind.error[1] < deaf.error[1]


# --- learning a whole layer


def test_a_linear_of_eq_21_is_its_modalities_put_together():
    problem = site()
    scale = eq12(problem)
    x = torch.cat([rows[:3] for rows in problem.rows])
    ids = torch.tensor([0] * 3 + [1] * 3 + [2] * 3)[
        torch.tensor(order := [4, 0, 8, 1, 3, 6, 2, 5, 7])
    ]
    x = x[torch.tensor(order)]

    def quantize(w):
        return fake_quant_weight_ste(w, 4)

    y = modality_linear(x, ids, problem.weight, scale, quantize, 8)
    for row, m in enumerate(ids.tolist()):
        own = fake_quant_weight(problem.weight * scale[m], 4)
        expected = fake_quant_rows(x[row] / scale[m], 8) @ own.T
        torch.testing.assert_close(y[row], expected)


class OneLinearBlock:
    """A block of one linear: enough to see what learning does with its errors."""

    def __init__(self, problem, mixes=([0, 0, 0, 1, 1, 2, -1],) * 8):
        self.problem, self.mixes = problem, [torch.tensor(ids) for ids in mixes]

    def __len__(self):
        return len(self.mixes)

    def _x(self, index):
        ids = self.mixes[index].tolist()
        return torch.stack([self.problem.rows[max(m, 0)][index * 7 + i] for i, m in enumerate(ids)])

    def sample(self, index):
        return self._x(index) @ self.problem.weight.T, self.mixes[index]

    def run(self, index, scales):
        def quantize(w):
            return fake_quant_weight_ste(w, 4)

        x, ids, weight = self._x(index), self.mixes[index], self.problem.weight
        return modality_linear(x, ids, weight, scales["attn_in"], quantize, 8)


def test_the_layers_error_by_hand():
    problem = site()
    block, scales = OneLinearBlock(problem), {"attn_in": eq12(problem)}
    target, _ = block.sample(0)
    error = (block.run(0, scales) - target).abs().mean(1)
    pooled = layer_error(block, 0, scales, (1.0, 0.5, 2.0), pooled=True)
    by_hand = (error[:3].sum() + 0.5 * error[3:5].sum() + 2 * error[5]) / 6  # padding left out
    assert float(pooled) == pytest.approx(float(by_hand), rel=1e-5)
    apart = layer_error(block, 0, scales, (1.0, 0.5, 2.0), pooled=False)
    size = target.abs().mean(1)
    by_hand = error[:3].mean() / size[:3].mean() + 0.5 * error[3:5].mean() / size[3:5].mean()
    assert float(apart) == pytest.approx(float(by_hand + 2 * error[5] / size[5]), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_learning_a_layer_never_ends_worse_than_it_began(rows):
    problem = site()
    block = OneLinearBlock(problem)
    start = {"attn_in": eq12(problem)[:rows].clone()}
    found = learn_block(
        block, start, (1.0, 1.0, 1.0), epochs=4, learning_rate=0.05, heldout=0.25, seed=0
    )
    assert found["attn_in"].shape == (rows, problem.weight.shape[1])

    def judge(scales):
        return sum(float(layer_error(block, i, scales, (1, 1, 1), pooled=False)) for i in (0, 1))

    assert judge(found) < judge(start)


def test_every_mix_of_modalities_judges():
    """Text-only samples first and many: they alone must not choose the epoch."""
    block = OneLinearBlock(site(), mixes=[[0, 0]] * 6 + [[0, 1]] * 4 + [[2, 0, -1]] + [[0, 1]])
    judged, learned = _split(block, 0.25)
    assert judged == [0, 6, 10]
    assert sorted([*judged, *learned]) == list(range(12))


def test_a_sample_without_a_modality_that_counts_teaches_nothing_and_breaks_nothing():
    problem = site()
    block = OneLinearBlock(problem, mixes=[[0, 0], [0, 0], [1, 1, 0], [1, 0, 1], [0, 0], [1, 1, 1]])
    start = {"attn_in": eq12(problem)}
    found = learn_block(
        block, start, (0.0, 1.0, 1.0), epochs=3, learning_rate=0.05, heldout=0.25, seed=0
    )["attn_in"]
    torch.testing.assert_close(found[0], start["attn_in"][0])  # text has no weight
    assert not torch.equal(found[1], start["attn_in"][1])


def test_errors_of_bf16_layers_are_summed_in_fp32():
    class Rounded(OneLinearBlock):
        def sample(self, index):
            target, ids = super().sample(index)
            return target.bfloat16(), ids

        def run(self, index, scales):
            return super().run(index, scales).bfloat16()

    problem = site()
    error = layer_error(Rounded(problem), 0, {"attn_in": eq12(problem)}, (1, 1, 1), pooled=False)
    assert error.dtype == torch.float32


# --- on the embedded model


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("calibrated")
    pipeline.run(small(), run_dir, until="calibrate")
    return run_dir


@pytest.fixture(scope="module")
def job() -> Job:
    return Job(small("smoothing.samples=6"), NullProgress())


def test_sensitivity_is_the_gradient_of_the_models_own_loss(job):
    felt = Sensitivity(job)
    felt.of(0)  # computes all
    model, names = load_float(job.recipe.model).model, job.recipe.modalities
    sums = torch.zeros(3, 2)
    for sample in choose_samples(job.recipe, job.float, NullProgress()).samples[:6]:
        batch, scored = encode_scored(job.float.processor, [sample])
        ids = modality_ids(batch["input_ids"], token_ids_of(model.config), names)
        kept = []
        module = model.get_submodule(job.layers[2]["mlp_out"].linears[0])
        first = model.get_submodule(job.layers[0].module)
        handles = [
            module.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out)),
            first.register_forward_pre_hook(
                lambda m, a: (a[0].detach().requires_grad_(True), *a[1:])
            ),
        ]
        inputs = model_inputs(model, batch)
        labels = inputs["input_ids"].masked_fill(~scored, -100)
        loss = model(**inputs, labels=labels, use_cache=False).loss
        (gradient,) = torch.autograd.grad(loss, kept)
        for handle in handles:
            handle.remove()
        size = gradient.abs().mean(-1)
        for m in range(3):
            here = (ids == m) & (scored if m == 0 else torch.ones_like(scored))
            sums[m] += torch.tensor([float(size[here].sum()), int(here.sum())])
    mean = sums[:, 0] / sums[:, 1]
    torch.testing.assert_close(felt._ratios["mlp_out"][2], mean / mean[0], rtol=1e-3, atol=0)
    least = torch.stack(felt._ratios["mlp_out"]).median(0).values
    torch.testing.assert_close(
        felt.of(2)["mlp_in"], torch.maximum(mean / mean[0], least), rtol=1e-3, atol=0
    )
    assert model.get_submodule(job.layers[0].module).input_layernorm.weight.grad is None


def test_sensitivity_leaves_out_attention_that_a_layer_does_not_have(job):
    """As in hybrid models, some of whose layers attend linearly."""
    whole, hybrid = Sensitivity(job), Job(job.recipe, NullProgress())
    first, *others = job.layers
    mlp = tuple(site for site in first.sites if site.kind.startswith("mlp"))
    hybrid.layers = [replace(first, sites=mlp), *others]
    felt = Sensitivity(hybrid)
    assert set(felt.of(0)) == {"mlp_in", "mlp_out"}
    least = torch.stack(whole._ratios["attn_out"][1:]).median(0).values
    for layer in range(1, len(others) + 1):
        expected = torch.maximum(whole._ratios["attn_out"][layer], least)
        assert torch.equal(felt.of(layer)["attn_in"], expected)
        assert torch.equal(felt.of(layer)["mlp_in"], whole.of(layer)["mlp_in"])


def test_a_layer_of_quantized_linears_is_the_layer_with_their_weights_rounded(tmp_path):
    job = Job(small("smoothing.samples=3", "activations.bits=16"), NullProgress())
    blocks = Blocks(job, tmp_path)
    block = blocks.at(0)
    ones = {s.kind: torch.ones(1, s.in_features) for s in block.layer.sites}
    found = [block.run(i, ones) for i in range(len(block))]
    for linear in (job.float.module(n) for s in block.layer.sites for n in s.linears):
        assert "forward" not in vars(linear)  # put back as it was
        linear.weight.data = fake_quant_weight(linear.weight.data, 4)
    for i, stream in enumerate(block.inputs):
        out = layer_output(job.float, 0, stream.quantized, stream)
        torch.testing.assert_close(found[i], out[0], rtol=1e-4, atol=1e-4)
        assert set(block.sample(i)[1].tolist()) <= {-1, 0, 1, 2}


def test_a_later_layer_reads_what_the_solved_ones_gave(tmp_path):
    job = Job(small("smoothing.samples=2"), NullProgress())
    blocks = Blocks(job, tmp_path)
    first = blocks.at(0)
    scales = {s.kind: torch.ones(3, s.in_features) for s in first.layer.sites}
    outputs = [first.run(i, scales).detach() for i in range(2)]
    targets = [first.sample(i)[0] for i in range(2)]
    tensors = {f"{kind}.scale": scale for kind, scale in scales.items()}
    shards.save(shards.layer_file(tmp_path, 0), tensors, fingerprint="x", notes={})
    second = blocks.at(1)
    assert second.layer.layer == 1
    for i in range(2):
        assert torch.equal(second.inputs[i].quantized[0], outputs[i])
        assert torch.equal(second.inputs[i].hidden[0], targets[i])


# test_pipeline.py runs masquant-joint
@pytest.mark.parametrize("name", [m for m in METHODS if m != "masquant-joint"])
def test_every_method_runs_to_an_export(name, calibrated, tmp_path):
    recipe = small(f"method={name}", "smoothing.samples=4", NO_VERIFY)
    done = pipeline.run(recipe, tmp_path, reuse=[calibrated])
    assert done["stages"]["calibrate"]["state"] == "cached"
    corrected = {
        k.split(".")[0] for k in shards.load(shards.layer_file(tmp_path / "compensate", 1))
    }
    assert corrected == set(find(name).corrects)
    assert pipeline.recipe_of(tmp_path) == recipe


def test_the_released_code_leaves_down_proj_alone(calibrated, tmp_path):
    recipe = small("method=masquant-reference", "smoothing.samples=3")
    pipeline.run(recipe, tmp_path, until="compensate", reuse=[calibrated])
    scales = shards.load(shards.layer_file(tmp_path / "smooth", 0))
    assert torch.equal(scales["mlp_out.scale"], torch.ones_like(scales["mlp_out.scale"]))
    found = shards.load(shards.layer_file(tmp_path / "compensate", 0))
    assert found["attn_in.vision.lr_a"].shape[1] == 32  # not 5 % of 256


@pytest.mark.parametrize("name", ["masquant", "omniquant-uniform"])
def test_objective_block_is_a_switch(name, calibrated, tmp_path):
    found = {}
    for objective in ("linear", "block"):
        recipe = small(
            f"method={name}", f"smoothing.objective={objective}", "smoothing.samples=12",
            "smoothing.epochs=2",
        )  # fmt: skip
        pipeline.run(recipe, tmp_path / objective, until="smooth", reuse=[calibrated])
        file = shards.layer_file(tmp_path / objective / "smooth", 0)
        found[objective] = shards.load(file)["attn_in.scale"]
        assert torch.equal(found[objective][0], found[objective][1]) == (name != "masquant")
    assert not torch.allclose(found["linear"], found["block"])


class Told(NullProgress):
    def __init__(self):
        self.stages, self.warnings = [], []

    def stage(self, name, total, unit):
        self.stages.append([name, 0])

    def advance(self, n=1, tokens=0):
        self.stages[-1][1] += n

    def warn(self, text):
        self.warnings.append(text)


@pytest.mark.parametrize("name", ["mbq", "masquant-reference"])
def test_layers_are_counted_as_smoothing_where_the_model_runs_first(name, calibrated, tmp_path):
    told = Told()
    recipe = small(f"method={name}", "smoothing.samples=2")
    pipeline.run(recipe, tmp_path, until="smooth", reuse=[calibrated], progress=told)
    assert told.stages[-1] == ["smooth", 4]
    assert not told.warnings


@pytest.mark.parametrize("name", ["mbq", "masquant-reference"])
def test_interrupted_between_layers_it_resumes_to_the_same_bytes(name, calibrated, tmp_path):
    recipe = small(f"method={name}", "smoothing.samples=2")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(
            recipe, tmp_path / "a", until="smooth", reuse=[calibrated],
            progress=Interrupting("smooth", 2),
        )  # fmt: skip
    for run_dir in ("a", "b"):
        pipeline.run(recipe, tmp_path / run_dir, until="smooth", reuse=[calibrated])
    a, b = (read_manifest(tmp_path / run_dir / "smooth").outputs for run_dir in ("a", "b"))
    assert a == b


def test_switches_that_a_method_does_not_read_are_warned_about(calibrated, tmp_path):
    told = Told()
    recipe = small("method=awq", "smoothing.objective=block", "smoothing.beta=0.7")
    pipeline.run(recipe, tmp_path, until="smooth", reuse=[calibrated], progress=told)
    assert told.warnings == [f"awq does not read smoothing.{key}" for key in ("beta", "objective")]


def test_samples_that_are_not_those_of_calibration_are_refused(calibrated, tmp_path, monkeypatch):
    def other(*given):
        found = choose_samples(*given)
        return replace(found, samples=found.samples[1:])

    monkeypatch.setattr(samples, "choose_samples", other)
    with pytest.raises(ArtifactError, match="calibration data changed"):
        pipeline.run(small("method=mbq"), tmp_path, until="smooth", reuse=[calibrated])


# --- the base weight


def test_gptq_lowers_the_error_of_every_modality(calibrated, tmp_path):
    found = {}
    for rounding in ("nearest", "gptq"):
        recipe = small("method=smoothquant", f"weights.rounding={rounding}")
        run_dir = tmp_path / rounding
        pipeline.run(recipe, run_dir, until="compensate", reuse=[calibrated])
        job = Job(recipe, NullProgress())
        statistics = shards.load(shards.layer_file(calibrated / "calibrate", 2))
        scale = shards.load(shards.layer_file(run_dir / "smooth", 2))["mlp_in.scale"]
        kept = shards.load(shards.layer_file(run_dir / "compensate", 2))
        weight = job.weight(job.layers[2]["mlp_in"])
        base = quantize_weight(weight * scale[0], 4)
        if rounding == "gptq":
            base = base._replace(q=kept["mlp_in.weight"])
            assert int(base.q.abs().max()) <= 7
        for name in ("text", "vision", "audio"):
            x = statistics[f"mlp_in.{name}.rows"]
            y = x @ weight.T
            noise = y - (x / scale[0]) @ dequantize_weight(base).T
            found[rounding, name] = float(noise.square().sum() / y.square().sum())
    for name in ("text", "vision", "audio"):
        assert 10 * math.log10(found["nearest", name] / found["gptq", name]) > 2, name


def test_held_out_rows_are_not_in_the_gram_that_gptq_sees(calibrated):
    job = Job(small("weights.rounding=gptq"), NullProgress())
    statistics = shards.load(shards.layer_file(calibrated / "calibrate", 1))
    linear_site = job.layers[1]["attn_in"]
    problem = site_problem(job, linear_site, statistics)
    ones = torch.ones_like(problem.absmax)
    found = pooled_gram(job, linear_site, problem, ones, statistics, 1.0)
    expected = torch.zeros_like(found, dtype=torch.float64)
    for m, name in enumerate(job.recipe.modalities):
        rows = problem.heldout[m].double()
        gram = statistics[f"attn_in.{name}.gram"].double() - rows.T @ rows
        weight = problem.weight.double()
        expected += gram / float((weight @ gram * weight).sum())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


def test_predicted_sqnr_is_against_the_float_output_whatever_the_target(calibrated, tmp_path):
    recipe = small("method=masquant", "compensation.target=quantized", "compensation.rank=60")
    pipeline.run(recipe, tmp_path, until="compensate", reuse=[calibrated])
    job = Job(recipe, NullProgress())
    file = shards.layer_file(tmp_path / "compensate", 0)
    note, kept = shards.read_header(file)["notes"]["attn_in.audio"], shards.load(file)
    scale = shards.load(shards.layer_file(tmp_path / "smooth", 0))["attn_in.scale"]
    gram = shards.load(shards.layer_file(calibrated / "calibrate", 0))["attn_in.audio.gram"]
    weight = job.weight(job.layers[0]["attn_in"])
    a, b = (kept[f"attn_in.audio.lr_{x}"].double() for x in "ab")
    effective = (fake_quant_weight(weight * scale[0], 4).double() + (a @ b).T) / scale[2]
    lost = weight.double() - effective
    signal, noise = (float((w @ gram.double() * w).sum()) for w in (weight.double(), lost))
    assert note["predicted_sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), abs=0.05)


def test_the_residual_reaches_for_what_the_recipe_says(calibrated, tmp_path):
    found = {}
    for target in ("float", "quantized"):
        recipe = small("method=masquant", f"compensation.target={target}", NO_VERIFY)
        run_dir = tmp_path / target
        pipeline.run(recipe, run_dir, until="compensate", reuse=[calibrated])
        found[target] = shards.load(shards.layer_file(run_dir / "compensate", 0))
    job = Job(small(), NullProgress())
    scale = shards.load(shards.layer_file(tmp_path / "float" / "smooth", 0))["attn_in.scale"]
    weight = job.weight(job.layers[0]["attn_in"])
    base = fake_quant_weight(weight * scale[0], 4)
    for target, reached in {
        "float": weight * scale[1],
        "quantized": fake_quant_weight(weight * scale[1], 4),
    }.items():
        a, b = (found[target][f"attn_in.vision.lr_{x}"].float() for x in "ab")
        projected = (reached - base).T @ b.T  # lr_a = D.T V, lr_b = V.T
        torch.testing.assert_close(a, projected, rtol=5e-3, atol=4e-3)
    assert not torch.equal(
        found["float"]["attn_in.vision.lr_a"], found["quantized"]["attn_in.vision.lr_a"]
    )
