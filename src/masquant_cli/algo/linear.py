"""One quantized linear, written so that it is obviously right.

Orientation, said once: weights follow torch, `[out, in]`; the paper's W is our weight transposed.
Smoothing scales are vectors `[in]`, the diagonal of the paper's S. With modality m of a token,
scale table `scale [M, in]` and base modality 0, eq. 29 reads

    y = Q(x / s_m) @ Q(W * s_0).T + (x / s_m) @ lr_a[m] @ lr_b[m] + bias      (no lr for m = 0)
"""

import torch
from masquant_kernels.quantizers import (
    QWeight,
    dequantize_weight,
    quantize_rows,
    quantize_weight,
)


def fake_quant_rows(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round trip of `x [..., in]` through the per-token quantizer; 16 bits keep `x`."""
    if bits >= 16:
        return x
    q, scale = quantize_rows(x, bits)
    return q * scale


def fake_quant_weight(
    w: torch.Tensor, bits: int, group_size: int | None = None, symmetric: bool = True
) -> torch.Tensor:
    """Round trip of `w [out, in]` through the weight quantizer."""
    return dequantize_weight(quantize_weight(w, bits, group_size, symmetric))


def fake_quant_rows_ste(x: torch.Tensor, bits: int) -> torch.Tensor:
    """`fake_quant_rows`, differentiable: straight through the rounding, true through the step.

    The step (absmax / qmax) keeps its gradient; without it smoothing would have none, because
    (x / s) and (W s) cancel.
    """
    if bits >= 16:
        return x
    q, step = quantize_rows(x, bits)
    return x + (q - x / step).detach() * step


def fake_quant_weight_ste(
    w: torch.Tensor, bits: int, group_size: int | None = None, symmetric: bool = True
) -> torch.Tensor:
    """`fake_quant_weight`, differentiable in the same sense."""
    return _WeightSte.apply(w, bits, group_size, symmetric)


class _WeightSte(torch.autograd.Function):
    """w + rest * step with rest = q - zero - w / step as a constant: so d/dw is the identity and,
    through the range that the step is a share of, rest's sum at the extremes of a group."""

    @staticmethod
    def forward(ctx, w, bits, group_size, symmetric):
        quantized = quantize_weight(w, bits, group_size, symmetric)
        grouped, step = w.reshape(*quantized.scale.shape, -1), quantized.scale[..., None]
        integers = quantized.q.reshape(grouped.shape).to(w.dtype)
        if quantized.zero is not None:
            integers -= quantized.zero[..., None]
        if symmetric:
            at = grouped.abs().argmax(-1, keepdim=True)
            ends = ((at, grouped.gather(-1, at).sign() / (2 ** (bits - 1) - 1)),)
        else:  # the range was widened to contain 0, which does not move
            high, low = grouped.max(-1, keepdim=True), grouped.min(-1, keepdim=True)
            ends = ((high.indices, (high.values > 0) / 15), (low.indices, (low.values < 0) / -15))
        ctx.ends = ends
        ctx.save_for_backward(integers - grouped / step)
        return (integers.mul_(step)).reshape(w.shape)

    @staticmethod
    def backward(ctx, gradient):
        (rest,) = ctx.saved_tensors
        found = gradient.reshape(rest.shape).clone()
        moved = torch.linalg.vecdot(found, rest).unsqueeze(-1)  # what a longer step would change
        for at, share in ctx.ends:
            found.scatter_add_(-1, at, moved * share)
        return found.reshape(gradient.shape), None, None, None


def compensated_linear(
    x: torch.Tensor,
    ids: torch.Tensor,
    base: QWeight,
    scale: torch.Tensor,
    activation_bits: int,
    low_rank: dict[int, tuple[torch.Tensor, torch.Tensor]],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Eq. 29 for a mix of modalities, in fp32.

    x [..., in], ids [...] int64, base = quantize_weight(W * s_0), scale [M, in],
    low_rank {m: (lr_a [in, r], lr_b [r, out])}. Returns [..., out].

    Activations are multiplied by the inverse scale, as they are at run time: a division could
    round to the other side of a tie and move an integer by one.
    """
    smoothed = x.float() * (1 / scale)[ids]
    if activation_bits >= 16:
        y = smoothed @ dequantize_weight(base).T
    else:
        q, step = quantize_rows(smoothed, activation_bits)
        if base.zero is None and base.scale.shape[1] == 1:
            y = (q @ base.q.float().T) * step * base.scale.T  # exact up to 2^24
        else:
            y = (q @ dequantize_weight(base).T) * step
    for m, (lr_a, lr_b) in low_rank.items():
        here = ids == m
        y[here] += smoothed[here] @ lr_a.float() @ lr_b.float()
    return y if bias is None else y + bias.float()
