"""The closed form of CMC against the paper's literal equations and against competitors."""

import pytest
import torch

from masquant_cli.algo import low_rank
from masquant_cli.algo.low_rank import (
    best_low_rank,
    effective_rank,
    rank_for,
    top_right_subspace,
)


def problem(n_in: int, n_out: int, tokens: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(n_in, generator=g))
    x = torch.randn(tokens, n_in, generator=g) @ torch.randn(n_in, n_in, generator=g) * spread
    delta = torch.randn(n_out, n_in, generator=g) * 0.1
    return x, delta


def residual(x, delta, lr) -> float:
    rest = x.double() @ (delta.double().T - lr.lr_a.double() @ lr.lr_b.double())
    return float(rest.norm() / (x.double() @ delta.double().T).norm())


def literal_eq_23_to_25(x, delta, rank):
    """T = (P sqrt(Lambda)).T, SVD(T W), L1 = T^-1 U, L2 = S V.T; W is delta.T here."""
    gram = x.double().T @ x.double()
    values, p = torch.linalg.eigh(gram)
    t = (p * values.sqrt()).T
    u, s, vh = torch.linalg.svd(t @ delta.double().T, full_matrices=False)
    return torch.linalg.inv(t) @ u[:, :rank], s[:rank, None] * vh[:rank]


@pytest.mark.parametrize("n_in, n_out", [(24, 40), (40, 24), (33, 33)])
@pytest.mark.parametrize("by", ["gram", "rows"])
def test_equals_the_literal_equations(n_in, n_out, by):
    x, delta = problem(n_in, n_out, tokens=400)
    given = {"gram": x.T @ x} if by == "gram" else {"rows": x}
    found = best_low_rank(delta, 5, **given)
    l1, l2 = literal_eq_23_to_25(x, delta, 5)
    difference = x.double() @ (found.lr_a.double() @ found.lr_b.double() - l1 @ l2)
    assert float(difference.norm() / (x.double() @ l1 @ l2).norm()) < 1e-4


def test_is_right_with_fewer_tokens_than_channels_where_the_literal_form_cannot_be():
    x, delta = problem(64, 48, tokens=10)
    found = best_low_rank(delta, 10, rows=x)
    assert residual(x, delta, found) < 1e-5  # ten tokens span ten directions
    assert torch.isfinite(found.lr_a).all()


def test_theorem_2_no_competitor_is_better():
    x, delta = problem(30, 26, tokens=300)
    found = best_low_rank(delta, 4, gram=x.T @ x)
    best = residual(x, delta, found)
    g = torch.Generator().manual_seed(1)
    for step in (0.003, 0.03, 0.3):
        for _ in range(30):
            noise = torch.linalg.qr(found.lr_b.T + step * torch.randn(26, 4, generator=g)).Q
            other = low_rank.LowRank(delta.T @ noise, noise.T, found.singular_values, 1.0)
            assert residual(x, delta, other) >= best - 1e-6
    plain = low_rank.unwhitened_low_rank(delta, 4)
    assert residual(x, delta, plain) > best * 1.05


def test_residual_and_factors_are_as_documented():
    x, delta = problem(31, 19, tokens=200)
    found = best_low_rank(delta, 3, gram=x.T @ x)
    assert found.lr_a.shape == (31, 3) and found.lr_b.shape == (3, 19)
    assert torch.allclose(found.lr_b @ found.lr_b.T, torch.eye(3), atol=1e-5)
    assert found.residual**0.5 == pytest.approx(residual(x, delta, found), rel=1e-3)
    expected = torch.linalg.svdvals(x.double() @ delta.double().T)[:3]
    assert torch.allclose(found.singular_values[:3].double(), expected, rtol=1e-4)


def spectrum(name: str, n: int) -> torch.Tensor:
    k = torch.arange(1, n + 1).double()
    return {
        "flat": 1 + 0.01 * torch.rand(n, generator=torch.Generator().manual_seed(2)).double(),
        "slow": k**-0.3,
        "steep": 0.8**k + 1e-3,
        "cluster": torch.where(k <= 6, 1.0, 0.05 * k**-0.2),  # six equal ones
        "step at the rank": torch.where(k <= 8, 1.0, 0.97),
        "deficient": torch.where(k <= 20, 1.0, 0.0),  # more than a block, less than two
        "barely more": torch.where(k <= 9, 1.0, 0.0),
        "one loud": torch.where(k <= 1, 30.0, k**-0.1),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "flat",
        "slow",
        "steep",
        "cluster",
        "step at the rank",
        "deficient",
        "barely more",
        "one loud",
    ],
)
@pytest.mark.parametrize("n_in, n_out", [(160, 230), (230, 160)])
@pytest.mark.parametrize("by", ["gram", "rows", "nothing"])
def test_block_krylov_is_within_a_tenth_of_a_percent(n_in, n_out, name, by, monkeypatch):
    g = torch.Generator().manual_seed(3)
    monkeypatch.setattr(low_rank, "EXACT_SIDE", 1)
    monkeypatch.setattr(low_rank, "EIGH", 1e9)  # the other way is never cheaper
    values = spectrum(name, 160)
    u = torch.linalg.qr(torch.randn(n_in, 160, generator=g).double()).Q
    v = torch.linalg.qr(torch.randn(n_out, 160, generator=g).double()).Q
    mix = torch.eye(n_in).double()
    if by != "nothing":
        mix = torch.randn(n_in, n_in, generator=g).double() + 5 * mix
    # X = mix and D = v values (mix^-1 u).T: the singular values of X D.T are `values`.
    x, delta = mix.float(), (v * values @ torch.linalg.solve(mix, u).T).float()
    if by == "nothing":
        found = low_rank.unwhitened_low_rank(delta, 8)
    else:
        found = best_low_rank(delta, 8, **({"rows": x} if by == "rows" else {"gram": x.T @ x}))
    assert not found.complete
    left = float(values[8:].norm() / values.norm())
    assert residual(x, delta, found) <= left * 1.001
    # The reported energy counts the whole residual, not only the part that was iterated on.
    assert found.residual**0.5 == pytest.approx(left, rel=2e-3)


