"""A quantized model run without fusion: each linear on its own, by equation 29 in plain torch."""

import contextlib
from collections.abc import Iterator

import torch
from masquant_kernels import QWeight, dequantize_weight, quantize_rows, unpack_int4
from torch import nn

from masquant_cli.runtime.mas_linear import MasLinear


def plain_linear(linear: MasLinear, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """y [..., out] of one linear for its own input x [..., in]; ids [...] are the modalities."""
    site, q = linear.site, linear.weight_packed
    if linear.weight_bits == 4:
        q = unpack_int4(q, linear.in_features)
    w = dequantize_weight(QWeight(q, linear.weight_scale, linear.weight_zero_point))
    u = x.float() * site.smooth_inv[ids]
    v = u
    if site.bits.activation < 16:
        integers, step = quantize_rows(u, site.bits.activation)
        v = integers * step
    y = v @ w.T
    for m in range(1, len(site.smooth_inv) if linear.rank else 1):
        here = (ids == m)[..., None]
        y = y + here * (u @ site.lr_a[m - 1].float() @ linear.lr_b[m - 1].float())
    y = y if linear.bias is None else y + linear.bias.float()
    return y.to(x.dtype)


@contextlib.contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """While open, `model` runs unfused: a hook on every linear, so nothing is left to a site."""

    def hook(linear, args, _output):
        (x,) = args
        ids = linear.site.context.current(x.shape).ids
        return plain_linear(linear, x, ids if ids.numel() else torch.zeros(1, dtype=torch.long))

    hooks = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, MasLinear)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
