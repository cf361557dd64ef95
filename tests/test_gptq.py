"""GPTQ's rounding: against the textbook loop, against rounding to nearest, and on bad Grams."""

import pytest
import torch
from masquant_kernels.quantizers import QWeight, dequantize_weight, quantize_weight

from masquant_cli.algo import curvature, gptq
from masquant_cli.algo.curvature import of_gram
from masquant_cli.algo.gptq import gptq_round, gptq_round_naive


def problem(n_out: int, n_in: int, *, tokens: int = 400, mixing: float = 1.0, seed: int = 0):
    """Weights and inputs whose channels share `mixing` times as much as they have of their own."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, max(2, n_in // 8), generator=g)
    x = torch.randn(tokens, n_in, generator=g)
    x += mixing * shared @ torch.randn(shared.shape[1], n_in, generator=g)
    x *= torch.exp(0.5 * torch.randn(n_in, generator=g))
    return torch.randn(n_out, n_in, generator=g), x


def row_errors(x, w, qw: QWeight) -> torch.Tensor:
    """||X (w_o - q_o)||^2 for each output row o, f64 [out]."""
    return (x.double() @ (w - dequantize_weight(qw)).double().T).square().sum(0)


def same(a: QWeight, b: QWeight) -> bool:
    zeros = a.zero is b.zero is None or torch.equal(a.zero, b.zero)
    return torch.equal(a.q, b.q) and torch.equal(a.scale, b.scale) and zeros


def in_range(qw: QWeight, bits: int) -> bool:
    high = 2 ** (bits - 1) - 1
    low = -high if qw.zero is None else -high - 1
    return qw.q.dtype == torch.int8 and int(qw.q.min()) >= low and int(qw.q.max()) <= high


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    "n_out, n_in, bits, group, symmetric",
    [
        (5, 1, 4, None, True),
        (1, 37, 4, None, True),
        (13, 129, 3, None, True),  # one channel more than a block
        (9, 260, 4, 20, True),  # groups that end inside blocks
        (7, 66, 8, 11, True),
        (11, 135, 4, 27, False),
        (6, 50, 4, None, False),
    ],
)
def test_equals_the_textbook_loop_value_by_value(n_out, n_in, bits, group, symmetric, act_order):
    w, x = problem(n_out, n_in)
    args = (w, x.T @ x, bits, group, symmetric)
    found = gptq_round(*args, act_order=act_order)
    assert same(found, gptq_round_naive(*args, act_order=act_order))
    nearest = quantize_weight(w, bits, group, symmetric)
    assert same(found._replace(q=nearest.q), nearest)  # scale and zero are the stored format's
    assert in_range(found, bits)
    if n_in > 1:
        assert not torch.equal(found.q, nearest.q)


def test_two_channels_by_hand():
    # Both weights sit 0.4 of a step above an integer and the inputs are equal: 3.4 -> 3 leaves
    # 0.4 for the other channel, whose 7.0 can not grow and whose 1.4 becomes 1.8 -> 2.
    x = torch.tensor([[1.0, 1.0, 0.0]])
    w = torch.tensor([[3.4, 1.4, 7.0]])
    found = gptq_round(w, x.T @ x, 4, damp=1e-4)
    assert found.q.tolist() == [[3, 2, 7]]
    assert quantize_weight(w, 4).q.tolist() == [[3, 1, 7]]


@pytest.mark.parametrize("bits, group, symmetric", [(4, None, True), (4, 16, False), (8, 8, True)])
@pytest.mark.parametrize("mixing, left", [(0.0, 1.0), (0.5, 0.9), (3.0, 0.5), (30.0, 0.4)])
def test_no_output_row_is_worse_than_nearest_and_correlation_makes_it_much_better(
    mixing, left, bits, group, symmetric
):
    w, x = problem(40, 96, mixing=mixing)
    found = row_errors(x, w, gptq_round(w, x.T @ x, bits, group, symmetric))
    nearest = row_errors(x, w, quantize_weight(w, bits, group, symmetric))
    assert bool((found <= nearest * (1 + 1e-5)).all())  # the Gram is fp32
    assert float(found.sum() / nearest.sum()) < left


def paper_gptq(w, gram, damp=0.01) -> QWeight:
    """GPTQ's Algorithm 1 by the factor of the inverse: left to right, 4 bits, no groups."""
    nearest = quantize_weight(w, 4)
    h = gram.double() + damp * gram.double().diagonal().mean() * torch.eye(len(gram))
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, q, scale = w.double(), nearest.q.clone(), nearest.scale[:, 0]
    for j in range(w.shape[1]):
        q[:, j] = (w[:, j] / scale).round().clamp(-7, 7)
        w[:, j:] -= ((w[:, j] - q[:, j] * scale) / u[j, j])[:, None] * u[j, j:]
    return nearest._replace(q=q)


