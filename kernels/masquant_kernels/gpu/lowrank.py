"""lowrank_down: h[t, m-1] = u[t] @ lr_a[m-1] for the modality m of token t, zeros elsewhere.

The inputs are summed in parts, so that few tokens still fill a GPU: `parts_kernel` writes what
each part sums to, `finish_kernel` adds them in order, applies RMSNorm's factor of the row (it
commutes with the product) and writes all of h. A tile of tokens without modality m costs one
look at their ids.
"""

import torch
import triton
import triton.language as tl

from masquant_kernels.gpu import tiles
from masquant_kernels.gpu.common import backend_op, cast


@triton.jit(do_not_specialize=["T"])
def parts_kernel(
    x_ptr, up_ptr, norm_ptr, inv_ptr, mod_ptr, lr_a_ptr, parts_ptr, squares_ptr,
    x_stride, up_stride, T, K, R, span,
    BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """parts[s, t] = u[t] @ lr_a[m-1] over inputs s * span <= k < (s + 1) * span, f32 [S, T, R],
    before RMSNorm's rsqrt; squares f32 [S, T]: the sum of x^2 over them, when norm_ptr is given.

    Program (i, j, s): BT tokens; BR columns of one modality's lr_a. Rows of other tokens of the
    tile are left as they are.
    """
    rt = tl.program_id(0) * BT + tl.arange(0, BT)
    across = tl.cdiv(R, BR)
    m = tl.program_id(1) // across + 1
    r = tl.program_id(1) % across * BR + tl.arange(0, BR)
    s = tl.program_id(2)
    mine = (rt < T) & (tl.load(mod_ptr + rt, mask=rt < T, other=0) == m)
    if tl.max(mine.to(tl.int32), 0) == 0:
        return

    start = s * span
    stop = tl.minimum(start + span, K)
    j = tl.arange(0, BK)
    x_row = x_ptr + rt[:, None].to(tl.int64) * x_stride
    if up_ptr is not None:
        up_row = up_ptr + rt[:, None].to(tl.int64) * up_stride
    acc = tl.zeros((BT, BR), tl.float32)
    squares = tl.zeros((BT,), tl.float32)
    for k0 in range(start, stop, BK):
        k = k0 + j
        inside = mine[:, None] & (k < stop)[None, :]
        u = tl.load(x_row + k[None, :], mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(inv_ptr + m.to(tl.int64) * K + k, mask=k < stop, other=0.0)
        if norm_ptr is not None:
            squares += tl.sum(u * u, 1)
            factor = factor * tl.load(norm_ptr + k, mask=k < stop, other=0.0).to(tl.float32)
        if up_ptr is not None:
            up = tl.load(up_row + k[None, :], mask=inside, other=0.0).to(tl.float32)
            u = u * tl.sigmoid(u) * up
        u *= factor[None, :]
        lr_a = tl.load(
            lr_a_ptr + ((m - 1) * K + k)[:, None].to(tl.int64) * R + r[None, :],
            mask=(k < stop)[:, None] & (r < R)[None, :],
            other=0.0,
        )
        if x_ptr.dtype.element_ty == tl.float32:
            acc = tl.dot(u, lr_a.to(tl.float32), acc, input_precision="tf32x3")
        else:  # in f16, each row divided by a power of two so that nothing overflows
            power, inverse = _power_of_two(tl.max(tl.abs(u), 1))
            part = tl.dot((u * inverse[:, None]).to(tl.float16), lr_a)
            acc += part * power[:, None]

    at = (s * T + rt).to(tl.int64)
    tl.store(parts_ptr + at[:, None] * R + r[None, :], acc, mask=mine[:, None] & (r < R)[None, :])
    if norm_ptr is not None:
        tl.store(squares_ptr + at, squares, mask=mine)  # programs of one tile write the same


@triton.jit
def _power_of_two(v):
    """The largest power of two <= v >= 0, and its inverse; both kept finite and normal."""
    exponent = tl.minimum(tl.maximum(v.to(tl.int32, bitcast=True) >> 23, 1), 253)
    power = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return power, inverse


@triton.jit(do_not_specialize=["T"])
def finish_kernel(
    parts_ptr, squares_ptr, mod_ptr, h_ptr, T, K, M, R, eps,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of h: the sum of the parts in the columns of the token's modality, else zero."""
    t = tl.program_id(0)
    m = tl.load(mod_ptr + t)
    rstd = 1.0
    if squares_ptr is not None:
        squares = 0.0
        if (m > 0) & (m < M):
            for s in range(SPLIT):
                squares += tl.load(squares_ptr + (s * T + t).to(tl.int64))
        rstd = tl.rsqrt(squares / K + eps)
    width = (M - 1) * R
    for c0 in range(0, width, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        mine = (c // R == m - 1) & (c < width)
        total = tl.zeros([BLOCK], tl.float32)
        for s in range(SPLIT):
            at = parts_ptr + (s * T + t).to(tl.int64) * R + c % R
            total += tl.load(at, mask=mine, other=0.0)
        h = tl.where(mine, total * rstd, 0.0)
        tl.store(
            h_ptr + t.to(tl.int64) * width + c, cast(h, h_ptr.dtype.element_ty), mask=c < width
        )


@backend_op
def lowrank_down(arch, out, x, smooth_inv, modality, lr_a, norm_weight=None, eps=0.0, up=None):
    tokens, columns = x.shape
    count, _, rank = lr_a.shape
    if not count * rank:
        return out
    if norm_weight is not None:
        norm_weight = norm_weight.contiguous()
    name = "lowrank_down_f32" if x.dtype == torch.float32 else "lowrank_down"
    tile = tiles.find(name, arch, tokens, columns, rank)
    options = tile.options
    span = -(-columns // (tile.split * options["BK"])) * options["BK"]
    split = -(-columns // span)
    parts = x.new_empty(split, tokens, rank, dtype=torch.float32)
    squares = None if norm_weight is None else parts.new_empty(split, tokens)
    grid = triton.cdiv(tokens, options["BT"]), count * triton.cdiv(rank, options["BR"]), split
    parts_kernel[grid](
        x, up, norm_weight, smooth_inv, modality, lr_a.contiguous(), parts, squares,
        x.stride(0), 0 if up is None else up.stride(0), tokens, columns, rank, span, **options,
    )  # fmt: skip
    finish_kernel[(tokens,)](
        parts, squares, modality, out, tokens, columns, count + 1, rank, eps,
        SPLIT=split, BLOCK=min(1024, triton.next_power_of_2(count * rank)),
    )  # fmt: skip
    return out