@pytest.mark.parametrize("name", ["some", "equal", "two", "one"])
def test_block_krylov_ends_where_the_operator_does_and_stays_orthonormal(name):
    n, rank = 900, 12  # of an operator that a few blocks exhaust, the next block is rounding
    k = torch.arange(1, n + 1).double()
    values = {
        "some": torch.where(k <= 26, 1.0, 0.0),
        "equal": torch.where(k <= 6, 1.05, 1.0),
        "two": torch.where(k <= 2, 1 / k, 0.0),
        "one": torch.where(k <= 1, 1e6, 1 / k),
    }[name]
    blocks = []

    def apply(q):
        blocks.append(q)
        return values.float()[:, None] * q

    v, found, _ = low_rank.top_eigenvectors(apply, n, rank, float(values.sum()), like=torch.ones(1))
    assert len(blocks) <= 6
    assert float((v.T @ v - torch.eye(rank)).abs().max()) < 2e-5  # eps, and sums of 900
    assert float(found[:rank].sum()) <= float(values[:rank].sum()) * (1 + 5e-6)
    caught = float((v.double() * (values[:, None] * v.double())).sum())
    assert caught >= float(values[:rank].sum()) * (1 - 1e-5)


def test_block_krylov_gives_up_where_it_does_not_pay():
    values = torch.rand(60, generator=torch.Generator().manual_seed(4)).double()
    found = low_rank.top_eigenvectors(
        lambda v: values[:, None] * v, 60, 28, float(values.sum()), like=values
    )
    assert found is None


@pytest.mark.parametrize("n_in, n_out", [(1030, 520), (530, 1100)])
def test_wide_sites_are_solved_without_their_whole_spectrum(n_in, n_out):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(1400, n_in, generator=g) * torch.exp(torch.randn(n_in, generator=g))
    delta = torch.randn(n_out, n_in, generator=g)
    found = best_low_rank(delta, 11, gram=x.T @ x)
    assert not found.complete and best_low_rank(delta, 11, rows=x[:300]).complete
    values = torch.linalg.eigvalsh(
        (x.double() @ delta.double().T).T @ (x.double() @ delta.T.double())
    )
    best = float((values[:-11].sum() / values.sum()).sqrt())
    assert residual(x, delta, found) <= best * 1.001
    assert torch.equal(found.lr_b, best_low_rank(delta, 11, gram=x.T @ x).lr_b)


def test_a_few_steps_come_near_the_best_subspace_and_a_warm_start_nearer():
    x, delta = problem(40, 32, tokens=300)
    image = x @ delta.T

    def left(v):
        assert torch.allclose(v.T @ v, torch.eye(4), atol=1e-4)
        return float((image - image @ v @ v.T).norm())

    best = left(best_low_rank(delta, 4, rows=x).lr_b.T)
    cold = top_right_subspace(image, 4, steps=1)
    warm = top_right_subspace(image, 4, start=cold, steps=1)
    assert best <= left(warm) * (1 + 1e-6) and left(warm) < left(cold)
    assert left(top_right_subspace(image, 4)) < best * 1.01


def test_of_a_huge_side_a_random_block_is_no_answer():
    """Experts have 200,000 outputs and more: a random block sees next to nothing of them."""
    values = torch.ones(100_000)
    values[::25_000] = 50.0

    def apply(v):
        return values[:, None] * v

    v, found, _ = low_rank.top_eigenvectors(apply, len(values), 4, float(values.sum()), like=values)
    assert found[:4].tolist() == pytest.approx([50.0] * 4, rel=0.01)
    assert float(v[::25_000].square().sum()) == pytest.approx(4, rel=0.01)


def test_rank_is_a_rounded_down_ratio_or_absolute_and_never_too_wide():
    assert rank_for(0.05, 256, 512) == 12
    assert rank_for(0.0, 256, 512) == 0
    assert rank_for(7, 256, 512) == 7
    assert rank_for(400, 256, 512) == 256


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.ones(6)) == pytest.approx(6)
    assert effective_rank(torch.tensor([5.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def test_exactly_one_of_gram_and_rows():
    with pytest.raises(ValueError, match="exactly one"):
        best_low_rank(torch.ones(3, 4), 1)


def test_zero_residual_gives_zero_correction():
    x, _ = problem(12, 9, tokens=50)
    found = best_low_rank(torch.zeros(9, 12), 2, gram=x.T @ x)
    assert torch.equal(found.lr_a, torch.zeros(12, 2)) and found.residual == 0
