"""The two modules of a quantized checkpoint: a site, and the linears that read its input.

A MasLinear holds one packed weight. A MasSite holds what its linears share and runs them as one
(fused.py), by the equation in equation.py; blocks.py leaves it the norm or SiLU in front.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from masquant_kernels import packed_columns
from torch import Tensor, nn

from masquant_cli.runtime.blocks import MasRMSNorm
from masquant_cli.runtime.context import ModalityContext
from masquant_cli.runtime.equation import Bits, Front, outputs
from masquant_cli.runtime.fused import Weights, fuse, places, weights_of
from masquant_cli.runtime.scheme import Scheme

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_fusing = threading.Lock()


@dataclass(slots=True)
class _Cached:
    """What a site computed for all its linears when the first one asked."""

    x: Tensor  # held, so that identity cannot be confused by a recycled object
    key: tuple  # version of x, and whether gradients were on
    parts: Sequence[Tensor]  # the output of each linear
    left: int  # linears that have not asked yet


class _Quantized(nn.Module):
    """A module whose buffers keep their dtypes under `.to(dtype)`: scales are f32 by definition.

    Copies and pickles get tensors of their own, not the fused ones that they are views of.
    """

    def _apply(self, fn, recurse=True):
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)

    def __getstate__(self):
        own = {k: t if t is None else t.clone() for k, t in self._buffers.items()}
        return {**self.__dict__, "_buffers": own}


class MasSite(_Quantized):
    """Smoothing, quantization and L1 of one site, and the GEMM of all its linears.

    Buffers: smooth_inv f32 [M, in] = 1 / s; lr_a f16 [M-1, in, r] when the rank is not 0.
    """

    def __init__(self, in_features: int, rank: int, scheme: Scheme, device=None):
        super().__init__()
        self.in_features, self.rank = in_features, rank
        self.bits = Bits(scheme.weight_bits, scheme.activation_bits, scheme.group_size or 0)
        modalities = len(scheme.modalities)
        smooth_inv = torch.empty(modalities, in_features, device=device, dtype=torch.float32)
        self.register_buffer("smooth_inv", smooth_inv)
        if rank:
            lr_a = torch.empty(
                modalities - 1, in_features, rank, device=device, dtype=torch.float16
            )
            self.register_buffer("lr_a", lr_a)
        self.__dict__["owner"] = self  # whose buffers are read
        self.context: ModalityContext | None = None  # set by install
        self.fused: tuple[list[int], Weights] | None = None  # places of the linears' buffers, all
        self.bind(())

    def bind(self, linears: Sequence["MasLinear"], norm: MasRMSNorm | None = None) -> None:
        """Run `linears`, behind `norm` if given. All are registered beside this module."""
        self.linears = tuple(linears)
        self.outs = [linear.out_features for linear in linears]
        self.__dict__["norm"] = norm
        for index, linear in enumerate(linears):
            linear.__dict__["site"], linear.index = self, index

    def part(self, linears: Sequence["MasLinear"]) -> "MasSite":
        """Have some of the site's linears run without the others, as those of one expert do."""
        part = MasSite.__new__(MasSite)  # not registered anywhere: it reads this site's buffers
        nn.Module.__init__(part)
        part.in_features, part.rank, part.bits = self.in_features, self.rank, self.bits
        part.__dict__["owner"], part.context, part.fused = self, self.context, None
        part.bind(linears)
        return part

    def __getstate__(self):
        return {**super().__getstate__(), "fused": None}

    def forward(self, x: Tensor, index: int = 0, up: Tensor | None = None) -> Tensor:
        """The output of linear `index` for x, float [..., in]; with `up`, for silu(x) * up.

        Within a forward pass the first linear that asks has all of them computed at once.
        Raises ValueError on a wrong width or on ids that do not fit.
        """
        cache = None if torch.compiler.is_compiling() else self.context.state.cache
        if cache is None or len(self.linears) == 1:
            return self.compute(x, weights_of(self.linears[index]), up)
        key = None if x.is_inference() else x._version, torch.is_grad_enabled()
        hit = cache.get(self)
        if hit is None or hit.x is not x or hit.key != key:
            weights = self.weights()
            if weights is None:
                return self.compute(x, weights_of(self.linears[index]), up)
            parts = self.compute(x, weights, up).split_with_sizes(self.outs, -1)
            hit = cache[self] = _Cached(x, key, parts, len(parts))
        hit.left -= 1
        if not hit.left:  # the outputs live no longer than they are needed
            del cache[self]
        return hit.parts[index]

    def weights(self) -> Weights | None:
        """All linears as one; None where that cannot be (fused.py)."""
        fused = self.fused
        if fused is not None and fused[0] == places(self.linears):
            return fused[1]
        with _fusing:  # or two threads would leave views into two copies
            fused = self.fused
            if fused is None or fused[0] != places(self.linears):
                self.fused = None
                weights = fuse(self.linears)
                if weights is None:
                    return None
                self.fused = fused = places(self.linears), weights
            return fused[1]

    def compute(self, x: Tensor, weights: Weights, up: Tensor | None = None) -> Tensor:
        """x, up: float [..., in] -> [..., N] in x's dtype."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected {self.in_features} inputs, got {tuple(x.shape)}")
        buffers = self.owner._buffers
        y = outputs(
            _rows(x),
            Front(*self._norm(x), None if up is None else _rows(up)),
            buffers["smooth_inv"],
            buffers.get("lr_a"),
            self.context.current(x.shape).on(x.device),
            weights,
            self.bits,
        )
        if y.dtype is not x.dtype:
            y = y.to(x.dtype)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])

    def _norm(self, x: Tensor) -> tuple[Tensor | None, float]:
        """Weight and eps of the norm that x is still to go through."""
        norm = self.norm
        if norm is None:
            return None, 0.0
        owner, unnormed, weight = self.context.state.unnormed
        if owner is not norm:
            return None, 0.0
        if unnormed is not x:
            raise RuntimeError(
                "the norm left its work to the linears behind it, but they were given another "
                "tensor than its output; a forward hook on any of them makes it work on its own"
            )
        return weight, norm.variance_epsilon

    def extra_repr(self) -> str:
        return f"in={self.in_features}, modalities={len(self.smooth_inv)}, rank={self.rank}"


def _rows(x: Tensor) -> Tensor:
    """[..., in] -> [T, in] as the ops take it."""
    if x.ndim != 2:
        x = x.reshape(-1, x.shape[-1])
    if x.dtype not in _FLOATS:
        x = x.float()
    return x if x.stride(1) == 1 else x.contiguous()


class MasLinear(_Quantized):
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
        self.weight_bits = scheme.weight_bits

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

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """x: float [..., in] -> [..., out] in x's dtype; with `up`, for silu(x) * up."""
        return self.site(x, self.index, up)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = f"{prefix}lr_b"
        if key in destination:  # a slice of the site's, which files cannot hold as it is
            destination[key] = destination[key].contiguous()

    def extra_repr(self) -> str:
        return (
            f"in={self.in_features}, out={self.out_features}, bits={self.weight_bits}, "
            f"groups={self.weight_scale.shape[1]}, rank={self.rank}, bias={self.bias is not None}"
        )
