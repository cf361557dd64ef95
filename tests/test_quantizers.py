import math

import pytest
import torch
from masquant_kernels import (
    QWeight,
    dequantize_weight,
    pack_int4,
    packed_columns,
    qmax,
    quantize_rows,
    quantize_weight,
    unpack_int4,
)


def weight(out: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def half_even(value: float) -> int:
    """Rounding without torch: Python's round() is half to even."""
    return round(value)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "columns", "group"), [(3, 96, None), (5, 200, 8), (1, 256, 128)])
def test_symmetric_weights_follow_the_formula_element_by_element(bits, out, columns, group):
    w = weight(out, columns)
    q, scale, zero = quantize_weight(w, bits, group)
    size, limit = group or columns, 2 ** (bits - 1) - 1
    assert zero is None
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert scale.shape == (out, columns // size)
    for o in range(out):
        for g in range(columns // size):
            values = w[o, g * size : (g + 1) * size]
            expected = torch.tensor(max(abs(v) for v in values.tolist())) / limit
            assert scale[o, g] == expected
            integers = [half_even(float(v / expected)) for v in values]
            assert q[o, g * size : (g + 1) * size].tolist() == integers
    assert q.abs().max() == limit  # the whole range is used, and -8 or -128 never


@pytest.mark.parametrize("group", [None, 8, 40])
def test_asymmetric_weights(group):
    w = weight(5, 200).abs() + 0.1  # one-sided: a symmetric grid would waste half its levels
    qw = quantize_weight(w, 4, group, symmetric=False)
    assert qw.zero.dtype == torch.int8
    assert qw.q.min() >= -8
    assert qw.q.max() == 7
    size = group or 200
    step = qw.scale.repeat_interleave(size, 1)
    assert ((dequantize_weight(qw) - w).abs() <= 0.5001 * step).all()
    one_sided = (dequantize_weight(qw) - w).square().mean()
    symmetric = (dequantize_weight(quantize_weight(w, 4, group)) - w).square().mean()
    assert one_sided < 0.5 * symmetric
    # Exactly representable values come back exactly: zero is on the grid.
    w[0] = 0
    assert (dequantize_weight(quantize_weight(w, 4, group, symmetric=False))[0] == 0).all()


def test_dequantize_subtracts_zero_before_scaling():
    qw = QWeight(
        torch.tensor([[1, -8, 7, 0]], dtype=torch.int8),
        torch.tensor([[2.0, 0.5]]),
        torch.tensor([[-1, 3]], dtype=torch.int8),
    )
    assert dequantize_weight(qw).tolist() == [[4.0, -14.0, 2.0, -1.5]]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_rows_follow_the_formula(bits):
    x = weight(17, 96, seed=1).reshape(1, 17, 96) * torch.logspace(-3, 3, 17)[:, None]
    q, scale = quantize_rows(x, bits)
    limit = 2 ** (bits - 1) - 1
    assert qmax(bits) == limit
    assert scale.shape == (1, 17, 1)
    for t in range(17):
        row = x[0, t].tolist()
        assert float(scale[0, t]) == pytest.approx(max(map(abs, row)) / limit, rel=1e-6)
        expected = [half_even(v / float(scale[0, t])) for v in row]
        wrong = [abs(a - b) for a, b in zip(q[0, t].tolist(), expected, strict=True) if a != b]
        assert len(wrong) <= 1  # fp32 against fp64 at a tie
        assert all(d == 1 for d in wrong)
    assert q.abs().max() == limit


def test_ties_go_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize_rows(x, 8)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]
    assert quantize_weight(x, 8).q.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_low_precision_inputs_are_computed_in_fp32():
    x = weight(3, 96).bfloat16()
    for got, want in zip(quantize_rows(x, 8), quantize_rows(x.float(), 8), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


def test_zero_rows_stay_zero():
    q, scale = quantize_rows(torch.zeros(2, 8), 8)
    assert (q == 0).all()
    assert (scale > 0).all()
    assert (dequantize_weight(quantize_weight(torch.zeros(2, 8), 4)) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_activations_that_are_not_finite_show_and_weights_are_refused(bad):
    x = weight(3, 96)
    x[1, 5] = bad
    q, scale = quantize_rows(x, 8)
    finite = torch.isfinite((q * scale).sum(-1))
    assert finite.tolist() == [True, False, True]
    with pytest.raises(ValueError, match="not finite"):
        quantize_weight(x, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 128}, "group size 128 does not divide 96"),
        ({"bits": 9}, "between 2 and 8"),
        ({"bits": 8, "symmetric": False}, "4 bits"),
    ],
)
def test_impossible_requests_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(weight(2, 96), **{"bits": 4, **arguments})


@pytest.mark.parametrize(("out", "columns"), [(1, 1), (3, 96), (2, 128), (5, 200), (2, 321)])
def test_packing_against_a_literal_loop(out, columns):
    generator = torch.Generator().manual_seed(columns)
    q = torch.randint(-8, 8, (out, columns), dtype=torch.int8, generator=generator)
    expected = [[0] * packed_columns(columns) for _ in range(out)]
    for o in range(out):
        for i in range(columns):
            shift = 4 if i % 128 >= 64 else 0
            expected[o][i // 128 * 64 + i % 64] |= (int(q[o, i]) & 0xF) << shift
    packed = pack_int4(q)
    assert packed.dtype == torch.int8
    assert packed.shape == (out, -(-columns // 128) * 64)
    assert packed.view(torch.uint8).tolist() == expected
    assert torch.equal(unpack_int4(packed, columns), q)


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\[-8, 7\]"):
        pack_int4(torch.full((1, 4), 8, dtype=torch.int8))
    with pytest.raises(ValueError, match="int8"):
        pack_int4(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="128 inputs pack into"):
        unpack_int4(torch.zeros(1, 128, dtype=torch.int8), 128)
