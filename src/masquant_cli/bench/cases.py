"""Inputs on which kernels go wrong: odd sizes, mixed modalities, strides, zeros, NaN, every dtype.

Small ones first, so that a short look at a new GPU has seen every feature; then real sizes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from masquant_kernels import pack_int4, reference
from torch import Tensor

from masquant_cli.bench.operands import EPS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MODALITIES = 3  # text, vision, audio
# tokens, inputs, outputs: below, at and above the blocks that kernels work in
SMALL = ((17, 200, 49), (1, 128, 64), (257, 384, 200), (33, 1024, 96))
LARGE = ((2048, 3584, 4608), (16, 3584, 37888), (257, 18944, 3584), (4096, 3584, 3584))


@dataclass(frozen=True)
class Case:
    title: str
    op: str
    given: dict
    exact: bool = False  # integers all the way: nothing may differ


def cases(device: torch.device, *, large: bool = True, sizes=SMALL, seed: int = 0):
    """Every Case, each made when it is asked for."""
    for dtype in DTYPES:
        for size in sizes:
            make = _Maker(size, dtype, device, seed)
            yield from make.quantizers()
            yield from make.low_rank()
            yield from make.gemms()
    if large:
        for size in LARGE:
            yield from _Maker(size, torch.bfloat16, device, seed).large()


class _Maker:
    def __init__(self, size: tuple[int, int, int], dtype: torch.dtype, device, seed: int):
        self.tokens, self.k, self.n = size
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed + self.tokens)
        self.where = f"{self.tokens}x{self.k}x{self.n} {str(dtype).removeprefix('torch.')}"
        self.smooth_inv = 0.5 + self.rand(MODALITIES, self.k)
        self.norm = (0.5 + self.rand(self.k)).to(dtype)
        self.rank = 24

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device, generator=self.generator)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(
            low, high, shape, dtype=torch.int8, device=self.device, generator=self.generator
        )

    def x(self, kind: str = "") -> Tensor:
        x = self.randn(self.tokens, self.k)
        x[:, ::13] *= 8
        if kind == "zero row":
            x[0] = 0
        if kind == "nan":
            x[0, self.k // 2] = torch.nan
            x[-1, 0] = torch.inf
        x = x.to(self.dtype)
        if kind == "strided":  # rows of a wider tensor, as slices of a fused linear are
            wide = torch.empty(self.tokens, self.k + 8, dtype=self.dtype, device=self.device)
            wide[:, : self.k] = x
            return wide[:, : self.k]
        return x

    def modality(self, kind: str) -> Tensor:
        index = torch.arange(self.tokens, device=self.device)
        chosen = {
            "base": torch.zeros_like(index),
            "vision": torch.ones_like(index),
            "interleaved": index % MODALITIES,
            "span": ((index >= self.tokens // 4) & (index < self.tokens // 2)).long(),
        }[kind]
        return chosen.int()

    def quantizers(self) -> Iterator[Case]:
        none = {"norm_weight": None, "eps": 0.0}
        norm = {"norm_weight": self.norm, "eps": EPS}
        site = {"smooth_inv": self.smooth_inv, "modality": None, "bits": 8}
        for kind in ("", "strided", "zero row", "nan"):
            yield self.case("smooth_quant", kind, {"x": self.x(kind), **site, **none, "up": None})
        mixed = site | {"modality": self.modality("interleaved")}
        for bits in (4, 6):
            given = {"x": self.x(), **mixed, "bits": bits, **none, "up": None}
            yield self.case("smooth_quant", f"A{bits} interleaved", given)
        yield self.case("smooth_quant", "norm", {"x": self.x(), **mixed, **norm, "up": None})
        yield self.case("smooth_quant", "silu*up", {"x": self.x(), **mixed, **none, "up": self.x()})
        for front, title in ((none, "plain"), (norm, "norm")):
            given = {"x": self.x(), "residual": self.x(), **mixed, **front}
            yield self.case("add_smooth_quant", title, given)

    def low_rank(self) -> Iterator[Case]:
        for kind in ("interleaved", "base", "vision", "span"):
            given = self._down(kind, norm_weight=None)
            yield self.case("lowrank_down", kind, given)
        yield self.case("lowrank_down", "norm", self._down("span", norm_weight=self.norm))
        yield self.case("lowrank_down", "silu*up", self._down("span", up=self.x("strided")))

    def _down(self, kind: str, norm_weight=None, up=None) -> dict:
        lr_a = (self.randn(MODALITIES - 1, self.k, self.rank) / self.k**0.5).half()
        return {
            "x": self.x(), "smooth_inv": self.smooth_inv, "modality": self.modality(kind),
            "lr_a": lr_a, "norm_weight": norm_weight, "eps": EPS, "up": up,
        }  # fmt: skip

    def gemms(self) -> Iterator[Case]:
        q, scale = self._quantized()
        bias = self.randn(self.n).to(self.dtype)
        for bits in (4, 8):
            yield self._integers(bits, q)
            yield self._gemm(bits, q, scale, "plain")
            yield self._gemm(bits, q, scale, "bias", bias=bias)
            for kind in ("base", "vision", "interleaved", "span"):
                tail = {"bias": bias, **self._hidden(kind)}
                yield self._gemm(bits, q, scale, f"low rank {kind}", **tail)
        for group in (g for g in (32, 64, 128) if self.k % g == 0):
            tail = self._hidden("interleaved")
            yield self._gemm(4, q, scale, f"group {group}", group=group, **tail)
            yield self._gemm(4, q, scale, f"group {group} zeros", group=group, zero=True, bias=bias)
            yield self._gemm(8, q, scale, f"group {group}", group=group, bias=bias)
        yield self._w4a16("plain")
        yield self._w4a16("low rank", bias=bias, **self._hidden("interleaved"))
        if self.tokens <= 16:
            for bits in (4, 8):
                yield self._decode(bits, q, scale, bias)

    def large(self) -> Iterator[Case]:
        """What a 7B layer meets: 64-bit offsets, many tiles, split sums."""
        q, scale = self._quantized()
        site = {"smooth_inv": self.smooth_inv, "modality": self.modality("span"), "bits": 8}
        front = {"norm_weight": self.norm, "eps": EPS, "up": None}
        yield self.case("smooth_quant", "norm", {"x": self.x(), **site, **front})
        yield self.case("lowrank_down", "span", self._down("span"))
        for bits in (4, 8):
            yield self._integers(bits, q)
            yield self._gemm(bits, q, scale, "low rank span", **self._hidden("span"))
        yield self._w4a16("plain")
        if self.tokens <= 16:
            yield self._decode(4, q, scale, None)

    def _quantized(self) -> tuple[Tensor, Tensor]:
        return reference.smooth_quant(self.x(), self.smooth_inv, None, 8)

    def _hidden(self, kind: str) -> dict:
        modality = self.modality(kind)
        h = self.randn(self.tokens, MODALITIES - 1, self.rank)
        for m in range(1, MODALITIES):
            h[modality != m, m - 1] = 0
        lr_b = (self.randn(MODALITIES - 1, self.rank, self.n) / self.rank**0.5).half()
        h = h.flatten(1).to(reference.hidden_dtype(self.dtype))
        return {"h": h, "lr_b": lr_b, "modality": modality}

    def _weight(self, bits: int, group: int = 0, zero: bool = False) -> dict:
        limit = 7 if bits == 4 else 127
        w = self.integers(-limit, limit + 1, self.n, self.k)
        groups = self.k // group if group else 1
        weight = {
            "weight_packed": pack_int4(w) if bits == 4 else w,
            "weight_scale": (0.5 + self.rand(self.n, groups)) / (limit * self.k**0.5),
        }
        if bits == 4:
            zeros = self.integers(-8, 8, self.n, groups) if zero else None
            weight["weight_zero_point"] = zeros
        return weight | {"group_size": group}

    def _gemm(self, bits, q, scale, title, group=0, zero=False, **tail) -> Case:
        given = {"q": q, "scale": scale, **self._weight(bits, group, zero), **self._tail(**tail)}
        return self.case(f"gemm_w{bits}a8", title, given)

    def _integers(self, bits: int, q: Tensor) -> Case:
        """Unit scales and fp32 outputs: the sums themselves, which stay below 2^24."""
        given = {"q": q, "scale": torch.ones(len(q), device=self.device), **self._weight(bits)}
        given |= self._tail() | {"dtype": torch.float32}
        given["weight_scale"] = torch.ones_like(given["weight_scale"])
        return self.case(f"gemm_w{bits}a8", "integers", given, exact=True)

    def _w4a16(self, title: str, **tail) -> Case:
        given = {"u": self.x(), **self._weight(4), **self._tail(**tail)}
        return self.case("gemm_w4a16", title, given)

    def _decode(self, bits: int, q: Tensor, scale: Tensor, bias: Tensor | None) -> Case:
        weight = {"weight_zero_point": None, **self._weight(bits)}
        order = ("weight_packed", "weight_scale", "weight_zero_point", "group_size")
        given = {"q": q, "scale": scale, **{name: weight[name] for name in order}}
        given |= {"bias": bias, "weight_bits": bits, "dtype": self.dtype}
        return self.case("gemm_decode", f"W{bits}", given)

    def _tail(self, bias=None, h=None, lr_b=None, modality=None) -> dict:
        return {"bias": bias, "h": h, "lr_b": lr_b, "modality": modality, "dtype": self.dtype}

    def case(self, op: str, title: str, given: dict, exact: bool = False) -> Case:
        return Case(" ".join(filter(None, (op, title, self.where))), op, given, exact)
