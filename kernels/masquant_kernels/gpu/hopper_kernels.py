"""The sm_90 GEMM in Gluon: Y^T = W X^T by asynchronous integer wgmma, fed by TMA.

A persistent block has one producer warp, which copies tiles into a ring of shared memory, and two
warpgroups of consumers, which multiply. Plain Triton waits for each product of integers before it
starts the next one; here one is always in flight.

The ring. Step i of a block, counted over all its tiles, uses slot i % STAGES, for the
(i // STAGES)-th time. The producer waits until the slot is empty and announces bytes; when they
have come, it is full. The consumers wait for that, and report it empty once none of them reads it
any more. A step is

    128 inputs       activations as two halves of 64 inputs; the weight as 64 bytes of nibbles
                     (packing.py: input j low, input 64 + j high) or, at 8 bits, as two halves
    32 of the rank   h and lr_b in bf16, for a modality that the tile has: 64 bytes a row again

TMA reads zeros outside of a tensor and writes nothing there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

# Names that changed between Triton 3.6 and 3.9; old ones may remain, but only raise.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_buffer = gl.shared_memory_descriptor
_view = _buffer.reinterpret if hasattr(_buffer, "reinterpret") else _buffer._reinterpret

STEP = gl.constexpr(128)  # inputs
HALF = gl.constexpr(64)  # bytes of a row in one buffer of the ring
RANKS = gl.constexpr(32)  # columns of h in as many bytes
WARPS = gl.constexpr(8)  # of consumers
PRODUCER_REGISTERS = gl.constexpr(40)  # a thread; leaves 232 for each consumer


# --- the ring --------------------------------------------------------------------------------


@gluon.jit
def _fill(full, empty, step, BYTES: gl.constexpr, STAGES: gl.constexpr):
    """Producer: the slot of a step, once it is empty, with BYTES announced. A new barrier counts
    as having completed the round before its first, so the first rounds do not wait."""
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), BYTES)
    return slot


@gluon.jit
def _take(full, step, STAGES: gl.constexpr):
    """Consumers: the slot of a step, once it is full."""
    slot = step % STAGES
    mbarrier.wait(full.index(slot), (step // STAGES) & 1)
    return slot


@gluon.jit
def _release(empty, step, STAGES: gl.constexpr, pred=True):
    """One arrival, which Triton sends after all consumers got here."""
    mbarrier.arrive(empty.index(step % STAGES), count=1, pred=pred)


# --- what both sides agree on ----------------------------------------------------------------


@gluon.jit
def _origin(tile, T, N, BT: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """First token and first channel of a tile. Blocks that run at once share GROUP tiles of tokens
    and a few tiles of channels, which the L2 cache can hold."""
    group = tile // (GROUP * gl.cdiv(N, BN))
    inside = tile % (GROUP * gl.cdiv(N, BN))
    height = gl.minimum(gl.cdiv(T, BT) - group * GROUP, GROUP)
    return (group * GROUP + inside % height) * BT, inside // height * BN


@gluon.jit
def _modalities(modality_ptr, off_t, T, BT: gl.constexpr, WARPS: gl.constexpr):
    """int32 [BT], whole in each warp; the base modality where there is no token."""
    L: gl.constexpr = gl.BlockedLayout([BT // 32], [32], [WARPS], [0])
    t = off_t + gl.arange(0, BT, layout=L)
    return gl.load(modality_ptr + t, mask=t < T, other=0)


@gluon.jit
def _holds(modalities, m: gl.constexpr):
    return gl.max((modalities == m).to(gl.int32), 0) > 0


# --- the two sides ---------------------------------------------------------------------------


@gluon.jit
def _produce(
    q_desc, w_desc, h_desc, b_desc, modality_ptr, q_ring, w_ring, h_ring, b_ring, full, empty,
    T, N, steps, rank, first, blocks, tiles,
    W_HALVES: gl.constexpr, M: gl.constexpr, BT: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    step = 0
    for tile in range(first, tiles, blocks):
        off_t, off_n = _origin(tile, T, N, BT, BN, GROUP)
        for k in range(steps):
            slot = _fill(full, empty, step, (2 * BT + W_HALVES * BN) * HALF, STAGES)
            bar = full.index(slot)
            for i in gl.static_range(2):
                _load(q_desc, [off_t, k * STEP + i * HALF], bar, q_ring.index(2 * slot + i))
            for i in gl.static_range(W_HALVES):
                at = (k * W_HALVES + i) * HALF
                _load(w_desc, [off_n, at], bar, w_ring.index(W_HALVES * slot + i))
            step += 1
        if M > 1:
            modalities = _modalities(modality_ptr, off_t, T, BT, 1)
            for m in gl.static_range(1, M):
                if _holds(modalities, m):
                    for r in range(0, rank, RANKS):
                        slot = _fill(full, empty, step, (BT + BN) * HALF, STAGES)
                        bar = full.index(slot)
                        _load(h_desc, [off_t, (m - 1) * rank + r], bar, h_ring.index(2 * slot))
                        at = (m - 1) * N + off_n
                        _load(b_desc, [at, r], bar, b_ring.index(W_HALVES * slot))
                        step += 1


@gluon.jit
def _low(packed):
    """16 * the low nibble of each byte, int8: exact, and without sign extension.

    Volatile, like `_high`: registers that a wgmma reads may change only after the wait for it,
    and code without side effects is moved across.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
        "=r,r", [packed], dtype=gl.int8, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def _high(packed):
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=gl.int8, is_pure=False, pack=4
    )


