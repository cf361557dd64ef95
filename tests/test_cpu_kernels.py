"""The C kernels (and oneDNN) against the reference: every case, odd shapes, poisoned outputs."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from masquant_kernels import dispatch, ops, pack_int4, quantize_weight

cpu = pytest.importorskip("masquant_kernels.cpu", reason="needs x86-64 with AVX2 and a C compiler")
from masquant_kernels.cpu import build  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = {F32: 2e-6, BF16: 8e-3, F16: 1e-3}  # relative: sums in another order, one rounding
M = 3


@pytest.fixture(scope="session")
def modelled(tmp_path_factory):
    """The library with its AVX-512 loops on a model of the instructions, for want of them."""
    folder = tmp_path_factory.mktemp("avx512")
    model = Path(__file__).with_name("avx512_model.h")
    objects = build.compile_objects(
        build.compiler(), str(folder), ("-Wno-psabi", "-include", str(model)), ("-DALWAYS_VNNI",)
    )
    library = folder / "modelled.so"
    subprocess.run([build.compiler(), "-shared", *objects, "-o", library], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(params=["avx2", "avx512-vnni"], autouse=True)
def instruction_set(request):
    """Every test runs with both tables of inner loops, wherever it runs."""
    real = cpu.choose(avx2=request.param == "avx2") == request.param
    if not real:
        cpu.bind(request.getfixturevalue("modelled"))
        assert cpu.choose() == request.param
    yield
    if not real:
        cpu.bind(build.load())
    cpu.choose()


def random(seed: int = 0):
    return torch.Generator().manual_seed(seed)


def site(tokens: int, columns: int, dtype=F32, layout: str = "mixed", seed: int = 0):
    """x with a few loud channels, inverse scales, modalities."""
    g = random(seed)
    x = torch.randn(tokens, columns, generator=g) * (
        1 + 20 * (torch.rand(columns, generator=g) < 0.02)
    )
    ids = {
        "text": torch.zeros(tokens),
        "vision": torch.ones(tokens),
        "mixed": torch.randint(0, M, (tokens,), generator=g),
        "spans": torch.arange(tokens) * M // max(tokens, 1),
    }[layout]
    return x.to(dtype), torch.rand(M, columns, generator=g) + 0.5, ids.to(torch.int32)


def both(function, *args, poison=None):
    """(C kernels, reference) of one op."""
    results = []
    for backend in ("cpu", "reference"):
        with dispatch.force(backend):
            results.append(function(*args))
    return results


def relative(got, want) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


FRONTS = {
    "plain": {},
    "norm": {"norm_weight": torch.rand(5000, generator=random(7)) + 0.5, "eps": 1e-6},
    "silu": {"up": True},
}
SHAPES = [(1, 96), (3, 200), (17, 131), (257, 384)]


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("tokens", "columns"), SHAPES)
def test_smooth_quant(front, dtype, tokens, columns):
    x, inv, ids = site(tokens, columns, dtype)
    options = dict(FRONTS[front])
    if front == "norm":
        options["norm_weight"] = options["norm_weight"][:columns].to(dtype)
    if front == "silu":
        options["up"] = torch.randn(tokens, 2 * columns, generator=random(3)).to(dtype)[:, columns:]
    for bits in (8, 6, 4):
        for modality in (None, ids):
            (q, scale), (q0, scale0) = both(
                lambda *a: ops.smooth_quant(*a, **options), x, inv, modality, bits
            )
            assert q.shape == q0.shape
            assert relative(scale, scale0) < 1e-6
            wrong = (q.int() - q0.int()).abs()
            if front == "plain":
                assert not wrong.any()
            else:  # a last bit of the norm or of exp may move a tie
                assert wrong.max() <= 1
                assert (wrong > 0).float().mean() < 1e-3
            assert not q[:, columns:].any()


def test_add_smooth_quant_keeps_the_sum_in_its_dtype():
    for dtype in (F32, BF16, F16):
        x, inv, ids = site(9, 200, dtype)
        residual = torch.randn(9, 300, generator=random(5)).to(dtype)[:, 50:250]
        norm = torch.ones(200)
        got, want = both(ops.add_smooth_quant, x, residual, inv, ids, 8, norm, 1e-5)
        assert torch.equal(got[2], want[2])
        assert (got[0].int() - want[0].int()).abs().max() <= 1
        assert relative(got[1], want[1]) < 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_is_nan_and_alone(value):
    x, inv, ids = site(12, 200)
    x[5, 199] = value
    q, scale = both(ops.smooth_quant, x, inv, ids, 8)[0]
    assert scale.isnan().nonzero().flatten().tolist() == [5]
    assert not q[5].any()
    weight = quantize_weight(torch.randn(40, 200, generator=random()), 4)
    y = gemm(weight, 4, 0, q, scale, dtype=F32)
    assert y.isnan().all(1).nonzero().flatten().tolist() == [5]
    assert torch.isfinite(y[torch.arange(12) != 5]).all()


def test_zero_tokens_stay_zero():
    x, inv, ids = site(9, 200)
    x[4] = 0
    q, scale = both(ops.smooth_quant, x, inv, ids, 8)[0]
    assert not q[4].any()
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("layout", ["vision", "mixed", "spans"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("tokens", "columns", "rank"), [(1, 96, 3), (7, 200, 17), (300, 1100, 51)])
def test_lowrank_down(layout, dtype, tokens, columns, rank):
    x, inv, ids = site(tokens, columns, dtype, layout)
    lr_a = (torch.randn(M - 1, columns, rank, generator=random(2)) * 0.05).half()
    got, want = both(ops.lowrank_down, x, inv, ids, lr_a)
    assert relative(got, want) < (2e-3 if dtype == F32 else 6e-3)
    others = torch.ones_like(want, dtype=torch.bool)
    for m in range(1, M):
        others[ids == m, (m - 1) * rank : m * rank] = False
    assert not got[others].any()  # written, and zero


def gemm(weight, bits, group, q, scale, bias=None, h=None, lr_b=None, ids=None, dtype=F32):
    if bits == 4:
        packed = pack_int4(weight.q)
        given = (packed, weight.scale, weight.zero, group)
        return ops.gemm_w4a8(q, scale, *given, bias, h, lr_b, ids, dtype)
    return ops.gemm_w8a8(q, scale, weight.q, weight.scale, group, bias, h, lr_b, ids, dtype)


WEIGHTS = {  # bits, group size as a share of K (0: per channel), symmetric
    "w4": (4, 0, True),
    "w8": (8, 0, True),
    "w4 zero": (4, 0, False),
    "w4 g32": (4, 32, True),
    "w4 g64 zero": (4, 64, False),
    "w8 g128": (8, 128, True),
    "w4 g8 (left to the reference)": (4, 8, True),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    ("tokens", "columns", "out"), [(1, 384, 49), (2, 640, 33), (17, 384, 70), (260, 2176, 45)]
)
def test_gemm(name, tokens, columns, out):
    bits, group, symmetric = WEIGHTS[name]
    weight = quantize_weight(
        torch.randn(out, columns, generator=random()), bits, group or None, symmetric
    )
    for dtype in (F32, BF16, F16):
        x, inv, ids = site(tokens, columns, dtype)
        with dispatch.force("reference"):
            q, scale = ops.smooth_quant(x, inv, ids, 8)
        bias = torch.randn(out, generator=random(9)).to(dtype)
        got, want = both(gemm, weight, bits, group, q, scale, bias, None, None, None, dtype)
        assert got.dtype == dtype
        assert relative(got, want) < EPS[dtype]
        if not group and symmetric:  # exact integers: the same bits
            assert torch.equal(got, want)


@pytest.mark.parametrize("columns", [100, 200, 1000])
@pytest.mark.parametrize("bits", [4, 8])
def test_gemm_of_inputs_that_fill_no_block(columns, bits):
    weight = quantize_weight(torch.randn(37, columns, generator=random()), bits)
    for tokens in (1, 11):
        x, inv, ids = site(tokens, columns)
        q, scale = ops.smooth_quant(x, inv, ids, 8)
        got, want = both(gemm, weight, bits, 0, q, scale)
        assert torch.equal(got, want)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 8, 13])
def test_the_largest_sums_do_not_overflow(bits, tokens):
    """16-bit partial sums must be widened in time whatever the values are."""
    limit = 7 if bits == 4 else 127
    columns = 4224
    for seed, low in ((0, limit), (1, -limit), (2, -limit - 1)):
        w = torch.full((9, columns), limit, dtype=torch.int8)
        w[1:] = torch.randint(low, limit + 1, (8, columns), generator=random(seed))
        if bits == 4:
            w[2] = -8
        q = torch.full((tokens, columns), 127, dtype=torch.int8)
        q[1::2] = -127
        q[2::3] = torch.randint(-127, 128, (columns,), generator=random(seed), dtype=torch.int8)
        one = torch.ones(9, 1)
        given = (q, torch.ones(tokens), pack_int4(w) if bits == 4 else w, one)
        rest = (0, None, None, None, None, F32)
        with dispatch.force("cpu"):
            y = ops.gemm_w4a8(*given, None, *rest) if bits == 4 else ops.gemm_w8a8(*given, *rest)
        assert torch.equal(y, (q.long() @ w.long().T).float())


@pytest.mark.parametrize("layout", ["vision", "mixed", "spans"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("tokens", "rank"), [(1, 3), (9, 70), (300, 17), (1030, 5)])
def test_gemm_with_low_rank(layout, bits, tokens, rank):
    columns, out = 256, 75
    weight = quantize_weight(torch.randn(out, columns, generator=random()), bits)
    x, inv, ids = site(tokens, columns, F32, layout)
    lr_a = (torch.randn(M - 1, columns, rank, generator=random(2)) * 0.1).half()
    lr_b = (torch.randn(M - 1, rank, out, generator=random(3)) * 0.1).half()

    def run():
        q, scale = ops.smooth_quant(x, inv, ids, 8)
        h = ops.lowrank_down(x, inv, ids, lr_a)
        return gemm(weight, bits, 0, q, scale, None, h, lr_b, ids)

    got, want = both(run)
    assert relative(got, want) < 5e-4
    base = ids == 0
    assert torch.equal(got[base], want[base])  # text pays nothing and changes nothing


def test_factors_of_absent_modalities_are_not_read():
    x, inv, _ = site(20, 256)
    ids = torch.ones(20, dtype=torch.int32)
    lr_a = torch.randn(M - 1, 256, 4, generator=random()).half()
    lr_b = torch.randn(M - 1, 4, 40, generator=random()).half()
    lr_a[1], lr_b[1], inv[2] = torch.nan, torch.nan, torch.nan
    weight = quantize_weight(torch.randn(40, 256, generator=random()), 4)
    with dispatch.force("cpu"):
        q, scale = ops.smooth_quant(x, inv, ids, 8)
        h = ops.lowrank_down(x, inv, ids, lr_a)
        y = gemm(weight, 4, 0, q, scale, None, h, lr_b, ids)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("swap", ["smooth_inv", "lr_a", "lr_b", "modality"])
def test_swapped_modalities_are_caught(swap):
    """The comparisons above would be worthless if they passed with the wrong modality's numbers."""
    x, inv, ids = site(40, 256)
    parts = {
        "smooth_inv": inv,
        "lr_a": (torch.randn(M - 1, 256, 9, generator=random(2)) * 0.1).half(),
        "lr_b": (torch.randn(M - 1, 9, 33, generator=random(3)) * 0.1).half(),
        "modality": ids,
    }
    weight = quantize_weight(torch.randn(33, 256, generator=random()), 4)

    def run(smooth_inv, lr_a, lr_b, modality):
        q, scale = ops.smooth_quant(x, smooth_inv, modality, 8)
        h = ops.lowrank_down(x, smooth_inv, modality, lr_a)
        return gemm(weight, 4, 0, q, scale, None, h, lr_b, modality)

    with dispatch.force("reference"):
        want = run(**parts)
    wrong = dict(parts)
    if swap == "modality":
        wrong[swap] = torch.where(ids > 0, M - ids, ids)
    else:
        wrong[swap] = parts[swap].clone()
        wrong[swap][-2:] = parts[swap][-2:].flip(0)
    with dispatch.force("cpu"):
        assert relative(run(**parts), want) < 5e-4
        assert relative(run(**wrong), want) > 1e-2


