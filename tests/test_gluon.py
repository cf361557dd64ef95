"""The Hopper GEMM, run on a model of the hardware (gluon_machine.py), against the definition."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="no Triton with Gluon on this platform")

from gluon_machine import Kernel
from masquant_kernels import reference
from masquant_kernels.gpu import hopper, hopper_kernels, tiles
from masquant_kernels.packing import pack_int4

SOURCE = Path(hopper_kernels.__file__)
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def arguments(bits, T, N, K, M=1, R=0, dtype=torch.float32, bias=False, seed=0):
    """Of gemm_w4a8 or gemm_w8a8. Sizes are such that every term weighs as much as the others."""
    g = torch.Generator().manual_seed(seed)
    limit = 8 if bits == 4 else 128
    q = torch.zeros(T, -(-K // 128) * 128, dtype=torch.int8)
    q[:, :K] = torch.randint(-127, 128, (T, K), generator=g, dtype=torch.int8)
    weight = torch.randint(-limit, limit, (N, K), generator=g, dtype=torch.int8)
    scale = torch.rand(T, generator=g) / 127
    weight_scale = torch.rand(N, 1, generator=g) / limit
    h = lr_b = modality = None
    if M > 1:
        modality = torch.randint(0, M, (T,), generator=g, dtype=torch.int32)
        modality[: T // 2] = 0  # some tiles have no low rank at all
        h = torch.randn(T, M - 1, R, generator=g)
        h = (h * (modality[:, None, None] == torch.arange(1, M)[:, None])).flatten(1).bfloat16()
        # Exact in bf16: the kernel's copy of it is rounded, which is not what is tested.
        lr_b = torch.randn(M - 1, R, N, generator=g).bfloat16().half()
    return {
        "q": q,
        "scale": scale,
        "weight_packed": pack_int4(weight) if bits == 4 else weight,
        "weight_scale": weight_scale,
        **({"weight_zero_point": None} if bits == 4 else {}),
        "group_size": 0,
        "bias": torch.randn(N, generator=g).to(dtype) if bias else None,
        "h": h,
        "lr_b": lr_b,
        "modality": modality,
        "dtype": dtype,
    }


def run(bits, given, tile, seed=0, blocks=3, mutate=lambda source: source):
    """The op through hopper.py's launcher, its kernel on the model; `out` starts as NaN."""
    patch = pytest.MonkeyPatch()
    patch.setattr(hopper, "hopper_gemm", Kernel(SOURCE, "hopper_gemm", seed, mutate))
    patch.setattr(hopper, "_processors", lambda device: blocks)
    out = torch.full((len(given["q"]), len(given["weight_packed"])), torch.nan)
    out = out.to(given["dtype"])
    with tiles.override(f"hopper_w{bits}a8", dict(tile) | {"num_warps": 8}):
        try:
            return hopper.OPS[f"gemm_w{bits}a8"].__wrapped__(90, out, **given)
        finally:
            patch.undo()


def wrong(bits, given, result) -> bool:
    """Whether an element is off by more than rounding: of the sums, and of the output."""
    expected = getattr(reference, f"gemm_w{bits}a8")(**given | {"dtype": torch.float64})
    size = max(1.0, expected.nan_to_num().abs().max().item())
    off = (result.double() - expected).abs() > 2 * size * (EPS[given["dtype"]] + 2.0**-20)
    return bool(off.any() or (result.isnan() != expected.isnan()).any())


BIG, SQUARE = {"BT": 128, "BN": 256}, {"BT": 128, "BN": 128}
CASES = [
    # bits, T, N, K, M, R, dtype, bias, tile
    (4, 300, 520, 300, 1, 0, torch.bfloat16, False, BIG | {"STAGES": 4}),
    (4, 129, 257, 100, 1, 0, torch.float32, True, BIG | {"STAGES": 4}),
    (4, 300, 520, 640, 3, 40, torch.bfloat16, True, BIG | {"STAGES": 4}),
    (4, 257, 49, 128, 2, 37, torch.float16, True, SQUARE | {"STAGES": 6}),
    (4, 65, 513, 1200, 4, 8, torch.float32, False, SQUARE | {"STAGES": 2}),
    (8, 300, 520, 304, 1, 0, torch.float16, True, BIG | {"STAGES": 3}),
    (8, 257, 49, 400, 3, 64, torch.float32, False, SQUARE | {"STAGES": 5}),
    (8, 391, 264, 1024, 3, 33, torch.bfloat16, True, BIG | {"STAGES": 3}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:6])))
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_definition(case, seed):
    bits, *shape, tile = case
    given = arguments(bits, *shape, seed=seed)
    assert not wrong(bits, given, run(bits, given, tile, seed, blocks=1 + seed))


def test_many_groups_of_tiles_cover_the_output_once():
    given = arguments(4, 128 * 35 + 1, 300, 128, dtype=torch.bfloat16)  # GROUP is 16 tiles of 128
    assert not wrong(4, given, run(4, given, SQUARE | {"STAGES": 4}, blocks=7))


def test_token_scales_may_be_strided():
    given = arguments(4, 200, 264, 256)
    given["scale"] = torch.stack([given["scale"], torch.full((200,), torch.nan)], 1)[:, 0]
    assert not wrong(4, given, run(4, given, SQUARE | {"STAGES": 4}))


def test_a_bad_token_spoils_its_own_row_only():
    given = arguments(4, 200, 264, 256, 3, 16, torch.bfloat16)
    given["scale"][70] = torch.nan
    result = run(4, given, BIG | {"STAGES": 4})
    assert result[70].isnan().all() and result.isnan().sum() == result.shape[1]
    assert not wrong(4, given, result)