@gluon.jit
def _all_but_newest(acc):
    """The accumulator, when only the product issued last may still be running."""
    return warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=(acc,)))


@gluon.jit
def _consume(
    y_desc, y_ptr, scale_ptr, w_scale_ptr, bias_ptr, modality_ptr,
    q_ring, w_ring, h_ring, b_ring, y_tile, full, empty,
    T, N, steps, rank, first, blocks, tiles,
    W_HALVES: gl.constexpr, M: gl.constexpr, BT: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = BT if BT < 128 else 128  # no integer wgmma of Triton's is wider
    INTEGER: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 32])
    FLOAT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
    FRAGMENT: gl.constexpr = gl.DotOperandLayout(0, INTEGER, 4)
    step = 0
    for tile in range(first, tiles, blocks):
        off_t, off_n = _origin(tile, T, N, BT, BN, GROUP)
        acc = warpgroup_mma_init(gl.zeros((BN, BT), gl.int32, INTEGER))
        for k in range(steps):
            slot = _take(full, step, STAGES)
            q0 = q_ring.index(2 * slot).permute((1, 0))
            q1 = q_ring.index(2 * slot + 1).permute((1, 0))
            if W_HALVES == 1:
                packed = w_ring.index(slot).load(FRAGMENT)
                acc = warpgroup_mma(_low(packed), q0, acc, is_async=True)
                acc = _all_but_newest(acc)  # the high half of the step before is done
                _release(empty, step - 1, STAGES, k > 0)
                acc = warpgroup_mma(_high(packed), q1, acc, is_async=True)
                acc = _all_but_newest(acc)  # `low` may be overwritten
            else:
                acc = warpgroup_mma(w_ring.index(2 * slot), q0, acc, is_async=True)
                acc = _all_but_newest(acc)
                _release(empty, step - 1, STAGES, k > 0)
                acc = warpgroup_mma(w_ring.index(2 * slot + 1), q1, acc, is_async=True)
            step += 1
        total = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        _release(empty, step - 1, STAGES)

        n = off_n + gl.arange(0, BN, layout=gl.SliceLayout(1, FLOAT))
        t = off_t + gl.arange(0, BT, layout=gl.SliceLayout(0, FLOAT))
        token_scale = gl.load(scale_ptr + t, mask=t < T, other=0.0)
        channel_scale = gl.load(w_scale_ptr + n, mask=n < N, other=0.0)
        if W_HALVES == 1:
            channel_scale *= 0.0625  # nibbles were read as 16 times themselves
        y = gl.convert_layout(total, FLOAT).to(gl.float32)
        y = y * gl.expand_dims(token_scale, 0) * gl.expand_dims(channel_scale, 1)

        if M > 1:
            modalities = _modalities(modality_ptr, off_t, T, BT, WARPS)
            for m in gl.static_range(1, M):
                if _holds(modalities, m):
                    corrected = warpgroup_mma_init(y)
                    for r in range(0, rank, RANKS):
                        slot = _take(full, step, STAGES)
                        h = h_ring.index(2 * slot).permute((1, 0))
                        b = b_ring.index(W_HALVES * slot)
                        corrected = warpgroup_mma(b, h, corrected, is_async=True)
                        corrected = _all_but_newest(corrected)
                        _release(empty, step - 1, STAGES, r > 0)
                        step += 1
                    y = warpgroup_mma_wait(num_outstanding=0, deps=(corrected,))
                    _release(empty, step - 1, STAGES)

        if bias_ptr is not None:
            bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
            y += gl.expand_dims(bias, 1)
        if y_desc is not None:
            tma.store_wait(0)  # the tile before has left shared memory
            y_tile.permute((1, 0)).store(y.to(y_desc.dtype))
            fence_async_shared()
            _store(y_desc, [off_t, off_n], y_tile)
        else:
            t, n = gl.expand_dims(t, 0), gl.expand_dims(n, 1)
            at = y_ptr + t.to(gl.int64) * N + n
            gl.store(at, y.to(y_ptr.dtype.element_ty), mask=(t < T) & (n < N))
    if y_desc is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "N", "steps", "rank"])
