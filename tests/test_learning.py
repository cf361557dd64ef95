"""Smoothing that is learned: its gradient, its guarantees, its seams."""

import math
from dataclasses import replace

import pytest
import torch
from masquant_kernels.quantizers import quantize_weight

from masquant_cli.algo.joint import learn_joint
from masquant_cli.algo.learning import Schedule, learn_mas
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
