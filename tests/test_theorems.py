"""The paper's two theorems, as far as they hold, on the code that is used.

Theorem 1: eq. 20 has the right sign and form. Eq. 17 inverts min(alpha)^2 and so claims a loss
that changes with the unit of alpha; and eq. 19 is no upper bound: some tokens gain.
"""

import math
from pathlib import Path

import pytest
import torch
from masquant_kernels.quantizers import quantize_rows
from test_low_rank import literal_eq_23_to_25

from masquant_cli.algo.low_rank import best_low_rank, unwhitened_low_rank
from masquant_cli.algo.smoothing import closed_form_scale, uniform_absmax
from masquant_cli.algo.theory import misalignment_db

ROOT = Path(__file__).parents[1]
D, TOKENS = 384, 600


def ratios(spread: float, seed: int = 0) -> torch.Tensor:
    """alpha [D], far above 1, with `spread` the deviation of its logarithm."""
    g = torch.Generator().manual_seed(seed)
    return 1e3 * torch.exp(spread * torch.randn(D, generator=g).clamp(-3, 3))


def signs(g) -> torch.Tensor:
    return torch.randint(0, 2, (TOKENS, D), generator=g) * 2.0 - 1


def nearly_uniform_tokens() -> torch.Tensor:
    """x / R [T, D] that fills the last four of 127 steps evenly.

    Tokens of one magnitude would all land on the last level and have no error at all. These move
    each side of eq. 16 by at most 20 log10(127 / 123) = 0.28 dB, both the same way.
    """
    g = torch.Generator().manual_seed(2)
    return (1 - 4 / 127 * torch.rand(TOKENS, D, generator=g)) * signs(g)


def sqnr_db(x: torch.Tensor, bits: int = 8) -> float:
    """Eq. 15 over all rows of x [T, d], through the per-token quantizer that inference uses."""
    q, step = quantize_rows(x, bits)
    noise = (x.double() - q.double() * step.double()).square().sum()
    return 10 * math.log10(float(x.double().square().sum() / noise))


def measured_change_db(unit_tokens: torch.Tensor, alpha: torch.Tensor) -> float:
    """SQNR under the scale of both modalities less SQNR under their own; unit_tokens are x / R."""
    g = torch.Generator().manual_seed(9)
    quiet = torch.exp(torch.randn(D, generator=g))
    ranges = torch.stack([quiet * alpha, quiet])
    weight = torch.ones(D)
    x = unit_tokens * quiet
    own = closed_form_scale(quiet, weight, beta=1.0)  # s = R, as in the proof
    unified = closed_form_scale(uniform_absmax(ranges), weight, beta=1.0)
    return sqnr_db(x / unified) - sqnr_db(x / own)