MUTATIONS = {
    "a slot is released while its products run": ("num_outstanding=1", "num_outstanding=2"),
    "a slot is released in its own step": (
        "_release(empty, step - 1, STAGES, k > 0)",
        "_release(empty, step, STAGES)",
    ),
    "the last slot of a tile is not released": (
        "        _release(empty, step - 1, STAGES)\n\n        n =",
        "\n        n =",
    ),
    "a slot of the low rank is not released": (
        "                    _release(empty, step - 1, STAGES)\n",
        "",
    ),
    "the first step releases too": (", k > 0)", ")"),
    "the producer does not wait": ("mbarrier.wait(empty", "(lambda *_: None)(empty"),
    "the consumers do not wait": ("mbarrier.wait(full", "(lambda *_: None)(full"),
    "the producer's phase": ("((step // STAGES) & 1) ^ 1", "(step // STAGES) & 1"),
    "the bytes of a step": ("(2 * BT + W_HALVES * BN) * HALF", "(2 * BT + BN // 2) * HALF"),
    "a slot of the low rank is released early": (", r > 0)", ")"),
    "the low rank is taken before its end": (
        "y = warpgroup_mma_wait(num_outstanding=0",
        "y = warpgroup_mma_wait(num_outstanding=1",
    ),
    "the sum is taken before its end": (
        "total = warpgroup_mma_wait(num_outstanding=0",
        "total = warpgroup_mma_wait(num_outstanding=1",
    ),
    "the staged tile is overwritten": ("tma.store_wait(0)  # the tile before", "pass  #"),
    "the last tile is not awaited": ("    if y_desc is not None:\n        tma.store_wait(0)\n", ""),
    "modalities are swapped in h": ("(m - 1) * rank + r]", "(M - 1 - m) * rank + r]"),
    "modalities are swapped in lr_b": ("(m - 1) * N + off_n", "(M - 1 - m) * N + off_n"),
    "a modality is skipped by one side": (
        "if _holds(modalities, m):\n                    corrected =",
        "if m > 1 and _holds(modalities, m):\n                    corrected =",
    ),
    "nibbles change places": ("_high(packed)", "_low(packed)"),
    "nibbles are not scaled": ("0.0625", "1.0"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_model_catches(mutation):
    """Each mutation must be wrong, or not come to an end, for some order of events."""
    old, new = MUTATIONS[mutation]

    def mutate(source):
        assert old in source, f"{mutation}: the kernel no longer says {old!r}"
        return source.replace(old, new)

    given = arguments(4, 300, 520, 1000, 3, 64, torch.bfloat16, bias=True)
    for seed in range(10):
        try:
            result = run(4, given, BIG | {"STAGES": 3}, seed, blocks=2, mutate=mutate)
        except AssertionError:
            return
        if wrong(4, given, result):
            return
    pytest.fail(f"nothing changed: {mutation}")


@pytest.mark.parametrize(
    "change",
    [
        {"group_size": 128},
        {"weight_zero_point": torch.zeros(264, 1, dtype=torch.int8)},
        {"q": torch.zeros(64, 256, dtype=torch.int8)},  # few tokens
        {"h": torch.zeros(200, 32)},  # f32: rounding it to bf16 would lose digits
    ],
    ids=lambda change: next(iter(change)),
)
def test_leaves_to_others_what_it_does_not_cover(change):
    given = arguments(4, 200, 264, 256, 3, 16, torch.bfloat16) | change
    assert run(4, given, BIG | {"STAGES": 4}) is NotImplemented


def test_leaves_to_others_what_tma_cannot_address():
    given = arguments(8, 200, 264, 250)  # rows of 250 bytes
    assert run(8, given, BIG | {"STAGES": 3}) is NotImplemented
    given = arguments(4, 200, 264, 256)
    given["weight_packed"] = torch.zeros(264 * 128 + 1, dtype=torch.int8)[1:].view(264, 128)
    assert run(4, given, BIG | {"STAGES": 4}) is NotImplemented


@pytest.mark.parametrize("bits", [4, 8])
def test_any_tile_that_tuning_tries_is_right(bits):
    found = tiles.candidates(f"hopper_w{bits}a8", 90)
    assert len(found) > 8
    given = arguments(bits, 300, 520, 512, 3, 40, torch.bfloat16)
    for tile in found[::3]:
        assert not wrong(bits, given, run(bits, given, tile))


@pytest.mark.parametrize("arch", [80, 89, 100])
def test_is_for_hopper_only(arch):
    given = arguments(4, 200, 264, 256)
    out = torch.empty(200, 264)
    assert hopper.OPS["gemm_w4a8"].__wrapped__(arch, out, **given) is NotImplemented


def test_the_copy_of_lr_b_lives_with_it_and_follows_it():
    lr_b = torch.randn(2, 37, 24, dtype=torch.float32).half()
    copy = hopper._channel_major(lr_b)
    assert copy.shape == (2 * 24, 64) and copy.dtype == torch.bfloat16
    assert torch.equal(copy.view(2, 24, 64)[:, :, :37], lr_b.transpose(1, 2).bfloat16())
    assert not copy.view(2, 24, 64)[:, :, 37:].any()
    assert hopper._channel_major(lr_b) is copy
    lr_b.mul_(2)
    assert torch.equal(hopper._channel_major(lr_b), 2 * copy)
    copy = weakref.ref(hopper._channel_major(lr_b))
    del lr_b
    gc.collect()
    assert copy() is None
