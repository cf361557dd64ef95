"""Every plain Triton kernel against reference.py, under TRITON_INTERPRET=1.

Collected by test_triton_kernels.py, in its own process. By hand:
    TRITON_INTERPRET=1 python -m pytest tests/triton_checks.py
"""

import itertools

import pytest
import torch
from masquant_kernels import dispatch, gpu, ops, pack_int4, quantize_weight, reference
from masquant_kernels.gpu import tiles
from masquant_kernels.gpu.common import INTERPRET, arch_of
from triton.runtime import interpreter

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("text", "vision", "interleaved")
# Two results that are rounded to these from nearly equal f32 may differ by one step here and there.
STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and exp
assert INTERPRET.value, "run with TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def scalars_are_arrays_of_one(monkeypatch):
    """The bounds of a loop are such arrays; NumPy 2.4 no longer makes an int of one by itself,
    which the interpreter of Triton 3.6 relies on."""
    patch = interpreter._patch_lang_tensor

    def patch_more(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_more)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs and workspaces start as NaN or 77: what a kernel forgets to write shows."""
    empty = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        made = empty(self, *args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def triton(name, *args):
    """The op by its Triton kernel; never by what dispatch.py falls back to."""
    out = getattr(ops, f"_{name}")(*args)
    if args[0].shape[0] == 0:
        with dispatch.force("triton"):
            return getattr(torch.ops.masquant, name)(*args)
    result = gpu.OPS[name](out, *args)
    assert result is not NotImplemented
    return result


def same(a, b, step=None) -> bool:
    """By the largest difference and by the norm, both against b's scale; NaNs lie alike."""
    step = step or STEP[b.dtype]
    if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.double().nan_to_num(0), b.double().nan_to_num(0)
    if not b.numel() or torch.equal(a, b):
        return True
    difference = a - b
    largest = difference.abs().max() <= 2 * step * b.abs().max()
    return bool(largest and difference.norm() <= step * b.norm())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def modality(layout, tokens, count=3):
    ids = {
        "text": torch.zeros(tokens),
        "vision": torch.ones(tokens),
        "interleaved": torch.arange(tokens) * 7 % 5 % count,
    }[layout]
    return ids.to(torch.int32)


def rows(tokens, columns, dtype=torch.float32, seed=0):
    """Rows that are not next to each other in memory."""
    return torch.randn(tokens, columns + 24, generator=seeded(seed)).to(dtype)[:, 8 : 8 + columns]


def smooth_inv(columns, count=3):
    return torch.rand(count, columns, generator=seeded(5)) + 0.25


# --- smooth_quant, add_smooth_quant ----------------------------------------------------------


def prologue(kind, tokens, columns, dtype):
    """The arguments after `bits` (smooth_quant) or `lr_a` (lowrank_down)."""
    if kind == "norm":
        return rows(1, columns, dtype, 3)[0].contiguous(), 1e-6
    return (None, 0.0, rows(tokens, columns, dtype, 4)) if kind == "silu" else ()


def check_quantized(got, expected, exact):
    (q, scale), (q_expected, scale_expected) = got[:2], expected[:2]
    assert torch.equal(scale.isnan(), scale_expected.isnan())
    if exact:
        assert torch.equal(q, q_expected)
        assert torch.equal(scale.nan_to_num(-1), scale_expected.nan_to_num(-1))
    else:  # the order of a sum, or exp: an integer moves where it lay on the edge
        assert same(scale, scale_expected)
        moved = (q.int() - q_expected.int()).abs()
        assert moved.sum() <= 1e-3 * moved.numel() + 1
        assert moved.numel() == 0 or moved.max() <= 1