def model_change_db(z: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Eq. 16 under both scales, for each row of z = x / R, f64 [T]."""

    def ratio(v):
        return v.square().sum(-1) / v.abs().amax(-1).square()

    return 10 * torch.log10(ratio(z / alpha) / ratio(z))


def test_the_prediction_by_hand():
    # 1/alpha^2 = 1, 1/4, 1/4; the largest is 1: 10 log10(1.5 / 3).
    assert misalignment_db(torch.tensor([1.0, 2, 2])) == pytest.approx(-3.0103, abs=1e-4)
    assert misalignment_db(torch.tensor([10.0, 1])) == pytest.approx(10 * math.log10(0.505))
    assert misalignment_db(torch.tensor([7.0])) == 0
    # alpha 1, 2: the mean of 1, 1/4 is 5/8. A common factor costs nothing.
    assert misalignment_db(torch.tensor([1.0, 2])) == pytest.approx(10 * math.log10(5 / 8))
    assert misalignment_db(torch.tensor([30.0, 60])) == pytest.approx(10 * math.log10(5 / 8))


def test_the_prediction_is_written_once(monkeypatch):
    written = [
        path.relative_to(ROOT).as_posix()
        for folder in ("src", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if "def misalignment_db" in path.read_text(encoding="utf-8")
    ]
    assert written == ["src/masquant_cli/algo/theory.py"]
    monkeypatch.syspath_prepend(ROOT / "tools")
    from evidence import synthetic

    assert synthetic.misalignment_db is misalignment_db
    lost = synthetic.theorem1_loss_db(torch.tensor([16.0, 16.0]))
    assert lost == 0 and math.copysign(1, lost) == 1


def test_zero_if_and_only_if_alpha_is_constant():
    assert misalignment_db(torch.full((D,), 37.0)) == 0
    almost = torch.full((D,), 37.0)
    almost[5] *= 1.01
    assert -1e-3 < misalignment_db(almost) < 0
    for spread in (0.01, 0.1, 1.0):
        assert misalignment_db(ratios(spread)) < 0


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 2.0])
def test_uniform_tokens_change_by_exactly_the_prediction(spread):
    alpha = ratios(spread).double()
    z = 0.7 * signs(torch.Generator().manual_seed(1))[:5].double()
    expected = torch.full((5,), misalignment_db(alpha), dtype=torch.float64)
    assert torch.allclose(model_change_db(z, alpha), expected, rtol=0, atol=1e-11)


def test_equation_17_as_printed_can_not_be_meant():
    def printed(alpha):
        inverse = (1 / alpha.double().square()).sum()
        return -10 * math.log10(float(len(alpha) * alpha.double().min().square() / inverse))

    # A constant alpha smooths alike, yet eq. 17 would take 40 log10(alpha) dB.
    assert printed(torch.full((D,), 10.0)) == pytest.approx(-40)
    alpha = ratios(0.5)
    assert printed(10 * alpha) == pytest.approx(printed(alpha) - 40)
    assert misalignment_db(10 * alpha) == pytest.approx(misalignment_db(alpha), abs=1e-5)
    # With max(1 / alpha)^2 in its place it is eq. 20.
    inverse = 1 / alpha.double()
    repaired = -10 * math.log10(float(D * inverse.max().square() / inverse.square().sum()))
    assert repaired == pytest.approx(misalignment_db(alpha))


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3, 0.5, 0.7, 1.0])
def test_the_8_bit_quantizer_follows_the_prediction(spread):
    alpha, z = ratios(spread), nearly_uniform_tokens()
    change = measured_change_db(z, alpha)
    assert change == pytest.approx(misalignment_db(alpha), abs=0.28)


def test_where_most_channels_are_below_a_step_less_is_lost_than_predicted():
    alpha, z = ratios(2.5), nearly_uniform_tokens()
    assert misalignment_db(alpha) < -20
    assert measured_change_db(z, alpha) > misalignment_db(alpha) + 1


@pytest.mark.parametrize("law", ["uniform", "normal", "heavy"])
@pytest.mark.parametrize("spread", [0.3, 0.7, 1.0])
def test_for_random_tokens_the_prediction_is_the_most_that_is_lost(law, spread):
    # max(z / alpha) <= max(z) max(1 / alpha) bounds each token's step, and channels of equal
    # energy make the signal fall by mean(1 / alpha^2): so the change is at least eq. 20.
    g = torch.Generator().manual_seed(3)
    if law == "uniform":
        z = torch.rand(TOKENS, D, generator=g) * signs(g)
    else:
        z = torch.randn(TOKENS, D, generator=g)
        z = z.abs().pow(2 if law == "heavy" else 1) * signs(g)
    alpha = ratios(spread)
    change = measured_change_db(z, alpha)
    assert misalignment_db(alpha) - 0.3 < change
    if law != "uniform":  # the loudest channel is rarely the one that smoothing favours
        assert change > misalignment_db(alpha) + 0.5


def test_single_tokens_are_bounded_by_the_spread_of_alpha_only():
    alpha = ratios(0.7).double()
    predicted = misalignment_db(alpha)
    most = 20 * math.log10(float(alpha.max() / alpha.min()))
    order = alpha.argsort()
    gains = alpha / alpha.max()  # uniform once it is smoothed for the other modality
    loses = torch.zeros(D, dtype=torch.float64)
    loses[order[0]] = loses[order[-100:]] = 1  # sets the step, while the signal is elsewhere
    g = torch.Generator().manual_seed(4)
    z = torch.cat([torch.stack([gains, loses]), torch.randn(400, D, generator=g).double()])
    change = model_change_db(z, alpha)
    assert change[0] > 3 and change[1] < predicted - 3
    assert bool((change.abs() <= most).all())
    assert bool((change[2:] > predicted).any())


def test_alpha_must_be_positive_and_finite():
    for bad in ([], [1.0, 0.0], [1.0, -2.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match=r"alpha is|range ratios"):
            misalignment_db(torch.tensor(bad))
    with pytest.raises(ValueError, match="alpha is"):
        misalignment_db(torch.ones(2, 2))


# Theorem 2. Weights are [out, in], so the paper's Delta W is delta.T and L1 L2 is lr_a @ lr_b.


def residual_problem(tokens: int, n_in: int, n_out: int, seed: int = 0):
    """X [tokens, n_in] with correlated channels of unlike sizes, delta [n_out, n_in]; f64."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(n_in) + 0.7 * torch.randn(n_in, n_in, generator=g) / n_in**0.5
    sizes = torch.exp(torch.randn(n_in, generator=g))
    x = torch.randn(tokens, n_in, generator=g) @ mix * sizes
    return x.double(), torch.randn(n_out, n_in, generator=g).double()


def loss(x, delta, left, right) -> float:
    """Eq. 26's ||X (D.T - left right)||_F^2."""
    return float((x @ (delta.T - left @ right)).square().sum())


def lower_bound(x, delta, rank: int) -> float:
    """Eckart and Young: no matrix of this rank is nearer to X D.T; from its full SVD."""
    return float(torch.linalg.svdvals(x @ delta.T)[rank:].square().sum())


def solve(x, delta, rank: int, by: str):
    found = best_low_rank(delta, rank, **({"gram": x.T @ x} if by == "gram" else {"rows": x}))
    return found.lr_a, found.lr_b


SHAPES = [(200, 24, 17), (90, 17, 40), (64, 31, 31)]


@pytest.mark.parametrize("by", ["gram", "rows"])
@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("tokens, n_in, n_out", SHAPES)
def test_theorem_2_equals_the_literal_equations_and_the_lower_bound(tokens, n_in, n_out, rank, by):
    x, delta = residual_problem(tokens, n_in, n_out)
    left, right = solve(x, delta, rank, by)
    l1, l2 = literal_eq_23_to_25(x, delta, rank)
    assert float((left @ right - l1 @ l2).norm() / (l1 @ l2).norm()) < 1e-9
    assert loss(x, delta, left, right) == pytest.approx(lower_bound(x, delta, rank), rel=1e-9)
    assert loss(x, delta, l1, l2) == pytest.approx(lower_bound(x, delta, rank), rel=1e-9)


@pytest.mark.parametrize("tokens, n_in, n_out", [*SHAPES, (9, 24, 17)])
def test_theorem_2_no_random_or_unwhitened_competitor_is_better(tokens, n_in, n_out):
    x, delta = residual_problem(tokens, n_in, n_out)
    rank = 4
    left, right = solve(x, delta, rank, "rows")
    best = loss(x, delta, left, right)
    g = torch.Generator().manual_seed(1)
    for step in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            a = left + step * left.abs().mean() * torch.randn(*left.shape, generator=g)
            b = right + step * right.abs().mean() * torch.randn(*right.shape, generator=g)
            assert loss(x, delta, a, b) > best
            # The best partner that each factor can have.
            assert loss(x, delta, a, torch.linalg.pinv(x @ a) @ x @ delta.T) >= best * (1 - 1e-9)
            assert loss(x, delta, delta.T @ torch.linalg.pinv(b), b) >= best * (1 - 1e-9)
    plain = unwhitened_low_rank(delta, rank)
    assert loss(x, delta, plain.lr_a, plain.lr_b) > best * 1.05


@pytest.mark.parametrize("step, arrives", [(0.01, True), (0.3, True), (3.0, False)])
@pytest.mark.parametrize("tokens, n_in, n_out", [(200, 24, 17), (9, 24, 17)])
def test_theorem_2_descent_comes_down_to_it_and_not_below(tokens, n_in, n_out, step, arrives):
    x, delta = residual_problem(tokens, n_in, n_out)
    left, right = solve(x, delta, 3, "gram")
    best = loss(x, delta, left, right)
    g = torch.Generator().manual_seed(2)
    # Whitened coordinates make the descent fast; they do not change what is searched.
    _, s, vh = torch.linalg.svd(x, full_matrices=False)
    factors = [
        (f + step * f.abs().mean() * torch.randn(*f.shape, generator=g)).requires_grad_()
        for f in (torch.diag(s) @ vh @ left, right)
    ]
    target = (s[:, None] * vh) @ delta.T
    descent = torch.optim.LBFGS(factors, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        descent.zero_grad()
        value = (target - factors[0] @ factors[1]).square().sum()
        value.backward()
        return value

    start = closure().item()
    descent.step(closure)
    reached = closure().item()
    assert reached >= best * (1 - 1e-9) and reached < start
    if arrives:
        assert reached <= best * (1 + 1e-6)


def literal_loss(x, delta, rank: int) -> float:
    """Loss of eq. 23-25 as written; infinity where a root or an inverse does not exist."""
    try:
        l1, l2 = literal_eq_23_to_25(x, delta, rank)
    except torch.linalg.LinAlgError:
        return math.inf
    value = loss(x, delta, l1, l2)
    return value if math.isfinite(value) else math.inf


@pytest.mark.parametrize("by", ["gram", "rows"])
@pytest.mark.parametrize("tokens, n_in, n_out", [(1, 8, 5), (9, 24, 17), (12, 40, 64)])
def test_theorem_2_holds_where_the_whitening_has_no_inverse(tokens, n_in, n_out, by):
    x, delta = residual_problem(tokens, n_in, n_out)
    x[:, 3] = 0  # a channel that never fires, besides fewer tokens than channels
    total = float((x @ delta.T).square().sum())
    for rank in {1, tokens // 2 or 1, min(tokens, n_out)}:
        left, right = solve(x, delta, rank, by)
        bound = lower_bound(x, delta, rank)
        reached = loss(x, delta, left, right)
        assert reached == pytest.approx(bound, rel=1e-9, abs=1e-12 * total)
        assert literal_loss(x, delta, rank) > reached + 1e-12 * total
    assert float(left.abs().max()) < 100 * float(delta.abs().max())  # no inverse, no blow-up