@pytest.mark.parametrize("n_in, mixing", [(12, 0.3), (12, 3.0), (24, 1.0)])
def test_rows_that_the_greedy_choice_makes_worse_stay_nearest(n_in, mixing):
    w, x = problem(200, n_in, mixing=mixing)
    plain, nearest = paper_gptq(w, x.T @ x), quantize_weight(w, 4)
    worse = row_errors(x, w, plain) > row_errors(x, w, nearest) * (1 + 1e-5)
    assert 3 <= int(worse.sum()) <= 30  # the plain algorithm does make some rows worse
    found = gptq_round(w, x.T @ x, 4, act_order=False)
    assert torch.equal(found.q[worse], nearest.q[worse])
    assert torch.equal(found.q[~worse], plain.q[~worse])


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_diagonal_gram_gives_nearest_rounding(symmetric):
    w, _ = problem(6, 140)
    w[0, :4] = torch.tensor([0.5, 1.5, -2.5, 7.0])  # ties, on a step of one
    gram = torch.diag(torch.rand(140, generator=torch.Generator().manual_seed(1)) * 1e6)
    for act_order in (True, False):
        found = gptq_round(w, gram, 4, 20, symmetric, act_order=act_order)
        assert same(found, quantize_weight(w, 4, 20, symmetric))
    assert same(gptq_round(w, torch.zeros(140, 140), 4, 20, symmetric), found)


def test_dead_channels_round_to_nearest_and_leave_the_rest_alone():
    w, x = problem(8, 40, mixing=3.0)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[0, 7, 39]] = True
    x[:, dead] = 0
    gram = x.T @ x
    found = gptq_round(w, gram, 4)
    assert torch.equal(found.q[:, dead], quantize_weight(w, 4).q[:, dead])
    gram[0, 5] = gram[5, 0] = gram[5, 5]  # what a positive semidefinite Gram can not have
    assert torch.equal(gptq_round(w, gram, 4).q, found.q)


def test_fewer_tokens_than_channels():
    w, x = problem(30, 150, tokens=9)
    found = row_errors(x, w, gptq_round(w, x.T @ x, 4))
    assert float(found.sum() / row_errors(x, w, quantize_weight(w, 4)).sum()) < 0.1


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("n_out, n_in, tokens", [(9, 130, 40), (7, 300, 9), (5, 257, 1)])
def test_few_rows_round_as_their_gram_does(n_out, n_in, tokens, act_order):
    w, x = problem(n_out, n_in, tokens=tokens, mixing=3.0)
    x[:, 5] = 0
    wide = gptq_round(w, None, 4, None, False, rows=x, act_order=act_order)
    dense = gptq_round(w, x.double().T @ x.double(), 4, None, False, act_order=act_order)
    assert same(wide, dense)
    nearest = quantize_weight(w, 4, None, False)
    assert not torch.equal(wide.q, nearest.q)
    assert bool((row_errors(x, w, wide) <= row_errors(x, w, nearest) * (1 + 1e-5)).all())


def test_many_rows_are_their_gram_and_no_rows_round_to_nearest():
    w, x = problem(6, 30)
    assert same(gptq_round(w, None, 4, rows=x), gptq_round(w, x.T @ x, 4))
    assert same(gptq_round(w, None, 4, rows=x[:0]), quantize_weight(w, 4))
    with pytest.raises(ValueError, match="rows have values that are not finite"):
        gptq_round(w, None, 4, rows=x[:2] / 0)
    for rows in (None, x[:, :29], x[0]):
        with pytest.raises(ValueError, match=r"rows of 30 inputs are \[n, 30\]"):
            gptq_round(w, None, 4, rows=rows)


@pytest.mark.parametrize("few_rows", [True, False])
def test_wide_weights_in_fp32_and_in_chunks_err_as_little(few_rows, monkeypatch):
    w, x = problem(33, 520, tokens=90 if few_rows else 1200, mixing=2.0)
    gram = None if few_rows else x.T @ x
    exact = {"rows": x} if few_rows else {}
    single = gptq_round(w, gram, 4, 20, **exact)
    monkeypatch.setattr(gptq, "CHUNK", {"cpu": 520 * 8})
    monkeypatch.setattr(gptq, "FEWEST", 1)
    monkeypatch.setattr(curvature, "PRECISE", 1)
    chunked = gptq_round(w, gram, 4, 20, **exact)
    if few_rows:
        assert same(single, chunked)  # outputs do not see each other
    monkeypatch.setattr(gptq, "PRECISE", 1 << 20)
    double = gptq_round(w, gram, 4, 20, **exact)
    assert single.q.shape == (33, 520) and not same(single, quantize_weight(w, 4, 20))
    for found in (single, chunked):
        ratio = float(row_errors(x, w, found).sum() / row_errors(x, w, double).sum())
        assert 0.9 < ratio < 1.1


