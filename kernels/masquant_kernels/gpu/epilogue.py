"""What a GEMM does after its sum: the low-rank term, the bias, the store. Tiles are [BN, BT]."""

import triton
import triton.language as tl

from masquant_kernels.gpu.common import INTERPRET, cast


@triton.jit
def add_low_rank(
    y, h_ptr, lr_b_ptr, mod_ptr, rt, rn, T, N, M, R,
    BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y + (h @ lr_b)^T, f32 [BN, BT]; h f32 or bf16 [T, (M-1) * R], lr_b f16 [M-1, R, N].

    A modality that no token of the tile has is skipped, its factors are not read. Where tokens
    of several share a tile, h is zero for those of another one.
    """
    mod = tl.load(mod_ptr + rt, mask=rt < T, other=0)
    r = tl.arange(0, BR)
    h_row = h_ptr + rt[None, :].to(tl.int64) * ((M - 1) * R)
    for m in range(1, M):
        if tl.max((mod == m).to(tl.int32), 0) > 0:
            first = (m - 1) * R
            for r0 in tl.range(0, R, BR, num_stages=STAGES):
                rank = r0 + r
                h = tl.load(
                    h_row + (first + rank)[:, None],
                    mask=(rank < R)[:, None] & (rt < T)[None, :],
                    other=0.0,
                )
                lr_b = tl.load(
                    lr_b_ptr + (first + rank)[None, :].to(tl.int64) * N + rn[:, None],
                    mask=(rank < R)[None, :] & (rn < N)[:, None],
                    other=0.0,
                )
                if h.dtype == tl.float32 or INTERPRET:
                    lr_b = lr_b.to(tl.float32)
                    y = tl.dot(lr_b, h.to(tl.float32), y, input_precision="tf32x3")
                else:  # h may exceed the range of f16
                    y = tl.dot(lr_b.to(tl.bfloat16), h, y)
    return y


@triton.jit
def add_bias(y, bias_ptr, rn, N):
    """y + bias, f32 [BN, BT]; bias_ptr may be None."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit
def store(y, y_ptr, rt, rn, T, N):
    """y f32 [BN, BT] -> the rows rt, columns rn of [T, N]."""
    at = y_ptr + rt[None, :].to(tl.int64) * N + rn[:, None]
    y = cast(y, y_ptr.dtype.element_ty)
    tl.store(at, y, mask=(rt < T)[None, :] & (rn < N)[:, None])


@triton.jit
def tile_order(pid, T, N, BT: tl.constexpr, BN: tl.constexpr, SWIZZLE: tl.constexpr):
    """Program -> (tile of tokens, tile of outputs). SWIZZLE tiles of outputs walk all tokens
    together, so that programs that run at the same time share what they read."""
    across = tl.cdiv(N, BN)
    width = SWIZZLE * tl.cdiv(T, BT)
    first = pid // width * SWIZZLE
    height = tl.minimum(across - first, SWIZZLE)
    return pid % width // height, first + pid % width % height
