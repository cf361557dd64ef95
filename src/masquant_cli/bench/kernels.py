"""Every op on its own, on operands that are ready: where a layer's time goes.

A table per linear and token count. Quantizing ops are measured against the bytes they move; the
GEMMs against dense float and against the products that torch and others have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from masquant_kernels import ops, reference
from torch import Tensor

from masquant_cli.bench import gate, peers
from masquant_cli.bench.measure import Candidate, compare
from masquant_cli.bench.operands import EPS, Tokens, Weights, activations, copies
from masquant_cli.bench.roofline import Roof
from masquant_cli.bench.shapes import Linear
from masquant_cli.bench.timing import Clock
from masquant_cli.progress import Progress


@dataclass(frozen=True)
class Settings:
    """What `bench kernels` and `bench layers` vary."""

    linears: Sequence[Linear]
    tokens: Sequence[int]
    ratios: Sequence[float] = (0.01, 0.02, 0.05)  # of the rank; 0 is always measured
    vision: Sequence[float] = (0.5, 1.0)  # share of vision tokens; 0 is always measured
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0


def rows(settings: Settings, clock: Clock, roof: Roof, progress: Progress) -> Iterator[list[dict]]:
    """The rows of one linear and token count after another."""
    progress.stage("kernels", len(settings.linears) * len(settings.tokens), "tables")
    for linear in settings.linears:
        for tokens in settings.tokens:
            found = compare(_table(linear, tokens, settings, clock.device), clock, roof)
            place = {"site": linear.name, "shape": linear.shape, "tokens": tokens}
            yield [{**place, **row} for row in found]
            progress.advance(1)


def _table(linear: Linear, count: int, settings: Settings, device) -> Iterator[Candidate]:
    tokens = Tokens(count, settings.dtype)
    weights = Weights(linear, device, settings.seed)
    x = activations(linear, tokens, device)
    q, scale = reference.smooth_quant(x, weights.smooth_inv, None, 8)
    yield from peers.dense(weights, x)
    yield from quantizers(weights, x)
    yield from gemms(weights, x, q, scale)
    for ratio in settings.ratios:
        ranked = Weights(linear, device, settings.seed, ratio)
        if not ranked.rank:
            continue
        for share in settings.vision:
            modality = Tokens(count, settings.dtype, share).modality(device)
            if modality is not None:
                labels = {"rank_ratio": ratio, "rank": ranked.rank, "vision": share}
                yield from low_rank(ranked, x, q, scale, modality, labels)
    yield from peers.int_mm(weights, q, scale, settings.dtype)
    yield from peers.onednn(weights, q, scale, settings.dtype)
    yield from peers.fp8(weights, x)


def quantizers(weights: Weights, x: Tensor) -> Iterator[Candidate]:
    """smooth_quant behind nothing, behind RMSNorm, behind silu * up, and with a residual added."""
    tokens, k = x.shape
    item, inv = x.element_size(), weights.smooth_inv
    base = {"x": x, "smooth_inv": inv, "modality": None, "bits": 8}
    plain = {"norm_weight": None, "eps": 0.0}
    norm = {"norm_weight": weights.norm, "eps": EPS}
    moved = tokens * k * (item + 1)
    yield op("smooth_quant", {**base, **plain, "up": None}, moved=moved)
    yield op("smooth_quant", {**base, **norm, "up": None}, " + norm", moved=moved)
    up = {**base, **plain, "up": x.roll(1, 0)}
    yield op("smooth_quant", up, " + silu*up", moved=moved + item * tokens * k)
    residual = {"x": x, "residual": x.roll(1, 0), "smooth_inv": inv, "modality": None, "bits": 8}
    moved += 2 * item * tokens * k
    yield op("add_smooth_quant", residual | norm, " + norm", moved=moved)


def gemms(weights: Weights, x: Tensor, q: Tensor, scale: Tensor) -> Iterator[Candidate]:
    """Without low rank: what text tokens take."""
    rest = {"bias": None, "h": None, "lr_b": None, "modality": None, "dtype": x.dtype}
    given = {"q": q, "scale": scale}
    four = {"weight_packed": weights.packed4, "weight_scale": weights.scale}
    eight = {"weight_packed": weights.packed8, "weight_scale": weights.scale}
    zero = {"weight_zero_point": None, "group_size": 0}
    yield gemm("gemm_w4a8", weights, given | four | zero | rest)
    yield gemm("gemm_w8a8", weights, given | eight | {"group_size": 0} | rest)
    yield gemm("gemm_w4a16", weights, {"u": x} | four | zero | rest, kind=peers.say(x.dtype))
    if x.shape[0] <= ops.DECODE_TOKENS:
        for bits, packed in ((4, four), (8, eight)):
            tail = {"bias": None, "weight_bits": bits, "dtype": x.dtype}
            yield gemm("gemm_decode", weights, given | packed | zero | tail, f" W{bits}")


def low_rank(
    weights: Weights, x: Tensor, q: Tensor, scale: Tensor, modality: Tensor, labels: dict
) -> Iterator[Candidate]:
    """lowrank_down, and the GEMM with its epilogue, for some vision tokens."""
    tokens, k = x.shape
    n, rank, seen = weights.linear.n, weights.rank, int((modality > 0).sum())
    suffix = f" rank {labels['rank_ratio']:g}, vision {labels['vision']:.0%}"
    site = {"smooth_inv": weights.smooth_inv, "modality": modality, "lr_a": weights.lr_a}
    down = {"x": x, **site, "norm_weight": None, "eps": 0.0, "up": None}
    moved = x.element_size() * seen * k + 2 * k * rank + 2 * tokens * rank
    kind = peers.say(x.dtype)
    flops = 2 * seen * k * rank
    yield op("lowrank_down", down, suffix, flops=flops, moved=moved, kind=kind, labels=labels)
    h = reference.lowrank_down(x, **site)
    given = {
        "q": q, "scale": scale, "weight_packed": weights.packed4, "weight_scale": weights.scale,
        "weight_zero_point": None, "group_size": 0,
        "bias": None, "h": h, "lr_b": weights.lr_b, "modality": modality, "dtype": x.dtype,
    }  # fmt: skip
    extra = 2 * seen * rank * n
    yield gemm("gemm_w4a8", weights, given, suffix, extra=extra, labels=labels)


def gemm(name, weights: Weights, given: dict, suffix="", kind="int8", extra=0.0, labels=None):
    first, k, n = next(iter(given.values())), weights.linear.k, weights.linear.n
    tokens = first.shape[0]
    moved = first.nbytes + given["weight_packed"].nbytes + tokens * n * given["dtype"].itemsize
    flops = 2 * tokens * k * n + extra
    return op(name, given, suffix, flops=flops, moved=moved, kind=kind, labels=labels)


def op(name: str, given: dict, suffix="", *, flops=0.0, moved=0.0, kind="int8", labels=None):
    """An op of ours as a candidate: checked backend by backend, timed as a caller calls it."""
    call = getattr(torch.ops.masquant, name)
    first = next(iter(given.values()))
    packed = given.get("weight_packed")
    kept = copies(packed, first.device) if packed is not None else [None]
    variants = [tuple(given.values())]
    for copy in kept[1:]:
        variants.append(tuple(copy if v is packed else v for v in given.values()))
    labels = {"op": name, **(labels or {})}

    def run(i: int):
        return call(*variants[i % len(variants)])

    def check():
        labels["backend"], found = gate.check_op(name, given)
        return found

    part = packed is None
    return Candidate(name + suffix, run, check, flops, moved, kind, part=part, labels=labels)