@pytest.mark.parametrize("group", [0, 40, 128])
@pytest.mark.parametrize("tokens", [1, 5, 140])
def test_gemm_w4a16(group, tokens):
    columns, out = 640, 45
    weight = quantize_weight(
        torch.randn(out, columns, generator=random()), 4, group or None, symmetric=False
    )
    for dtype in (F32, BF16, F16):
        u = torch.randn(tokens, columns + 8, generator=random(1)).to(dtype)[:, :columns]
        given = (pack_int4(weight.q), weight.scale, weight.zero, group)
        got, want = both(ops.gemm_w4a16, u, *given, None, None, None, None, dtype)
        assert relative(got, want) < EPS[dtype]


def test_every_output_is_written():
    """A backend fills the tensors it is given: NaN there must not survive."""
    x, inv, ids = site(19, 300)
    lr_a = torch.randn(M - 1, 300, 5, generator=random()).half()
    q, scale = torch.full((19, 384), 99, dtype=torch.int8), torch.full((19,), torch.nan)
    cpu.OPS["smooth_quant"]((q, scale), x, inv, ids, 8)
    assert torch.isfinite(scale).all()
    assert not q[:, 300:].any()
    h = cpu.OPS["lowrank_down"](torch.full((19, 10), torch.nan), x, inv, ids, lr_a)
    assert torch.isfinite(h).all()
    weight = quantize_weight(torch.randn(43, 300, generator=random()), 4)
    rest = (0, None, None, None, None, F32)
    for tokens in (1, 19):
        y = torch.full((tokens, 43), torch.nan)
        given = (q[:tokens], scale[:tokens], pack_int4(weight.q), weight.scale, None, *rest)
        assert torch.isfinite(cpu.OPS["gemm_w4a8"](y, *given)).all()


