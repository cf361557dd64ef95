"""Smoothing that is learned: its gradient, its guarantees, its seams."""

import math
from dataclasses import replace

import pytest
import torch
from masquant_kernels.quantizers import quantize_weight

from masquant_cli.algo import joint
from masquant_cli.algo import site as site_module
from masquant_cli.algo.joint import learn_joint
from masquant_cli.algo.learning import Adam, Schedule, learn_mas, learn_uniform
from masquant_cli.algo.linear import (
    compensated_linear,
    fake_quant_rows,
    fake_quant_rows_ste,
    fake_quant_weight,
    fake_quant_weight_ste,
)
from masquant_cli.algo.low_rank import best_low_rank
from masquant_cli.algo.site import SiteProblem, eq12, heldout_error
from masquant_cli.algo.smoothing import closed_form_scale, uniform_absmax

SCHEDULE = Schedule(epochs=3, learning_rate=0.05, batch_rows=32, seed=0)


def site(weight_bits=4, activation_bits=8, rank=3, group_size=None, symmetric=True) -> SiteProblem:
    """Three modalities; vision is loud in a few channels that the weight reads."""
    g = torch.Generator().manual_seed(0)
    n_in, n_out = 48, 40
    base = torch.exp(0.5 * torch.randn(n_in, generator=g))
    spreads = [base.clone(), base * torch.exp(torch.randn(n_in, generator=g)), base * 0.7]
    spreads[1][:3] *= 30
    samples = [torch.randn(160, n_in, generator=g) * s for s in spreads]
    return SiteProblem(
        weight=torch.randn(n_out, n_in, generator=g) / math.sqrt(n_in),
        rows=tuple(x[40:] for x in samples),
        heldout=tuple(x[:40] for x in samples),
        absmax=torch.stack([x.abs().amax(0) for x in samples]),
        mean_abs=torch.stack([x.abs().mean(0) for x in samples]),
        tokens=tuple(len(x) for x in samples),
        weight_bits=weight_bits,
        group_size=group_size,
        symmetric=symmetric,
        activation_bits=activation_bits,
        rank=rank,
        loss_weights=(1.0, 1.0, 1.0),
    )


@pytest.mark.parametrize("bits, group, symmetric", [(4, None, True), (4, 8, False), (8, 16, True)])
def test_straight_through_keeps_the_value(bits, group, symmetric):
    w = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    expected = fake_quant_weight(w, bits, group, symmetric)
    torch.testing.assert_close(fake_quant_weight_ste(w, bits, group, symmetric), expected)
    torch.testing.assert_close(fake_quant_rows_ste(w, 6), fake_quant_rows(w, 6))
    assert fake_quant_rows_ste(w, 16) is w


def test_the_step_size_keeps_its_gradient():
    """Without it the smoothing gets none: (x / s) and (W s) cancel."""
    w = torch.tensor([[0.3, -1.0, 0.45]], requires_grad=True)
    fake_quant_weight_ste(w, 4)[0, 0].backward()
    step = 1.0 / 7
    rounding = round(0.3 / step) - 0.3 / step
    assert float(w.grad[0, 0]) == pytest.approx(1.0)
    assert float(w.grad[0, 1]) == pytest.approx(-rounding / 7, rel=1e-4)  # through absmax


def test_learning_mas_beats_its_closed_form_on_heldout_rows():
    problem = site()
    start = eq12(problem)
    learned = learn_mas(problem, SCHEDULE, start)

    def own_error(scale, m):
        x = problem.heldout[m]
        y = x @ problem.weight.T
        q = fake_quant_rows(x / scale, 8) @ fake_quant_weight(problem.weight * scale, 4).T
        return float((y - q).abs().mean())

    for m in range(3):
        assert own_error(learned[m], m) <= own_error(start[m], m)
    assert own_error(learned[0], 0) < 0.97 * own_error(start[0], 0)


