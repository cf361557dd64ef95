"""The single definition of rounding: weights (stored) and activations (per token, at run time).

Integers come back as integers and scales as scales, so that fake-quant, packing and
integer kernels can be compared value for value. Everything is computed in fp32 and
rounds half to even.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny  # an all-zero row must not divide by zero


class QWeight(NamedTuple):
    """A quantized weight: `w ~ (q - zero) * scale`, scale and zero repeated over each group."""

    q: Tensor  # int8 [out, in]
    scale: Tensor  # f32 [out, groups]
    zero: Tensor | None  # int8 [out, groups]; None when symmetric


def qmax(bits: int) -> int:
    """Largest integer of the symmetric range: 127 at 8 bits, 31 at 6, 7 at 4."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be between 2 and 8, got {bits}")
    return 2 ** (bits - 1) - 1


def quantize_weight(
    w: Tensor, bits: int, group_size: int | None = None, symmetric: bool = True
) -> QWeight:
    """Round a weight to nearest, one scale per output channel or per group of inputs.

    symmetric:  scale = absmax / (2^(b-1) - 1), q in [-(2^(b-1) - 1), 2^(b-1) - 1]
    asymmetric: 4 bits only; the range is widened to contain 0, scale = (max - min) / 15,
                zero = round(-8 - min / scale), q in [-8, 7]

    w: float [out, in]. Raises ValueError on a wrong shape, a group size that does not
    divide `in`, or values that are not finite.
    """
    if w.ndim != 2:
        raise ValueError(f"a weight is [out, in], got shape {tuple(w.shape)}")
    out, columns = w.shape
    group = group_size or columns
    if columns % group:
        raise ValueError(f"group size {group} does not divide {columns} inputs")
    w = w.float().reshape(out, columns // group, group)
    low, high = w.amin(-1), w.amax(-1)
    if not (torch.isfinite(low) & torch.isfinite(high)).all():  # NaN shows in both
        raise ValueError("the weight has values that are not finite")
    if symmetric:
        limit = qmax(bits)
        scale = _divide(torch.maximum(-low, high), limit).clamp_min(TINY)
        q = (w / scale[..., None]).round_().clamp_(-limit, limit)
        return QWeight(q.to(torch.int8).reshape(out, columns), scale, None)
    if bits != 4:
        raise ValueError(f"asymmetric weights are 4 bits, got {bits}")
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = _divide(high - low, 15).clamp_min(TINY)
    zero = (-8 - low / scale).round_().clamp_(-8, 7)
    q = ((w / scale[..., None]).round_() + zero[..., None]).clamp_(-8, 7)
    return QWeight(q.to(torch.int8).reshape(out, columns), scale, zero.to(torch.int8))


def dequantize_weight(qw: QWeight) -> Tensor:
    """`(q - zero) * scale` -> f32 [out, in]."""
    q, scale, zero = qw
    w = q.reshape(*scale.shape, q.shape[1] // scale.shape[1]).float()
    if zero is not None:
        w = w - zero[..., None].float()
    return (w * scale[..., None]).reshape(q.shape)


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric quantization, one scale per row (token).

    scale = absmax / (2^(b-1) - 1), q = round(x / scale). x: float [..., in]. Returns q
    (f32 [..., in], integer-valued) and scale (f32 [..., 1]); `q * scale` approximates x.
    A row with a NaN or an infinity comes back as NaN: it is never hidden.
    """
    limit = qmax(bits)
    x = x.float()
    scale = _divide(x.abs().amax(-1, keepdim=True), limit).clamp_min(TINY)
    # No clamp is needed for finite rows: |x| <= absmax gives |x / scale| <= limit + rounding.
    return (x / scale).round(), scale


def _divide(x: Tensor, number: int) -> Tensor:
    """Correctly rounded on every device: CUDA turns a division by a plain number into a product
    with its inverse, which would move scales by one bit against those packed on a CPU."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)
