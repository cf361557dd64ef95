"""Random operands of one linear and of its site, the same for every implementation compared."""

from dataclasses import dataclass
from functools import cached_property

import torch
from masquant_kernels import pack_int4
from torch import Tensor

from masquant_cli.algo.low_rank import rank_for
from masquant_cli.bench.about import cache_bytes
from masquant_cli.bench.shapes import Linear

EPS = 1e-6


@dataclass(frozen=True)
class Tokens:
    """What flows in: count, dtype, and the share of vision tokens (one span, as images are)."""

    count: int
    dtype: torch.dtype
    vision: float = 0.0

    def modality(self, device) -> Tensor | None:
        """int32 [T], or None when every token is text."""
        seen = round(self.count * self.vision)
        if not seen:
            return None
        ids = torch.zeros(self.count, dtype=torch.int32, device=device)
        start = (self.count - seen) // 2
        ids[start : start + seen] = 1
        return ids


class Weights:
    """One quantized linear: packed at 4 and at 8 bits, and the same numbers as floats.

    Timings rotate among `copies` of a weight, enough of them that none stays in the cache.
    """

    def __init__(self, linear: Linear, device: torch.device, seed: int = 0, ratio: float = 0.0):
        self.linear, self.device = linear, device
        self.rank = rank_for(ratio, linear.k, linear.n) if ratio else 0
        generator = torch.Generator(device).manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, device=device, generator=generator)

        self.four = torch.randint(
            -7, 8, (linear.n, linear.k), dtype=torch.int8, device=device, generator=generator
        )
        self.scale = (0.5 + uniform(linear.n, 1)) / (7 * linear.k**0.5)
        self.smooth_inv = 0.5 + uniform(2, linear.k)
        self.norm = 0.5 + uniform(linear.k)
        shape = (1, linear.k, self.rank), (1, self.rank, linear.n)
        self.lr_a, self.lr_b = (
            ((uniform(*s) - 0.5) / max(s[1], 1) ** 0.5).half() if self.rank else None for s in shape
        )

    @cached_property
    def packed4(self) -> Tensor:
        return pack_int4(self.four)

    @cached_property
    def packed8(self) -> Tensor:
        """The integers of 4 bits spread over 8: another weight of the same size."""
        return self.four * 17

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.four * self.scale).to(dtype)

    def resident(self, bits: int) -> int:
        """Bytes of a quantized linear with its site, as a checkpoint holds them."""
        packed = self.packed4 if bits == 4 else self.packed8
        parts = (packed, self.scale, self.smooth_inv, self.lr_a, self.lr_b)
        return sum(part.nbytes for part in parts if part is not None)


def activations(linear: Linear, tokens: Tokens, device: torch.device, seed: int = 1) -> Tensor:
    """x [T, K] with a few channels four times as wide as the rest, as decoders have them."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens.count, linear.k, device=device, generator=generator)
    x[:, :: max(linear.k // 16, 1)] *= 4
    return x.to(tokens.dtype)


def copies(tensor: Tensor, device: torch.device) -> list[Tensor]:
    """The tensor and as many clones as it takes not to find it in a CPU's cache again.

    On a GPU the clock empties the cache instead.
    """
    if device.type == "cuda" or not tensor.nbytes:
        return [tensor]
    count = -(-2 * cache_bytes(device) // tensor.nbytes)
    return [tensor, *(tensor.clone() for _ in range(min(count, 128) - 1))]