@pytest.mark.parametrize("weight_bits, activation_bits", [(4, 8), (4, 4), (8, 8), (4, 16)])
def test_joint_is_never_worse_than_the_simple_choices(weight_bits, activation_bits):
    problem = site(weight_bits, activation_bits)
    closed = eq12(problem)
    mas = learn_mas(problem, SCHEDULE, closed)
    found = learn_joint(problem, SCHEDULE, mas)
    uniform = closed_form_scale(uniform_absmax(problem.absmax), problem.absmax_w)
    others = {
        "uniform": uniform.expand_as(closed),
        "text for all, with correction": mas[0].expand_as(closed),
        "the paper's": mas,
        "the paper's, not learned": closed,
    }
    for name, scale in others.items():
        assert sum(found.error) <= sum(heldout_error(problem, scale)) * (1 + 1e-4), name
    assert found.error == pytest.approx(heldout_error(problem, found.scale), rel=1e-3)


def test_a_shared_scale_is_judged_by_what_is_best_for_the_others(monkeypatch):
    """Where only eq. 12 goes with the base's own scale, that scale must not be left out."""
    problem = site(8, 8)
    closed = eq12(problem)
    own = problem.smoothed(closed[0])

    def error(_problem, m, base, scale, _start=None):
        fits = torch.equal(base, own) and torch.equal(scale, closed[m])
        return (0.1 if m == 0 or fits else 0.9 if torch.equal(base, own) else 0.5), None

    monkeypatch.setattr(joint, "modality_error", error)
    scale, _, origin = joint._best_start(problem, torch.cat([closed[:1], 2 * closed[1:]]))
    assert torch.equal(scale, closed), origin


def test_joint_is_much_better_than_the_paper_where_a_modality_dominates():
    problem = site()
    mas = learn_mas(problem, SCHEDULE, eq12(problem))
    found = learn_joint(problem, SCHEDULE, mas)
    assert sum(found.error) < 0.8 * sum(heldout_error(problem, mas))


def test_heldout_error_is_that_of_eq_29():
    problem = site()
    scale = eq12(problem)
    base = quantize_weight(problem.weight * scale[0], 4)
    for m, error in enumerate(heldout_error(problem, scale)):
        x = problem.heldout[m]
        low_rank = {}
        if m:
            delta = problem.weight * scale[m] - fake_quant_weight(problem.weight * scale[0], 4)
            exact = best_low_rank(delta, 3, rows=problem.rows[m] / scale[m])
            low_rank = {m: (exact.lr_a, exact.lr_b)}
        ids = torch.full((len(x),), m)
        y = x @ problem.weight.T
        rest = y - compensated_linear(x, ids, base, scale, 8, low_rank)
        assert error == pytest.approx(float(rest.square().sum() / y.square().sum()), rel=2e-2)


def test_a_modality_without_weight_in_the_loss_does_not_move_the_base():
    """Other rows of the muted modalities (their ranges kept) must leave the base as it is."""
    problem = site()

    def base_learned(problem: SiteProblem, *weights: float) -> torch.Tensor:
        weighted = replace(problem, loss_weights=weights)
        return learn_joint(weighted, SCHEDULE, eq12(weighted)).scale[0]

    g = torch.Generator().manual_seed(5)
    noise = [torch.randn(x.shape, generator=g) for x in (*problem.rows, *problem.heldout)]
    other = replace(
        problem,
        rows=(problem.rows[0], *noise[1:3]),
        heldout=(problem.heldout[0], *noise[4:]),
    )
    assert torch.equal(base_learned(problem, 1.0, 0.0, 0.0), base_learned(other, 1.0, 0.0, 0.0))
    assert not torch.equal(base_learned(problem, 1, 1, 1), base_learned(other, 1, 1, 1))


def test_same_seed_same_scales():
    problem = site()
    first = learn_joint(problem, SCHEDULE, eq12(problem)).scale
    assert torch.equal(first, learn_joint(site(), SCHEDULE, eq12(problem)).scale)


