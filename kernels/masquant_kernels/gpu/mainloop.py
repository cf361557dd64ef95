"""The sums that every GEMM here is made of, as tiles [BN, BT]: Y^T = W X^T.

The weight is the left operand because tensor cores take that one from registers, where four-bit
integers are unpacked. A step takes BK inputs in two halves: at 4 bits a byte holds inputs j (low
nibble) and 64 + j (high nibble) of a block of 128, see packing.py.

rn [BN], rt [BT]: rows of the weight and of the activations, inside their tensors.
"""

import triton
import triton.language as tl

from masquant_kernels.gpu.common import INTERPRET


@triton.jit
def unpack(p):
    """Bytes of two nibbles -> int8 (16 * low, 16 * high), exact.

    Times 16, a nibble needs no sign extension: one shift and two masks serve four bytes.
    """
    if INTERPRET:
        return (p << 4).to(tl.int8), (p & -16).to(tl.int8)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            shl.b32 t, $2, 4;
            and.b32 $1, $2, 0xF0F0F0F0;
            and.b32 $0, t, 0xF0F0F0F0;
            }""",
            "=r,=r,r", [p], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def load(at, column, columns, RAGGED: tl.constexpr):
    """What lies at the pointers; zero past the end of a row, which only RAGGED loads can reach."""
    if RAGGED:
        return tl.load(at, mask=column < columns, other=0)
    else:
        return tl.load(at)


@triton.jit
def channel_sums(
    q_ptr, w_ptr, rt, rn, start, stop, q_columns, w_columns,
    BITS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """sum over inputs start <= k < stop of Qw[rn, k] * q[rt, k] -> int32 [BN, BT], exact;
    16 times that at 4 bits.

    start: a multiple of BK. RAGGED: the last step runs past the rows' ends.
    Two products a step at 8 bits too: with one, sm_80 and sm_89 spill the fragments that they
    fetch ahead.
    """
    HALF: tl.constexpr = BK // 2
    OTHER: tl.constexpr = 64 if BITS == 4 else HALF  # the second half's inputs lie this further
    BYTES: tl.constexpr = HALF if BITS == 4 else BK  # of a weight row that a step reads
    j = tl.arange(0, HALF)
    kq = start + (j // 64 * 128 + j % 64 if BITS == 4 else j)
    kw = start // BK * BYTES + j
    q_at = q_ptr + rt[None, :].to(tl.int64) * q_columns + kq[:, None]
    w_at = w_ptr + rn[:, None].to(tl.int64) * w_columns + kw[None, :]
    acc = tl.zeros((BN, BT), tl.int32)
    for _ in range(start, stop, BK):
        q0 = load(q_at, kq[:, None], q_columns, RAGGED)
        q1 = load(q_at + OTHER, kq[:, None] + OTHER, q_columns, RAGGED)
        w0 = load(w_at, kw[None, :], w_columns, RAGGED)
        if BITS == 4:
            w0, w1 = unpack(w0)
        else:
            w1 = load(w_at + OTHER, kw[None, :] + OTHER, w_columns, RAGGED)
        acc = tl.dot(w0, q0, acc, out_dtype=tl.int32)
        acc = tl.dot(w1, q1, acc, out_dtype=tl.int32)
        q_at += BK
        w_at += BYTES
        kq += BK
        kw += BYTES
    return acc


@triton.jit
def centred(sums, zero_ptr, input_sums_ptr, rt, rn, BITS: tl.constexpr):
    """channel_sums without the factor 16 and with the zero points taken out, int32 [BN, BT].

    input_sums_ptr: int32 [T], the sum of q over a row; present when zero_ptr, int8 [N], is.
    """
    if BITS == 4:
        sums = sums >> 4
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + rn).to(tl.int32)
        sums -= zero[:, None] * tl.load(input_sums_ptr + rt)[None, :]
    return sums


@triton.jit
def group_sums(
    q_ptr, w_ptr, scale_ptr, zero_ptr, input_sums_ptr, rt, rn, start, stop,
    q_columns, w_columns, G,
    BITS: tl.constexpr, GROUP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """sum over k of (Qw[rn, k] - zero[rn, g]) * weight_scale[rn, g] * q[rt, k] -> f32 [BN, BT].

    GROUP: inputs g of a group: 32, 64 or a multiple of 128. start: a multiple of 128.
    input_sums_ptr: int32 [T, q_columns / min(GROUP, 128)], sums of q over that many inputs;
    present when zero_ptr, int8 [N, G], is.
    Integer sums are exact; those of the groups are added in order, in f32.
    """
    STEP: tl.constexpr = 32 if GROUP == 32 else 64
    j = tl.arange(0, STEP)
    acc = tl.zeros((BN, BT), tl.float32)
    q_row = q_ptr + rt[None, :].to(tl.int64) * q_columns + j[:, None]
    w_row = w_ptr + rn[:, None].to(tl.int64) * w_columns + j[None, :]
    for k in range(start, stop, 128):
        for j0 in tl.static_range(0, 64, STEP):
            low, high = k + j0, k + j0 + 64  # first inputs of the two halves
            # Scales are asked for ahead of the products, which hide how long they take.
            scale0, zero0, sums0 = _of_groups(
                scale_ptr, zero_ptr, input_sums_ptr, rt, rn, low, q_columns, G, BITS, GROUP
            )
            scale1, zero1, sums1 = _of_groups(
                scale_ptr, zero_ptr, input_sums_ptr, rt, rn, high, q_columns, G, BITS, GROUP
            )
            q0 = tl.load(q_row + low)
            q1 = tl.load(q_row + high)
            if BITS == 4:
                w0, w1 = unpack(tl.load(w_row + k // 2 + j0))
            else:
                w0 = load(w_row + low, low + j[None, :], w_columns, RAGGED)
                w1 = load(w_row + high, high + j[None, :], w_columns, RAGGED)
            part = tl.dot(w0, q0, out_dtype=tl.int32)
            if GROUP < 128:
                acc += (part - zero0 * sums0).to(tl.float32) * scale0
                part = tl.dot(w1, q1, out_dtype=tl.int32)
            else:
                part = tl.dot(w1, q1, part, out_dtype=tl.int32)
            acc += (part - zero1 * sums1).to(tl.float32) * scale1
    return acc


@triton.jit
def _of_groups(
    scale_ptr, zero_ptr, input_sums_ptr, rt, rn, k, q_columns, G,
    BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Scales [BN, 1] and zero points [BN, 1] of input k's group and sums [1, BT] of the inputs
    around it, in the unit of the product, which is 16 at 4 bits."""
    UNIT: tl.constexpr = 16 if BITS == 4 else 1
    SUMMED: tl.constexpr = GROUP if GROUP < 128 else 128
    scale = of_group(scale_ptr, rn, k // GROUP, G)[:, None] * (1.0 / UNIT)
    if zero_ptr is not None:
        zero = of_group(zero_ptr, rn, k // GROUP, G).to(tl.int32)[:, None] * UNIT
        sums = of_group(input_sums_ptr, rt, k // SUMMED, q_columns // SUMMED)[None, :]
        return scale, zero, sums
    else:
        return scale, 0, 0


@triton.jit
def of_group(ptr, rows, g, G):
    """[:, G] -> what `rows` hold for group g; zero past the last one, where inputs are padding."""
    inside = tl.zeros_like(rows) + g < G  # a vector: the interpreter takes no scalar for a mask
    return tl.load(ptr + rows.to(tl.int64) * G + g, mask=inside, other=0)
