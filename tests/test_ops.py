"""The ops as torch sees them: schemas, shapes, tracing, errors, and the choice of a backend."""

import os
import subprocess
import sys

import pytest
import torch
from masquant_kernels import dispatch, ops, pack_int4, quantize_weight

T, K, N, M, R = 5, 200, 48, 3, 4
F32 = torch.float32


def arguments(tokens: int = T) -> dict[str, tuple]:
    """One valid call of every op."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, K, generator=g)
    smooth_inv = torch.rand(M, K, generator=g) + 0.5
    modality = torch.arange(tokens, dtype=torch.int32) % M
    lr_a, lr_b = torch.randn(M - 1, K, R).half(), torch.randn(M - 1, R, N).half()
    q, scale = ops.smooth_quant(x, smooth_inv, modality, 8)
    h = ops.lowrank_down(x, smooth_inv, modality, lr_a)
    w4, w8 = (quantize_weight(torch.randn(N, K, generator=g), bits) for bits in (4, 8))
    end = (torch.randn(N), h, lr_b, modality, F32)
    return {
        "smooth_quant": (x, smooth_inv, modality, 8, torch.rand(K), 1e-6, None),
        "add_smooth_quant": (x, x.flip(0), smooth_inv, modality, 6, torch.rand(K), 1e-6),
        "lowrank_down": (x, smooth_inv, modality, lr_a, None, 0.0, x.flip(1)),
        "gemm_w4a8": (q, scale, pack_int4(w4.q), w4.scale, None, 0, *end),
        "gemm_w8a8": (q, scale, w8.q, w8.scale, 0, *end),
        "gemm_w4a16": (x, pack_int4(w4.q), w4.scale, None, 0, *end),
        "gemm_decode": (q, scale, pack_int4(w4.q), w4.scale, None, 0, None, 4, F32),
    }


def tensors_of(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_torch_accepts_the_op(name):
    torch.library.opcheck(getattr(torch.ops.masquant, name).default, arguments()[name])


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_a_traced_call_is_the_eager_call(name):
    given = arguments()[name]
    entry = getattr(ops, name)
    traced = torch.compile(lambda *a: entry(*a), fullgraph=True, backend="aot_eager")
    for got, want in zip(tensors_of(traced(*given)), tensors_of(entry(*given)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_no_tokens_give_no_rows(name):
    given = arguments()[name]
    empty = [a[:0] if isinstance(a, torch.Tensor) and len(a) == T else a for a in given]
    for got, like in zip(
        tensors_of(getattr(ops, name)(*empty)), tensors_of(getattr(ops, name)(*given)), strict=True
    ):
        assert (got.shape, got.dtype) == ((0, *like.shape[1:]), like.dtype)


# op, position of an argument, what it becomes, what the error must say
BAD = [
    ("smooth_quant", 0, lambda x: x.double(), r"x must be float .* float64"),
    ("smooth_quant", 0, lambda x: x[0], r"x must be float \[T, K\], got float32 \[200\]"),
    ("smooth_quant", 0, lambda x: x.T.contiguous().T, "contiguous in its last dimension"),
    ("smooth_quant", 1, lambda s: s[:, :-1], r"smooth_inv must be .* \[M, 200\]"),
    ("smooth_quant", 1, lambda s: s.half(), "smooth_inv must be contiguous float32"),
    ("smooth_quant", 2, lambda m: m.long(), "modality must be contiguous int32"),
    ("smooth_quant", 2, lambda m: m[:-1], r"int32 \[5\]"),
    ("smooth_quant", 2, lambda m: m + 1, r"0\.\.2, got 1\.\.3"),
    ("smooth_quant", 2, lambda m: m - 1, r"0\.\.2, got -1\.\.1"),
    ("smooth_quant", 3, lambda _: 5, "bits must be 4, 6 or 8, got 5"),
    ("smooth_quant", 4, lambda w: w[:3], r"norm_weight must be float \[200\]"),
    ("smooth_quant", 6, lambda _: torch.ones(T, K), "cannot be given together"),
    ("add_smooth_quant", 1, lambda r: r.half(), "residual is float16"),
    ("lowrank_down", 2, lambda _: None, "modality"),
    ("lowrank_down", 3, lambda a: a.float(), "lr_a must be float16"),
    ("lowrank_down", 3, lambda a: a[:1], r"lr_a must be float16 \[2, 200, R\]"),
    ("gemm_w4a8", 0, lambda q: q[:, :-1], "q must be contiguous int8"),
    ("gemm_w4a8", 0, lambda q: q.int(), "q must be contiguous int8"),
    ("gemm_w4a8", 1, lambda s: s[:, None], r"scale must be float32 \[5\]"),
    ("gemm_w4a8", 2, lambda w: w[:, :64].contiguous(), "256 inputs do not meet 4-bit"),
    ("gemm_w4a8", 2, lambda w: w.T, "weight_packed must be contiguous int8"),
    ("gemm_w4a8", 3, lambda s: s[:-1], "weight_scale .* does not fit"),
    ("gemm_w4a8", 4, lambda _: torch.zeros(N, 1), "weight_zero_point must be int8"),
    ("gemm_w4a8", 5, lambda _: 64, "group_size 64"),
    ("gemm_w4a8", 5, lambda _: -8, "group_size -8"),
    ("gemm_w4a8", 6, lambda b: b[:-1], r"bias must be float \[48\]"),
    ("gemm_w4a8", 7, lambda h: h[:, :-1].contiguous(), r"h must be .*\[5, 8\]"),
    ("gemm_w4a8", 8, lambda b: b.float(), "lr_b must be contiguous float16"),
    ("gemm_w4a8", 8, lambda _: None, "h needs lr_b and modality"),
    ("gemm_w4a8", 9, lambda _: None, "h needs lr_b and modality"),
    ("gemm_w4a8", 10, lambda _: torch.int8, "the output is float32, bfloat16 or float16"),
    ("gemm_w8a8", 2, lambda w: w[:, :100].contiguous(), "256 inputs do not meet 8-bit"),
    ("gemm_w4a16", 0, lambda u: u.double(), "u must be float"),
    ("gemm_decode", 0, lambda q: q.repeat(4, 1), "at most 16 tokens"),
    ("gemm_decode", 7, lambda _: 6, "weight_bits must be 4 or 8"),
]


@pytest.mark.parametrize(("name", "index", "change", "message"), BAD)
@pytest.mark.parametrize("way", ["eager", "op"])
def test_what_does_not_fit_is_an_error(name, index, change, message, way):
    given = list(arguments()[name])
    given[index] = change(given[index])
    function = getattr(ops, name) if way == "eager" else getattr(torch.ops.masquant, name)
    with pytest.raises((ValueError, RuntimeError), match=message):
        function(*given)


def test_sums_beyond_fp32_are_exact():
    """127 * 127 * 18944 is 18 times what fp32 counts exactly."""
    q = torch.full((1, 18944), 127, dtype=torch.int8)
    w = torch.full((2, 18944), 127, dtype=torch.int8)
    w[1, 0] = 126
    one = torch.ones(2, 1)
    with dispatch.force("reference"):
        y = ops.gemm_w8a8(q, one[0], w, one, 0, None, None, None, None, F32)
    exact = torch.tensor([127 * 127 * 18944, 127 * 127 * 18944 - 127])
    assert torch.equal(y[0], exact.float())


def test_forcing_a_backend_ends_with_its_block():
    before = dispatch.backend_of("gemm_w4a8", "cpu")
    with dispatch.force("reference"):
        assert dispatch.backend_of("gemm_w4a8", "cpu") == "reference"
    assert dispatch.backend_of("gemm_w4a8", "cpu") == before
    with dispatch.force("fastest"), pytest.raises(ValueError, match=r"is one of .*'fastest'"):
        ops.smooth_quant(*arguments()["smooth_quant"])


def test_the_environment_can_force_a_backend():
    code = "from masquant_kernels import dispatch; print(dispatch.backend_of('gemm_w4a8', 'cpu'))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "MASQUANT_BACKEND": "reference",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "reference"