def test_threads_do_not_change_the_result():
    weight = quantize_weight(torch.randn(300, 512, generator=random()), 4)
    x, inv, ids = site(100, 512)
    q, scale = ops.smooth_quant(x, inv, ids, 8)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gemm(weight, 4, 0, q, scale))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_onednn_sums_4_bit_weights_exactly():
    pytest.importorskip("masquant_kernels.onednn", reason="this torch has no oneDNN")
    for columns, out in ((200, 48), (3584, 33)):  # not square: [K, N] would pass unnoticed
        w = torch.randint(-8, 8, (out, columns), generator=random(), dtype=torch.int8)
        w[0] = -8
        padded = -(-columns // 128) * 128
        q = torch.randint(-127, 128, (9, padded), generator=random(1), dtype=torch.int8)
        q[:, columns:], q[0, :columns] = 0, 127
        given = (q, torch.rand(9), pack_int4(w), torch.rand(out, 1), None, 0)
        for rest in ((None, None, None, None, F32), (torch.rand(out), None, None, None, BF16)):
            results = []
            for backend in ("onednn", "reference"):
                with dispatch.force(backend):
                    results.append(ops.gemm_w4a8(*given, *rest))
            assert torch.equal(*results)


def test_without_a_compiler_the_next_backend_runs(tmp_path):
    code = (
        "from masquant_kernels import dispatch, ops; import torch;"
        "print(*(dispatch.backend_of(op, 'cpu') for op in ('gemm_w4a8', 'smooth_quant')));"
        "print(ops.smooth_quant(torch.ones(2, 8), torch.ones(1, 8), None, 8)[0].sum().item())"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("CC", "PATH")}
    env |= {
        "PATH": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    found = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["onednn", "reference", str(2 * 8 * 127)]
    assert "no C compiler found" in found.stderr