def test_closed_form_survives_channels_that_never_fired():
    s = closed_form_scale(torch.tensor([4.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert torch.isfinite(s).all() and (s > 0).all()
    assert s[0] == 2.0


@pytest.mark.parametrize("bits, group, symmetric", [(4, None, True), (4, 8, False), (8, 16, True)])
def test_the_gradient_of_a_rounded_weight_is_that_of_its_formula(bits, group, symmetric):
    g = torch.Generator().manual_seed(1)
    w = torch.randn(9, 16, generator=g)
    w[0], w[1], w[2] = w[0].abs(), 0, -w[2].abs()  # one end at zero, both, the other
    seen = torch.randn(9, 16, generator=g)
    found = w.clone().requires_grad_()
    value = fake_quant_weight_ste(found, bits, group, symmetric)
    assert torch.equal(value, fake_quant_weight(w, bits, group, symmetric))
    (value * seen).sum().backward()
    spelt = w.clone().requires_grad_()
    parts = spelt.reshape(9, -1, group or 16)
    if symmetric:
        step = parts.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    else:
        high, low = parts.amax(-1, keepdim=True), parts.amin(-1, keepdim=True)
        step = (high.clamp_min(0) - low.clamp_max(0)) / 15
    rest = (value.detach().reshape(parts.shape) - parts.detach()) / step.detach().clamp_min(1e-30)
    ((parts + rest * step).reshape(9, 16) * seen).sum().backward()
    torch.testing.assert_close(found.grad, spelt.grad, rtol=1e-4, atol=1e-4)
    assert float((found.grad - seen).abs().max()) > 1e-3  # the step's part of it


def test_adam_is_torchs_with_a_cosine_rate():
    g = torch.Generator().manual_seed(2)
    ours = torch.randn(3, 5, generator=g)
    theirs = ours.clone().requires_grad_()
    adam = Adam(ours, 0.05, steps=7)
    known = torch.optim.Adam([theirs], lr=0.05, betas=(0.9, 0.95))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(known, 7, eta_min=0.0025)
    for _ in range(7):
        theirs.grad = torch.randn(3, 5, generator=g)
        adam.step(theirs.grad.clone())
        known.step()
        cosine.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_a_large_site_is_learned_on_a_part_that_speaks_for_the_whole(monkeypatch):
    problem = site()
    whole = learn_joint(problem, SCHEDULE, eq12(problem))
    monkeypatch.setattr(site_module, "FEWEST_OUTPUTS", 16)
    monkeypatch.setattr(site_module, "PART", 1)
    assert len(problem.some_outputs()) == 40  # 8 outputs for each of 3 columns are most of them
    problem = replace(problem, rank=1)
    part = problem.part()
    some = problem.some_outputs()
    assert torch.equal(part.weight, problem.weight[some]) and len(some.unique()) == 16
    assert part.part() is part and torch.equal(part.absmax_w, problem.absmax_w)
    assert torch.equal(eq12(part), eq12(problem))
    found = learn_joint(problem, SCHEDULE, eq12(problem))
    assert found.error == heldout_error(problem, found.scale)  # of all outputs
    assert sum(found.error) < 0.9 * sum(heldout_error(problem, eq12(problem)))
    assert sum(heldout_error(replace(problem, rank=3), found.scale)) < 1.3 * sum(whole.error)


@pytest.mark.parametrize("silent", [(0,), (1,), (1, 2), (0, 1, 2)])
def test_modalities_without_rows_have_no_say_and_harm_nothing(silent):
    problem = site()

    def without(parts):
        return tuple(x[:0] if m in silent else x for m, x in enumerate(parts))

    problem = replace(problem, rows=without(problem.rows), heldout=without(problem.heldout))
    closed = eq12(problem)
    for scale in (
        learn_mas(problem, SCHEDULE, closed),
        learn_joint(problem, SCHEDULE, closed).scale,
        learn_uniform(problem, SCHEDULE, closed[0])[None],
    ):
        assert bool(torch.isfinite(scale).all()) and float(scale.min()) > 0
    learned = learn_mas(problem, SCHEDULE, closed)
    for m in range(3):
        assert torch.equal(learned[m], closed[m]) == (m in silent)
    error = learn_joint(problem, SCHEDULE, closed).error
    assert [e == 0 for e in error] == [m in silent for m in range(3)]
