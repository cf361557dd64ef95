"""One weight for all linears of a site: q, k, v (or gate, up) meet their input as one GEMM.

The linears keep their buffers, as views into the fused tensors, so that memory is not spent twice
and state dicts, files and in-place updates are what they would be for linears of their own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Buffer of a linear -> the axis that counts its outputs.
AXES = {"weight_packed": 0, "weight_scale": 0, "weight_zero_point": 0, "bias": 0, "lr_b": 2}


class Weights(NamedTuple):
    """What one GEMM reads; N is the outputs of one linear or of a whole site. Shapes: MasLinear."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None
    lr_b: Tensor | None


def weights_of(linear: nn.Module) -> Weights:
    """The weights of one linear alone."""
    weights = Weights(*(linear._buffers.get(name) for name in AXES))
    if weights.lr_b is None or weights.lr_b.is_contiguous():
        return weights
    return weights._replace(lr_b=weights.lr_b.contiguous())


@torch.no_grad()
def fuse(linears: Sequence[nn.Module]) -> Weights | None:
    """Join the buffers of `linears` and leave views in their place.

    None, and nothing changed, when they cannot be joined: on several devices, offloaded (meta),
    or with a bias in some and not in others.
    """
    joined = {}
    with torch.inference_mode(False):  # a buffer made in inference mode could not be updated later
        for name, axis in AXES.items():
            parts = [linear._buffers.get(name) for linear in linears]
            kinds = {part if part is None else (part.device, part.dtype) for part in parts}
            if len(kinds) > 1 or any(part is not None and part.is_meta for part in parts):
                return None
            joined[name] = None if parts[0] is None else torch.cat(parts, axis)
        outs = [linear.out_features for linear in linears]
        for name, axis in AXES.items():
            if joined[name] is not None:
                for linear, part in zip(linears, joined[name].split(outs, axis), strict=True):
                    linear._buffers[name] = part
    return Weights(**joined)


def places(modules: Sequence[nn.Module]) -> list[int]:
    """Addresses of all buffers: they tell whether a module was moved, loaded or changed since."""
    return [
        buffer.data_ptr()
        for module in modules
        for buffer in module._buffers.values()
        if buffer is not None
    ]