@pytest.mark.parametrize("kind", ["plain", "norm", "silu"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("tokens", "columns"), [(0, 200), (1, 49), (17, 200), (17, 128)])
def test_smooth_quant(kind, dtype, tokens, columns):
    for layout, bits in zip(LAYOUTS, (8, 6, 4), strict=True):
        args = (rows(tokens, columns, dtype), smooth_inv(columns), modality(layout, tokens), bits)
        args += prologue(kind, tokens, columns, dtype)
        check_quantized(
            triton("smooth_quant", *args), reference.smooth_quant(*args), kind == "plain"
        )


def test_smooth_quant_of_many_tokens_and_without_modalities():
    for tokens, ids in ((17, None), (257, modality("interleaved", 257))):
        args = (rows(tokens, 49, torch.bfloat16), smooth_inv(49), ids, 8)
        check_quantized(triton("smooth_quant", *args), reference.smooth_quant(*args), True)


def test_a_row_longer_than_a_block_is_walked_in_steps():
    args = (rows(3, 1000), smooth_inv(1000), modality("interleaved", 3), 8)
    more = prologue("norm", 3, 1000, torch.float32)
    with tiles.override("smooth_quant", {"BLOCK": 256, "num_warps": 4}):
        got, normed = triton("smooth_quant", *args), triton("smooth_quant", *args, *more)
    check_quantized(got, reference.smooth_quant(*args), True)
    check_quantized(normed, reference.smooth_quant(*args, *more), False)


@pytest.mark.parametrize("kind", ["plain", "norm"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_add_smooth_quant(kind, dtype, tokens):
    x, residual = rows(tokens, 200, dtype), rows(tokens, 200, dtype, 1)
    args = (x, residual, smooth_inv(200), modality("interleaved", tokens), 8)
    args += prologue(kind, tokens, 200, dtype)
    got, expected = triton("add_smooth_quant", *args), reference.add_smooth_quant(*args)
    check_quantized(got, expected, kind == "plain")
    assert torch.equal(got[2], expected[2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["plain", "norm", "silu"])
def test_a_bad_token_is_marked_and_a_zero_one_is_not(value, kind):
    x = rows(5, 200).clone()
    x[1, 199], x[3] = value, 0
    args = (x, smooth_inv(200), modality("interleaved", 5), 8, *prologue(kind, 5, 200, x.dtype))
    q, scale = triton("smooth_quant", *args)
    assert scale.isnan().tolist() == [False, True, False, False, False]
    assert not q[1].any() and not q[3].any() and q[4].any()
    check_quantized((q, scale), reference.smooth_quant(*args), kind == "plain")


@pytest.mark.parametrize("wrong", [-1, 3, 2**30])
def test_a_modality_out_of_range_is_a_nan_row(wrong):
    ids = torch.tensor([0, wrong, 2], dtype=torch.int32)
    x, inverse = rows(3, 200), smooth_inv(200)
    out = ops._quantized(x)
    q, scale = gpu.OPS["smooth_quant"](out, x, inverse, ids, 8)
    assert scale.isnan().tolist() == [False, True, False] and not q[1].any()
    h = x.new_empty(3, 2 * 5)
    gpu.OPS["lowrank_down"](h, x, inverse, ids, torch.randn(2, 200, 5).half())
    assert not h[:2].any() and h[2, 5:].all()


# --- lowrank_down ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "norm", "silu"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("tokens", "columns", "rank"), [(0, 200, 5), (1, 49, 3), (40, 200, 70)])
def test_lowrank_down(kind, dtype, tokens, columns, rank):
    lr_a = torch.randn(2, columns, rank, generator=seeded(2)).half()
    for layout in LAYOUTS if tokens == 1 else ("interleaved",):
        ids = modality(layout, tokens)
        args = (rows(tokens, columns, dtype), smooth_inv(columns), ids, lr_a)
        args += prologue(kind, tokens, columns, dtype)
        got, expected = triton("lowrank_down", *args), reference.lowrank_down(*args)
        # 16-bit inputs are rounded to f16 before the product: 2^-11 each, less in the mean.
        assert same(got, expected, None if dtype == torch.float32 else 2**-8), layout
        assert torch.equal(got == 0, expected == 0)


def test_factors_of_an_absent_modality_are_not_read_and_rows_stay_apart():
    lr_a = torch.randn(2, 200, 5, generator=seeded(2)).half()
    x = rows(40, 200).clone()
    x[3] = torch.nan
    args = (x, smooth_inv(200), modality("vision", 40), lr_a)
    expected = reference.lowrank_down(*args)
    lr_a[1] = torch.nan
    got = triton("lowrank_down", *args)
    assert got[3, :5].isnan().all() and same(got, expected)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_lowrank_down_neither_overflows_nor_vanishes_in_f16(size):
    x = (rows(5, 200) * size).to(torch.bfloat16)
    lr_a = torch.randn(2, 200, 5, generator=seeded(2)).half()
    args = (x, smooth_inv(200), modality("vision", 5), lr_a)
    got = triton("lowrank_down", *args)
    assert got.isfinite().all() and same(got, reference.lowrank_down(*args), 2**-8)


# --- the GEMMs -------------------------------------------------------------------------------

# bits, K, group size, symmetric
WEIGHTS = [
    (4, 200, 0, True), (4, 200, 0, False), (8, 200, 0, True), (8, 49, 0, True),
    (4, 256, 128, True), (4, 512, 256, False), (8, 256, 128, True),
    (4, 192, 64, True), (4, 96, 32, False), (8, 96, 32, True),
]  # fmt: skip


class Linear:
    """One random linear and inputs that fit it; N = 49 outputs, three modalities, rank 5."""

    def __init__(self, bits, columns, group, symmetric, tokens, layout="interleaved"):
        w = torch.randn(49, columns, generator=seeded(1)) + (0 if symmetric else 0.7)
        weight = quantize_weight(w, bits, group or None, symmetric)
        packed = pack_int4(weight.q) if bits == 4 else weight.q
        zero = (weight.zero,) if bits == 4 else ()
        self.weight = (packed, weight.scale, *zero, group)
        self.integers, self.bits, self.tokens = weight.q, bits, tokens
        self.x = rows(tokens, columns)
        self.q, self.scale = reference.smooth_quant(self.x, torch.ones(1, columns), None, 8)
        self.bias = torch.randn(49, generator=seeded(3))
        self.modality = modality(layout, tokens)
        h = torch.randn(tokens, 2, 5, generator=seeded(4))
        self.h = (h * (self.modality[:, None] == torch.tensor([1, 2]))[..., None]).flatten(1)
        self.lr_b = torch.randn(2, 5, 49, generator=seeded(6)).half()

    def low_rank(self, dtype):
        return self.h.to(reference.hidden_dtype(dtype)), self.lr_b, self.modality

    def arguments(self, rest, dtype):
        """(op, its arguments): the integer GEMM with bias and `rest`: h, lr_b, modality."""
        return f"gemm_w{self.bits}a8", (self.q, self.scale, *self.weight, self.bias, *rest, dtype)


def agree(name, args):
    return same(triton(name, *args), getattr(reference, name)(*args))


def agree_on(case, dtype=torch.float32):
    """With and without low rank; the second takes the decode kernels when tokens are few."""
    for rest in (case.low_rank(dtype), (None, None, None)):
        name, args = case.arguments(rest, dtype)
        assert agree(name, args), rest[0]


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize(("bits", "columns", "group", "symmetric"), WEIGHTS)
def test_integer_gemm(bits, columns, group, symmetric, tokens):
    agree_on(Linear(bits, columns, group, symmetric, tokens))


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_gemm_of_many_tokens(bits):
    agree_on(Linear(bits, 200, 0, True, 257))
    agree_on(Linear(bits, 256, 128, bits == 8, 257))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_gemm_in_every_dtype(bits, layout, dtype):
    case = Linear(bits, 200, 0, True, 40, layout)
    case.bias = case.bias.to(dtype)
    assert agree(*case.arguments(case.low_rank(dtype), dtype))


@pytest.mark.parametrize("split", [1, 3, 8])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_sums_of_integers_are_exact_however_they_are_split(bits, tokens, split):
    case = Linear(bits, 1000, 0, True, tokens)
    packed = case.weight[0]
    ones = torch.ones(49, 1)
    zero = (None,) if bits == 4 else ()
    tile = {"BT": 16, "BN": 32, "BK": 256, "num_warps": 4, "num_stages": 2, "SPLIT": split}
    args = (case.q, torch.ones(tokens), packed, ones, *zero, 0, *[None] * 4, torch.float32)
    with tiles.override(f"decode_w{bits}a8", tile):
        got = triton(f"gemm_w{bits}a8", *args)
    expected = case.q[:, :1000].long() @ case.integers.long().T
    assert expected.abs().max() < 2**24
    assert torch.equal(got.long(), expected)


@pytest.mark.parametrize(("bits", "columns", "group", "symmetric"), WEIGHTS)
def test_gemm_decode(bits, columns, group, symmetric):
    for tokens, dtype in zip((0, 1, 16), FLOATS, strict=True):
        case = Linear(bits, columns, group, symmetric, tokens)
        packed, scale, *zero, size = case.weight
        args = (case.q, case.scale, packed, scale, zero[0] if zero else None, size)
        assert agree("gemm_decode", (*args, case.bias, bits, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("columns", "group", "symmetric"), [w[1:] for w in WEIGHTS if w[0] == 4])
def test_gemm_w4a16(columns, group, symmetric, dtype):
    for tokens in (0, 1, 17):
        case = Linear(4, columns, group, symmetric, tokens)
        args = (rows(tokens, columns, dtype), *case.weight, case.bias)
        assert agree("gemm_w4a16", (*args, None, None, None, dtype)), tokens
        assert agree("gemm_w4a16", (*args, *case.low_rank(dtype), dtype)), tokens


def test_gemm_w4a16_of_many_tokens():
    case = Linear(4, 200, 0, True, 257)
    args = (case.x, *case.weight, case.bias, *case.low_rank(torch.float32), torch.float32)
    assert agree("gemm_w4a16", args)


@pytest.mark.parametrize("name", ["gemm_w4a8", "gemm_w8a8"])
def test_small_tiles_cover_the_whole_output(name):
    """Several tiles each way, the last ones cut off, in groups that do not fill up."""
    case = Linear(int(name[6]), 200, 0, True, 40)
    tile = {"BT": 16, "BN": 16, "BK": 128, "SWIZZLE": 3, "num_warps": 4, "num_stages": 2}
    with tiles.override(f"{name}_f32", tile):
        assert agree(*case.arguments(case.low_rank(torch.float32), torch.float32))


@pytest.mark.parametrize("op", ["gemm_w4a8", "gemm_w4a16"])
def test_a_bad_token_spoils_no_other(op):
    case = Linear(4, 200, 0, True, 20)
    case.scale[3] = torch.nan
    case.x[5, 7] = torch.inf
    case.x[6, 8] = torch.nan
    rest = case.low_rank(torch.float32)
    rest[0][4] = torch.nan
    if op == "gemm_w4a8":
        name, args = case.arguments(rest, torch.float32)
        got = triton(name, *args)
        bad = [3, 4]
    else:
        got = triton(op, case.x, *case.weight, case.bias, *rest, torch.float32)
        bad = [4, 5, 6]
    assert (~got.isfinite()).any(1).nonzero().flatten().tolist() == bad


def test_low_rank_factors_of_an_absent_modality_are_not_read():
    for layout, absent in (("text", [0, 1]), ("vision", [1])):
        case = Linear(4, 200, 0, True, 40, layout)
        name, args = case.arguments(case.low_rank(torch.float32), torch.float32)
        expected = reference.gemm_w4a8(*args)
        case.lr_b[absent] = torch.nan
        assert same(triton(name, *args), expected)


def test_groups_that_no_kernel_covers_are_left_to_the_reference():
    case = Linear(4, 200, 40, True, 17)
    name, args = case.arguments((None, None, None), torch.float32)
    out = case.q.new_empty(17, 49, dtype=torch.float32)
    assert gpu.OPS[name](out, *args) is NotImplemented
    with dispatch.force("triton"):
        assert same(torch.ops.masquant.gemm_w4a8(*args), reference.gemm_w4a8(*args))


# --- the comparison itself -------------------------------------------------------------------


def test_swapping_two_modalities_is_noticed():
    """Of smooth_inv, lr_a, lr_b or the tokens: each swap alone must fail the comparison."""
    x, lr_a = rows(20, 200), torch.randn(2, 200, 5, generator=seeded(2)).half()
    inverse, ids = smooth_inv(200), modality("interleaved", 20)
    swapped = torch.tensor([0, 2, 1], dtype=torch.int32)

    def result(run, inverse=inverse, lr_a=lr_a, lr_b=None, ids=ids):
        case = Linear(4, 200, 0, True, 20)
        q, scale = run("smooth_quant", x, inverse, ids, 8)
        h = run("lowrank_down", x, inverse, ids, lr_a)
        lr_b = case.lr_b if lr_b is None else lr_b
        rest = (case.bias, h, lr_b, ids, torch.float32)
        return run("gemm_w4a8", q, scale, *case.weight, *rest)

    def define(name, *args):
        return getattr(reference, name)(*args)

    expected = result(define)
    assert same(result(triton), expected, 2e-5)
    lr_b = Linear(4, 200, 0, True, 20).lr_b
    for change in (
        {"inverse": inverse[[0, 2, 1]].contiguous()},
        {"lr_a": lr_a[[1, 0]].contiguous()},
        {"lr_b": lr_b[[1, 0]].contiguous()},
        {"ids": swapped[ids.long()]},
    ):
        assert not same(result(triton, **change), expected, 1e-2), change.keys()


def test_vectors_need_not_be_contiguous():
    case = Linear(4, 200, 0, True, 20)
    apart = torch.stack([case.scale, case.scale * torch.nan], 1)[:, 0]
    name, (_, scale, *rest) = case.arguments((None, None, None), torch.float32)
    expected = reference.gemm_w4a8(case.q, scale, *rest)
    assert same(triton(name, case.q, apart, *rest), expected)
    weight = torch.stack([smooth_inv(200)[0], torch.full((200,), torch.nan)], 1)[:, 0]
    args = (case.x, smooth_inv(200), case.modality)
    check_quantized(
        triton("smooth_quant", *args, 8, weight, 1e-6),
        reference.smooth_quant(*args, 8, weight, 1e-6),
        False,
    )
    args += (torch.randn(2, 200, 5, generator=seeded(2)).half(), weight, 1e-6)
    assert same(triton("lowrank_down", *args), reference.lowrank_down(*args))


@pytest.mark.parametrize(
    ("chip", "arch"),
    [
        (75, None),
        (80, 80),
        (86, 89),
        (87, 80),
        (89, 89),
        (90, 90),
        (100, 100),
        (103, 100),
        (120, 89),
    ],
)
def test_whose_tiles_a_chip_takes(chip, arch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: divmod(chip, 10))
    assert arch_of.__wrapped__(torch.device("cuda", 0)) == arch


# --- tiles -----------------------------------------------------------------------------------


def test_every_op_has_a_tile_for_every_shape_on_every_architecture():
    shapes = itertools.product((1, 16, 17, 300, 10**6), (49, 4000, 10**6), (1, 5000, 10**6))
    listed = {op for arch in (80, 89, 90, 100) for op in tiles.rows(arch)}
    for op, arch, shape in itertools.product(
        {op for op in listed if not op.startswith("hopper")}, (80, 86, 89, 90, 100, 120), shapes
    ):
        assert tiles.find(op, arch, *shape).options


def test_tiles_are_looked_up_by_shape_and_unknown_architectures_fall_to_lower_ones(tmp_path):
    assert tiles.find("gemm_w4a8", 86, 9999, 4096, 4096) == tiles.find(
        "gemm_w4a8", 80, 9999, 4096, 4096
    )
    assert tiles.find("gemm_w4a8", 80, 17, 4096, 4096).options["BT"] == 32
    with pytest.raises(KeyError, match="no tile for gemm_w3a8"):
        tiles.find("gemm_w3a8", 90, 1, 1, 1)
    before = tiles.find("gemm_w4a8", 80, 40, 4096, 4096)
    with tiles.override("gemm_w4a8", {"BT": 1, "SPLIT": 7}):
        assert tiles.find("gemm_w4a8", 80, 40, 4096, 4096) == ({"BT": 1}, 7)
    assert tiles.find("gemm_w4a8", 80, 40, 4096, 4096) == before


def test_a_table_of_the_users_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "_table", {a: dict(ops) for a, ops in tiles._table.items()})
    path = tmp_path / "tuned.json"
    path.write_text('{"80": {"gemm_w4a8": [{"max_tokens": 40, "BT": 3, "num_warps": 1}]}}')
    tiles.load_table(path)
    assert tiles.find("gemm_w4a8", 80, 40, 1, 1).options == {"BT": 3, "num_warps": 1}
    assert tiles.find("gemm_w4a8", 80, 41, 1, 1).options["BT"] != 3
    tiles.find.cache_clear()


@pytest.mark.parametrize("op", ["decode_w4a8", "decode_w4a16", "gemm_w8a8_f32_grouped"])
def test_candidates_start_with_the_tables_own_and_fit_the_chip(op):
    for arch, most in tiles.SHARED_MEMORY.items():
        found, shipped = tiles.candidates(op, arch), tiles.rows(arch)[op]
        assert all(tile in found for tile in shipped) and found[0] == shipped[0]
        assert len(found) > len(shipped) and all(found.count(tile) == 1 for tile in found)
        for tile in found:
            weight = tile["BN"] * tile.get("BK", 128) // (1 if "w8" in op else 2)
            inputs = tile["BT"] * tile.get("BK", 128) * (2 if "a16" in op else 1)
            assert tile["num_stages"] * (weight + inputs) <= most * 1024


def test_every_candidate_of_a_decode_step_gives_the_same_integers():
    case = Linear(4, 1000, 0, True, 3)
    args = (case.q, case.scale, *case.weight, *[None] * 4, torch.float32)
    expected = reference.gemm_w4a8(*args)
    for tile in tiles.candidates("decode_w4a8", 90)[::5]:
        with tiles.override("decode_w4a8", tile):
            assert torch.equal(triton("gemm_w4a8", *args), expected), tile