def hopper_gemm(
    q_desc, w_desc, h_desc, b_desc, y_desc, y_ptr, scale_ptr, w_scale_ptr, bias_ptr, modality_ptr,
    T, N, steps, rank,
    BITS: gl.constexpr, M: gl.constexpr, BT: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """y [T, N] = (q @ Qw^T) * scale * w_scale + h @ lr_b + bias.

    q_desc int8 [T, 128 * steps]; w_desc int8 [N, 64 * steps] of nibbles or [N, K];
    h_desc bf16 [T, (M-1) * rank]; b_desc bf16 [(M-1) * N, rank rounded up to RANKS], zero padded:
    what h has of the next modality beyond `rank` meets zeros. M = 1: no low rank.
    y_desc: y, through shared memory; None: y_ptr, element by element.
    """
    W_HALVES: gl.constexpr = 1 if BITS == 4 else 2
    q_ring = gl.allocate_shared_memory(gl.int8, [2 * STAGES, BT, HALF], q_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int8, [W_HALVES * STAGES, BN, HALF], w_desc.layout)
    if M > 1:
        h_ring = _view(q_ring, gl.bfloat16, [2 * STAGES, BT, RANKS], h_desc.layout)
        b_ring = _view(w_ring, gl.bfloat16, [W_HALVES * STAGES, BN, RANKS], b_desc.layout)
    else:
        h_ring: gl.constexpr = None
        b_ring: gl.constexpr = None
    if y_desc is not None:
        y_tile = gl.allocate_shared_memory(y_desc.dtype, [BT, BN], y_desc.layout)
    else:
        y_tile: gl.constexpr = None
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    first, blocks = gl.program_id(0), gl.num_programs(0)
    tiles = gl.cdiv(T, BT) * gl.cdiv(N, BN)
    gl.warp_specialize([
        (_consume, (
            y_desc, y_ptr, scale_ptr, w_scale_ptr, bias_ptr, modality_ptr,
            q_ring, w_ring, h_ring, b_ring, y_tile, full, empty,
            T, N, steps, rank, first, blocks, tiles, W_HALVES, M, BT, BN, STAGES, GROUP,
        )),
        (_produce, (
            q_desc, w_desc, h_desc, b_desc, modality_ptr, q_ring, w_ring, h_ring, b_ring, full,
            empty, T, N, steps, rank, first, blocks, tiles, W_HALVES, M, BT, BN, STAGES, GROUP,
        )),
    ], [1], [PRODUCER_REGISTERS])  # fmt: skip
