"""Equation 29 for all tokens and all linears of a site, on the ops of masquant_kernels.

    u = front(x) * smooth_inv[m]        front: nothing, RMSNorm, or silu(x) * up
    y = Q(u) @ Qw.T + u @ lr_a[m-1] @ lr_b[m-1] + bias

T tokens, K inputs, N outputs; everything inside is fp32, whatever the dtype of x.
"""

from typing import NamedTuple

import torch
from masquant_kernels import ops, reference
from torch import Tensor

from masquant_cli.runtime.fused import Weights


class Bits(NamedTuple):
    """How a site's numbers are stored, as a Scheme says."""

    weight: int  # 4 | 8
    activation: int  # 16: activations stay floats
    group_size: int  # 0: one scale per output channel


class Front(NamedTuple):
    """What happens to x before it is smoothed: nothing, RMSNorm, or silu(x) * up."""

    norm_weight: Tensor | None = None
    eps: float = 0.0
    up: Tensor | None = None  # [T, K]


def outputs(
    x: Tensor,
    front: Front,
    smooth_inv: Tensor,
    lr_a: Tensor | None,
    modality: Tensor | None,
    weights: Weights,
    bits: Bits,
) -> Tensor:
    """x f32 | bf16 | f16 [T, K] -> [T, N] in its dtype. modality int32 [T], None: all base."""
    if torch.is_autocast_enabled(x.device.type):  # it would round integers and sums to bf16
        with torch.autocast(x.device.type, enabled=False):
            return outputs(x, front, smooth_inv, lr_a, modality, weights, bits)
    up = front.up
    wanted = x.requires_grad or (up is not None and up.requires_grad)
    # The reference is differentiable (through scales and the low-rank part), the ops are not.
    run = reference if wanted and torch.is_grad_enabled() else ops
    packed, scale, zero, bias, lr_b = weights
    h = None
    if modality is not None and lr_a is not None:
        h = run.lowrank_down(x, smooth_inv, modality, lr_a, *front)
    if bits.activation >= 16:
        u = reference.smooth(x, smooth_inv, modality, *front)
        given = packed, scale, zero, bits.group_size, bias, h, lr_b, modality, x.dtype
        if bits.weight == 8:
            return reference.gemm_w4a16(u, *given, weight_bits=8)
        return run.gemm_w4a16(u.to(x.dtype) if x.is_cuda else u, *given)  # its tensor cores' dtype
    q, step = run.smooth_quant(x, smooth_inv, modality, bits.activation, *front)
    given = q, step, packed, scale
    if h is None and x.shape[0] <= ops.DECODE_TOKENS:
        return run.gemm_decode(*given, zero, bits.group_size, bias, bits.weight, x.dtype)
    rest = bits.group_size, bias, h, lr_b, modality, x.dtype
    if bits.weight == 8:
        return run.gemm_w8a8(*given, *rest)
    return run.gemm_w4a8(*given, zero, *rest)
