"""The two modules of a quantized checkpoint. Equation 29, for a token x of modality m:

    y = Q(x / s_m) @ Qw.T + (x / s_m) @ lr_a[m-1] @ lr_b[m-1] + bias      (no lr for m = 0)

A MasSite smooths, quantizes and projects (lr_a) the input once for all linears that read
it; a MasLinear holds one packed weight. This is the plain torch definition, on any device.
"""

import contextlib
from typing import NamedTuple

import torch
from masquant_kernels import (
    QWeight,
    dequantize_weight,
    packed_columns,
    quantize_rows,
    unpack_int4,
)
from torch import Tensor, nn

from masquant_cli.runtime.context import ModalityContext
from masquant_cli.runtime.scheme import Scheme


class SiteInput(NamedTuple):
    """One smoothed input, ready for every linear of its site. T is all tokens of the batch."""

    q: Tensor  # f32 [T, in]: integers, or the smoothed values when activations stay floats
    scale: Tensor | None  # f32 [T, 1]
    low_rank: tuple[tuple[int, Tensor, Tensor], ...]  # (m, rows [n], hidden f32 [n, r])


class _Cached(NamedTuple):
    x: Tensor  # held, so that identity cannot be confused by a recycled object
    version: int | None
    grad: bool
    value: SiteInput
    uses_left: int


def _fp32(x: Tensor):
    """Autocast would round integers and sums to bf16; entering the context costs when it is off."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


class _FixedDtype(nn.Module):
    """A module whose buffers keep their dtypes under `.to(dtype)`: scales are f32 by definition."""

    def _apply(self, fn, recurse=True):
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)


class MasSite(_FixedDtype):
    """Smoothing, quantization and L1 of one site.

    Buffers: smooth_inv f32 [M, in] = 1 / s; lr_a f16 [M-1, in, r] when the rank is not 0.
    """

    def __init__(self, in_features: int, members: int, rank: int, scheme: Scheme, device=None):
        super().__init__()
        self.in_features, self.members, self.rank = in_features, members, rank
        self.activation_bits = scheme.activation_bits
        modalities = len(scheme.modalities)
        smooth_inv = torch.empty(modalities, in_features, device=device, dtype=torch.float32)
        self.register_buffer("smooth_inv", smooth_inv)
        if rank:
            lr_a = torch.empty(
                modalities - 1, in_features, rank, device=device, dtype=torch.float16
            )
            self.register_buffer("lr_a", lr_a)
        self.context: ModalityContext | None = None  # set by install

    def forward(self, x: Tensor) -> SiteInput:
        """x: float [..., in]. Raises ValueError on a wrong width or on ids that do not fit."""
        cache = None if torch.compiler.is_compiling() else self.context.state.cache
        if cache is None or self.members == 1:
            return self.compute(x)
        version = None if x.is_inference() else x._version
        key = (version, torch.is_grad_enabled())
        hit = cache.pop(self, None)
        if hit is not None and hit.x is x and (hit.version, hit.grad) == key:
            value, uses_left = hit.value, hit.uses_left - 1
        else:
            value, uses_left = self.compute(x), self.members - 1
        if uses_left:
            cache[self] = _Cached(x, *key, value, uses_left)
        return value

    def compute(self, x: Tensor) -> SiteInput:
        """`forward` without the cache."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected {self.in_features} inputs, got {tuple(x.shape)}")
        batch = self.context.current(x.shape)
        x = x.reshape(-1, self.in_features).float()
        with _fp32(x):
            if batch.rows:
                x = x * self.smooth_inv[batch.ids.flatten().to(x.device)]
            else:
                x = x * self.smooth_inv[0]
            low_rank = ()
            if self.rank:
                # Rows of absent modalities, and their factors, are never touched.
                present = [(m, rows.to(x.device)) for m, rows in batch.rows]
                low_rank = tuple(
                    (m, rows, x[rows] @ self.lr_a[m - 1].float()) for m, rows in present
                )
            if self.activation_bits >= 16:
                return SiteInput(x, None, low_rank)
            return SiteInput(*quantize_rows(x, self.activation_bits), low_rank)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, modalities={len(self.smooth_inv)}, rank={self.rank}"


class MasLinear(_FixedDtype):
    """One quantized linear. Weights follow torch, [out, in].

    Buffers: weight_packed int8 [out, ceil(in/128)*64] at 4 bits, [out, in] at 8;
    weight_scale f32 [out, groups]; weight_zero_point int8 [out, groups] when asymmetric;
    lr_b f16 [M-1, r, out] when the rank is not 0; bias [out] in the model's dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scheme: Scheme,
        bias_dtype: torch.dtype | None = None,
        device=None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight_bits, self.grouped = scheme.weight_bits, scheme.group_size is not None

        def buffer(name: str, dtype: torch.dtype, *shape: int) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

        columns = packed_columns(in_features) if scheme.weight_bits == 4 else in_features
        groups = scheme.groups(in_features)
        buffer("weight_packed", torch.int8, out_features, columns)
        buffer("weight_scale", torch.float32, out_features, groups)
        if scheme.symmetric:
            self.register_buffer("weight_zero_point", None)
        else:
            buffer("weight_zero_point", torch.int8, out_features, groups)
        if rank:
            buffer("lr_b", torch.float16, len(scheme.modalities) - 1, rank, out_features)
        if bias_dtype is None:
            self.register_buffer("bias", None)
        else:
            buffer("bias", bias_dtype, out_features)

    def bind(self, site: MasSite) -> None:
        """Use `site` for the input. It is registered beside this module, not inside it."""
        self.__dict__["site"] = site

    def integers(self) -> Tensor:
        """The stored integers, int8 [out, in]."""
        if self.weight_bits == 4:
            return unpack_int4(self.weight_packed, self.in_features)
        return self.weight_packed

    def dequantized(self) -> Tensor:
        """The weight that the base modality's smoothed input meets, f32 [out, in]."""
        return dequantize_weight(
            QWeight(self.integers(), self.weight_scale, self.weight_zero_point)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: float [..., in] -> [..., out] in x's dtype; everything inside is fp32."""
        given = self.site(x)
        with _fp32(x):
            if given.scale is None:
                y = given.q @ self.dequantized().T
            elif self.grouped or self.weight_zero_point is not None:
                y = (given.q @ self.dequantized().T) * given.scale
            else:
                # Products of integers: fp32 sums them exactly up to 2^24.
                y = (given.q @ self.integers().float().T) * given.scale * self.weight_scale.T
            for m, rows, hidden in given.low_rank:
                y.index_add_(0, rows, hidden @ self.lr_b[m - 1].float())
            if self.bias is not None:
                y = y + self.bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in={self.in_features}, out={self.out_features}, bits={self.weight_bits}, "
            f"groups={self.weight_scale.shape[1]}, rank={self.rank}, bias={self.bias is not None}"
        )
