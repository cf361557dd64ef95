"""smooth_quant and add_smooth_quant: one program smooths and rounds one token.

    u = prologue(x) * smooth_inv[modality]     prologue: nothing, RMSNorm, or silu(x) * up
    scale = max(absmax(u) / limit, tiny)       limit = 2^(bits - 1) - 1
    q = round(u / scale)

Both divisions are correctly rounded, so that q is that of reference.py bit for bit (except
after RMSNorm and SiLU, where the order of a sum and exp differ).
"""

import torch
import triton
import triton.language as tl

from masquant_kernels.gpu import tiles
from masquant_kernels.gpu.common import backend_op, cast, round_half_even
from masquant_kernels.quantizers import TINY, qmax

_TINY = tl.constexpr(TINY)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def smooth_quant_kernel(
    x_ptr, residual_ptr, up_ptr, total_ptr, norm_ptr, inv_ptr, mod_ptr, q_ptr, scale_ptr,
    x_stride, residual_stride, up_stride, M, eps, limit,
    K: tl.constexpr, Kp: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row is walked up to three times: mean square, absmax, round. With BLOCK >= K the
    compiler sees single steps that load the same values, and keeps the row in registers."""
    t = tl.program_id(0).to(tl.int64)
    x_ptr += t * x_stride
    if residual_ptr is not None:
        residual_ptr += t * residual_stride
        total_ptr += t * K
    if up_ptr is not None:
        up_ptr += t * up_stride
    m = 0
    if mod_ptr is not None:
        m = tl.load(mod_ptr + t)
    known = (m >= 0) & (m < M)
    inv_ptr += tl.where(known, m, 0).to(tl.int64) * K
    lane = tl.arange(0, BLOCK)

    rstd = 1.0
    if norm_ptr is not None:
        squares = tl.zeros([BLOCK], tl.float32)
        for k in range(0, K, BLOCK):
            x = _input(x_ptr, residual_ptr, k + lane, K).to(tl.float32)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares, 0) / K + eps)

    largest = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for k in range(0, K, BLOCK):
        x = _input(x_ptr, residual_ptr, k + lane, K)
        u = _smoothed(x, up_ptr, norm_ptr, inv_ptr, rstd, k + lane, K)
        largest = tl.maximum(largest, tl.abs(u))
        bad |= (~(tl.abs(u) <= _LARGEST)).to(tl.int32)  # false for a NaN too
    # Integers cannot say NaN: the scale does, and carries it into every output of this token.
    good = known & (tl.max(bad, 0) == 0)
    scale = tl.maximum(tl.math.div_rn(tl.max(largest, 0), limit), _TINY)
    tl.store(scale_ptr + t, tl.where(good, scale, float("nan")))

    q_ptr += t * Kp
    for k in range(0, Kp, BLOCK):
        x = _input(x_ptr, residual_ptr, k + lane, K)
        if residual_ptr is not None:
            tl.store(total_ptr + k + lane, x, mask=k + lane < K)
        u = _smoothed(x, up_ptr, norm_ptr, inv_ptr, rstd, k + lane, K)
        q = round_half_even(tl.math.div_rn(u, scale))
        tl.store(q_ptr + k + lane, tl.where(good, q, 0.0).to(tl.int8), mask=k + lane < Kp)


@triton.jit
def _input(x_ptr, residual_ptr, k, K):
    """x, or x + residual rounded to their dtype, zero past K."""
    x = tl.load(x_ptr + k, mask=k < K, other=0.0)
    if residual_ptr is not None:
        other = tl.load(residual_ptr + k, mask=k < K, other=0.0)
        x = cast(x.to(tl.float32) + other.to(tl.float32), x.dtype)
    return x


@triton.jit
def _smoothed(x, up_ptr, norm_ptr, inv_ptr, rstd, k, K):
    """prologue(x) * smooth_inv of this token, f32, zero past K."""
    x = x.to(tl.float32)
    if norm_ptr is not None:
        x = x * rstd * tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if up_ptr is not None:
        up = tl.load(up_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        x = x * tl.sigmoid(x) * up
    return x * tl.load(inv_ptr + k, mask=k < K, other=0.0)


@backend_op
def smooth_quant(arch, out, x, smooth_inv, modality, bits, norm_weight=None, eps=0.0, up=None):
    _launch(arch, out, None, x, None, smooth_inv, modality, bits, norm_weight, eps, up)
    return out


@backend_op
def add_smooth_quant(arch, out, x, residual, smooth_inv, modality, bits, norm_weight=None, eps=0.0):
    *quantized, total = out
    _launch(arch, quantized, total, x, residual, smooth_inv, modality, bits, norm_weight, eps, None)
    return out


def _launch(
    arch, quantized, total, x, residual, smooth_inv, modality, bits, norm_weight, eps, up
):  # fmt: skip
    q, scale = quantized
    tokens, columns = x.shape
    tile = tiles.find("smooth_quant", arch, tokens, columns)
    residual_stride = 0 if residual is None else residual.stride(0)
    up_stride = 0 if up is None else up.stride(0)
    if norm_weight is not None:
        norm_weight = norm_weight.contiguous()
    smooth_quant_kernel[(tokens,)](
        x, residual, up, total, norm_weight, smooth_inv, modality, q, scale,
        x.stride(0), residual_stride, up_stride,
        len(smooth_inv), eps, float(qmax(bits)),
        K=columns, Kp=q.shape[1], **tile.options,
    )  # fmt: skip
