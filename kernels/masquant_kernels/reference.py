"""Every op in plain torch: the definition that all fast paths are held to, on any device.

One token x of modality m meets a site and its fused linears like this (docs/format.md):

    u = prologue(x) * smooth_inv[m]            prologue: nothing, RMSNorm, or silu(x) * up
    q, scale = quantize(u)                     one scale per token
    h = u @ lr_a[m-1]                          no low rank for m = 0, the base modality
    y = (q @ Qw.T) * scale * weight_scale.T + h @ lr_b[m-1] + bias

Differentiable where the arithmetic is, so it also serves when a gradient is asked for.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from masquant_kernels.packing import PACK_BLOCK, unpack_int4
from masquant_kernels.quantizers import quantize_rows

ROWS = 4096  # weight rows expanded at a time: bounds the memory of the int4 -> float copy


def smooth(
    x: Tensor,
    smooth_inv: Tensor,
    modality: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    up: Tensor | None = None,
) -> Tensor:
    """u = prologue(x) * smooth_inv[modality], float [T, K] -> f32 [T, K]."""
    x = x.float()
    if norm_weight is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm_weight.float()
    if up is not None:
        x = torch.nn.functional.silu(x) * up.float()
    return x * (smooth_inv[0] if modality is None else smooth_inv[modality.long()])


def smooth_quant(
    x: Tensor,
    smooth_inv: Tensor,
    modality: Tensor | None,
    bits: int,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    q, scale = quantize_rows(smooth(x, smooth_inv, modality, norm_weight, eps, up), bits)
    # int8 cannot say NaN: the row's scale does, and carries it into every output.
    bad = ~torch.isfinite(q).all(-1)
    scale = scale[:, 0].masked_fill(bad, torch.nan)
    q = q.masked_fill(bad[:, None], 0).to(torch.int8)
    return torch.nn.functional.pad(q, (0, -q.shape[1] % PACK_BLOCK)), scale


def add_smooth_quant(
    x: Tensor,
    residual: Tensor,
    smooth_inv: Tensor,
    modality: Tensor | None,
    bits: int,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    total = x + residual
    return *smooth_quant(total, smooth_inv, modality, bits, norm_weight, eps), total


def lowrank_down(
    x: Tensor,
    smooth_inv: Tensor,
    modality: Tensor,
    lr_a: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    up: Tensor | None = None,
) -> Tensor:
    count, _, rank = lr_a.shape
    h = x.new_zeros(x.shape[0], count, rank, dtype=torch.float32)
    for m in range(1, count + 1):
        rows = (modality == m).nonzero().flatten()
        if len(rows):  # factors of absent modalities are never touched
            given = None if up is None else up[rows]
            u = smooth(x[rows], smooth_inv[m : m + 1], None, norm_weight, eps, given)
            h[rows, m - 1] = u @ lr_a[m - 1].float()
    return h.flatten(1).to(hidden_dtype(x.dtype))


def hidden_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of h, given x's: f32 stays, 16-bit floats become bf16 (h may exceed fp16's range)."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def gemm_w4a8(
    q: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    h: Tensor | None,
    lr_b: Tensor | None,
    modality: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    weights = _Weights(weight_packed, weight_scale, weight_zero_point, group_size, 4, q.shape[1])
    return add_low_rank_and_bias(_integer_gemm(q, scale, weights), bias, h, lr_b).to(dtype)


def gemm_w8a8(
    q: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    h: Tensor | None,
    lr_b: Tensor | None,
    modality: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    columns = weight_packed.shape[1]
    weights = _Weights(weight_packed, weight_scale, None, group_size, 8, columns)
    return add_low_rank_and_bias(_integer_gemm(q[:, :columns], scale, weights), bias, h, lr_b).to(
        dtype
    )


def gemm_decode(
    q: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    weight_bits: int,
    dtype: torch.dtype,
) -> Tensor:
    rest = (group_size, bias, None, None, None, dtype)
    if weight_bits == 4:
        return gemm_w4a8(q, scale, weight_packed, weight_scale, weight_zero_point, *rest)
    return gemm_w8a8(q, scale, weight_packed, weight_scale, *rest)


def gemm_w4a16(
    u: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    h: Tensor | None,
    lr_b: Tensor | None,
    modality: Tensor | None,
    dtype: torch.dtype,
    weight_bits: int = 4,  # 8 has no op of its own: only this definition serves it
) -> Tensor:
    weights = _Weights(
        weight_packed, weight_scale, weight_zero_point, group_size, weight_bits, u.shape[1]
    )
    y = _by_rows(weights, u, lambda a: u.float() @ weights.dequantized(a).T)
    return add_low_rank_and_bias(y, bias, h, lr_b).to(dtype)


class _Weights(NamedTuple):
    """The stored weight of a GEMM, read ROWS output channels at a time."""

    packed: Tensor
    scale: Tensor  # f32 [N, groups]
    zero: Tensor | None  # int8 [N, groups]
    group_size: int  # 0: one scale per output channel
    bits: int
    columns: int  # inputs of the activations it meets, padding included

    def integers(self, start: int) -> Tensor:
        """int8 [<= ROWS, columns]"""
        packed = self.packed[start : start + ROWS]
        return unpack_int4(packed, self.columns) if self.bits == 4 else packed

    def dequantized(self, start: int) -> Tensor:
        """(q - zero) * scale, f32 [<= ROWS, columns]; columns past the last group stay zero."""
        q, scale = self.integers(start).float(), self.scale[start : start + ROWS]
        groups = scale.shape[1]
        size = self.group_size or self.columns
        w = q[:, : groups * size].reshape(len(q), groups, -1)
        if self.zero is not None:
            w = w - self.zero[start : start + ROWS, :, None].float()
        w = (w * scale[..., None]).flatten(1)
        return torch.nn.functional.pad(w, (0, self.columns - w.shape[1]))


def _integer_gemm(q: Tensor, scale: Tensor, weights: _Weights) -> Tensor:
    """(q @ Qw.T) * scale * weight_scale.T -> f32 [T, N]."""
    if weights.group_size or weights.zero is not None:
        y = _by_rows(weights, q, lambda a: q.float() @ weights.dequantized(a).T)
        return y * scale[:, None]
    # Exact sums of integers: fp32 holds them up to 2^24, fp64 up to 2^53.
    largest = 127 * 2 ** (weights.bits - 1) * q.shape[1]
    exact = torch.float32 if largest <= 2**24 else torch.float64
    y = _by_rows(weights, q, lambda a: (q.to(exact) @ weights.integers(a).to(exact).T).float())
    return y * scale[:, None] * weights.scale.T


def _by_rows(weights: _Weights, x: Tensor, part) -> Tensor:
    starts = range(0, len(weights.packed), ROWS)
    if not starts:
        return torch.zeros(len(x), 0, device=x.device)
    return torch.cat([part(a) for a in starts], 1)


def add_low_rank_and_bias(
    y: Tensor, bias: Tensor | None, h: Tensor | None, lr_b: Tensor | None
) -> Tensor:
    """y + h @ lr_b + bias; h is zero where a token has another modality."""
    if h is not None:
        for m, part in enumerate(h.float().split(lr_b.shape[1], 1)):
            rows = part.any(1).nonzero().flatten()
            if len(rows):
                y = y.index_add(0, rows, part[rows] @ lr_b[m].float())
    return y if bias is None else y + bias.float()


def _as_op(function):
    def run(_out, *args, **kwargs):
        return function(*args, **kwargs)

    run.__module__ = __name__
    return run


OPS = {
    f.__name__: _as_op(f)
    for f in (
        smooth_quant,
        add_smooth_quant,
        lowrank_down,
        gemm_w4a8,
        gemm_w8a8,
        gemm_w4a16,
        gemm_decode,
    )
}