def test_an_indefinite_gram_is_damped_until_it_factors():
    w, x = problem(20, 48, mixing=30.0)
    gram = x.T @ x
    values, vectors = torch.linalg.eigh(gram)
    values[:10] = -0.05 * values.mean()  # far beyond rounding, and beyond damp * mean
    broken = (vectors * values) @ vectors.T
    hessian = (broken.double() + broken.double().T) / 2
    seen = of_gram(broken, 0.01, True, torch.float64)
    mean = float(hessian.diagonal().mean())
    assert seen.added == pytest.approx(0.1 * mean)  # raised tenfold, once
    lower = seen.factor * seen.size
    expected = (hessian + seen.added * torch.eye(48, dtype=torch.float64))[seen.order]
    expected = expected[:, seen.order]
    assert torch.allclose(lower @ lower.T, expected, rtol=0, atol=1e-9 * mean)
    assert torch.equal(lower, lower.tril())
    found = gptq_round(w, broken, 4)
    assert same(found, gptq_round_naive(w, broken, 4)) and in_range(found, 4)
    assert row_errors(x, w, found).sum() < row_errors(x, w, quantize_weight(w, 4)).sum()


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_only_the_shape_of_the_gram_counts(unit):
    w, x = problem(9, 70)
    gram = (x.T @ x).double()
    found = gptq_round(w, gram, 4, 10)
    assert torch.equal(found.q, gptq_round(w, gram * unit, 4, 10).q)
    lopsided = 2 * gram.triu(1) + gram.diag().diag()  # its symmetric part is the Gram
    assert torch.equal(found.q, gptq_round(w, lopsided, 4, 10).q)


def test_half_precision_weights_round_as_their_fp32_values():
    w, x = problem(5, 33)
    w = w.bfloat16()
    assert same(gptq_round(w, x.T @ x, 4), gptq_round(w.float(), x.T @ x, 4))


def test_channel_order_is_free_with_act_order_and_rows_do_not_see_each_other():
    w, x = problem(12, 150)
    gram, found = x.T @ x, gptq_round(w, x.T @ x, 4)
    p = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    moved = gptq_round(w[:, p], gram[p][:, p], 4)
    assert torch.equal(moved.q, found.q[:, p]) and torch.equal(moved.scale, found.scale)
    left_to_right = gptq_round(w, gram, 4, act_order=False)
    assert not torch.equal(left_to_right.q, found.q)
    assert torch.equal(gptq_round(w[3:7], gram, 4).q, found.q[3:7])
    assert torch.equal(gptq_round(w.flip(0), gram, 4).q, found.q.flip(0))


def test_the_same_again_and_nothing_is_changed_in_place():
    w, x = problem(12, 150)
    gram = (x.T @ x).double()
    before = w.clone(), gram.clone()
    assert same(gptq_round(w, gram, 4, 30, False), gptq_round(w, gram, 4, 30, False))
    gptq_round_naive(w, gram, 4, 30, False)
    assert torch.equal(w, before[0]) and torch.equal(gram, before[1])


@pytest.mark.parametrize("rounding", [gptq_round, gptq_round_naive])
def test_what_can_not_be_rounded_is_refused(rounding):
    w, x = problem(4, 12)
    gram = x.T @ x

    def spoiled(tensor, value):
        tensor = tensor.clone()
        tensor[1, 2] = value
        return tensor

    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="gram has values that are not finite"):
            rounding(w, spoiled(gram, value), 4)
        with pytest.raises(ValueError, match="weight has values that are not finite"):
            rounding(spoiled(w, value), gram, 4)
    for shape in ((11, 11), (12, 11), (12,), (4, 4)):
        with pytest.raises(ValueError, match=r"gram of 12 inputs is \[12, 12\]"):
            rounding(w, torch.ones(shape), 4)
    with pytest.raises(ValueError, match="group size 5"):
        rounding(w, gram, 4, 5)
    with pytest.raises(ValueError, match="asymmetric weights are 4 bits"):
        rounding(w, gram, 8, None, False)
    with pytest.raises(ValueError, match="bits must be"):
        rounding(w, gram, 9)
    for damp in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damp must be above 0"):
            rounding(w, gram, 4, damp=damp)
