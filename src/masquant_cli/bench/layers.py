"""What a linear costs with its quantization: smooth_quant, lowrank_down and the fused GEMM.

Against dense float x @ W.T in its fastest dtype. Norms and silu are on neither side, so nothing
is gained here by fusing them. With the four linears of a model, `layer` is all of them in turn.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from masquant_kernels import reference
from torch import Tensor

from masquant_cli.bench import gate, peers
from masquant_cli.bench.kernels import Settings
from masquant_cli.bench.measure import Candidate, compare
from masquant_cli.bench.operands import Tokens, Weights, activations, copies
from masquant_cli.bench.roofline import Roof
from masquant_cli.bench.shapes import Linear
from masquant_cli.bench.timing import Clock
from masquant_cli.progress import Progress


def rows(
    settings: Settings, clock: Clock, roof: Roof, progress: Progress, *, layer: bool = False
) -> Iterator[list[dict]]:
    """The rows of one linear and token count after another, at last of all in turn if `layer`."""
    groups = [(linear,) for linear in settings.linears]
    if layer:
        groups.append(tuple(settings.linears))
    progress.stage("layers", len(groups) * len(settings.tokens), "tables")
    for group in groups:
        whole = len(group) > 1
        for tokens in settings.tokens:
            found = compare(_table(group, tokens, settings, clock.device), clock, roof)
            shape = "layer" if whole else group[0].shape
            place = {"site": "layer" if whole else group[0].name, "shape": shape, "tokens": tokens}
            rows = [{**place, **row} for row in found]
            _overhead(rows)
            yield rows
            progress.advance(1)


def _table(group: Sequence[Linear], count: int, settings: Settings, device) -> Iterator[Candidate]:
    """Candidates of each linear, those of one name joined into one that runs all of them."""
    plain = Tokens(count, settings.dtype)
    inputs = {linear: activations(linear, plain, device) for linear in group}
    made = {linear: Weights(linear, device, settings.seed) for linear in group}
    yield from _joined([list(peers.dense(made[linear], inputs[linear])) for linear in group])
    for bits in (4, 8):
        yield from _joined([[quantized(made[li], inputs[li], plain, bits)] for li in group])
    for ratio in settings.ratios:
        ranked = {linear: Weights(linear, device, settings.seed, ratio) for linear in group}
        if not all(w.rank for w in ranked.values()):
            continue
        for share in (0.0, *settings.vision):
            tokens = Tokens(count, settings.dtype, share)
            if share and tokens.modality(device) is None:
                continue
            parts = [[quantized(ranked[li], inputs[li], tokens, 4, ratio)] for li in group]
            yield from _joined(parts)
    if len(group) == 1:
        yield from peers.composed_int8(made[group[0]], inputs[group[0]])
        yield from peers.libraries(made[group[0]], inputs[group[0]])


def quantized(
    weights: Weights, x: Tensor, tokens: Tokens, bits: int, ratio: float = 0.0
) -> Candidate:
    """One site and its fused linear as the runtime runs them."""
    k, n, count, rank = weights.linear.k, weights.linear.n, x.shape[0], weights.rank
    modality = tokens.modality(x.device)
    packed = weights.packed4 if bits == 4 else weights.packed8
    kept = copies(packed, x.device)
    forward = site_forward(torch.ops.masquant, weights, bits, x.dtype)

    def run(i: int):
        return forward(x, modality, kept[i % len(kept)])

    def check():
        labels["backend"] = ", ".join(_served(weights, x, modality, bits))
        y, rows = run(0), gate.sample(count, x.device)
        chosen = None if modality is None else modality[rows]
        want = site_forward(reference, weights, bits, x.dtype)(x[rows], chosen, packed)
        low_rank = modality is not None and rank > 0
        return gate.floats(y[rows], want, 2 * gate.tolerance(x.dtype, k, low_rank))

    seen = 0 if modality is None else int((modality > 0).sum())
    item = x.element_size()
    flops = 2 * count * k * n + 2 * seen * rank * (k + n)
    moved = item * count * (k + n) + packed.nbytes + 2 * (rank * (k + n) if seen else 0)
    name = f"W{bits}A8" + (f" rank {ratio:g}, vision {tokens.vision:.0%}" if ratio else "")
    resident = weights.resident(bits)
    labels = {
        "bits": bits, "rank_ratio": ratio, "rank": rank, "vision": tokens.vision,
        "weight_bytes": resident, "weight_ratio_float32": resident / (4 * k * n),
    }  # fmt: skip
    return Candidate(name, run, check, flops, moved, "int8", labels=labels)


def site_forward(ops, weights: Weights, bits: int, dtype: torch.dtype) -> Callable:
    """forward(x, modality, packed) through torch.ops.masquant, or through the reference."""

    def forward(x: Tensor, modality: Tensor | None, packed: Tensor) -> Tensor:
        q, scale = ops.smooth_quant(x, weights.smooth_inv, modality, 8)
        h = lr_b = None
        if modality is not None and weights.rank:
            h, lr_b = ops.lowrank_down(x, weights.smooth_inv, modality, weights.lr_a), weights.lr_b
        tail = (0, None, h, lr_b, modality if h is not None else None, dtype)
        if bits == 4:
            return ops.gemm_w4a8(q, scale, packed, weights.scale, None, *tail)
        return ops.gemm_w8a8(q, scale, packed, weights.scale, *tail)

    return forward


def _joined(parts: Sequence[Sequence[Candidate]]) -> Iterator[Candidate]:
    """The i-th candidates of every linear as one, which runs them one after another."""
    for same in zip(*parts, strict=True):
        if len(same) == 1:
            yield same[0]
            continue
        labels = dict(same[0].labels)
        for key in ("rank", "weight_ratio_float32"):
            labels.pop(key, None)
        if "weight_bytes" in labels:
            labels["weight_bytes"] = sum(c.labels["weight_bytes"] for c in same)

        def check(same=same, labels=labels):
            found = gate.worst([c.check() for c in same])
            if "backend" in same[0].labels:  # known once it was asked
                labels["backend"] = same[0].labels["backend"]
            return found

        yield Candidate(
            same[0].name,
            lambda i, same=same: [c.run(i) for c in same],
            check,
            sum(c.flops for c in same),
            sum(c.moved for c in same),
            same[0].kind,
            baseline=same[0].baseline,
            labels=labels,
        )


def _overhead(rows: list[dict]) -> None:
    """What low rank adds: time over that of the same quantized linear without it, less 1."""
    base = next((r for r in rows if r["name"] == "W4A8"), {}).get("seconds")
    for row in rows:
        if base and row.get("rank_ratio") and "seconds" in row:
            row["low_rank_overhead"] = row["seconds"] / base - 1


def _served(weights: Weights, x: Tensor, modality: Tensor | None, bits: int) -> list[str]:
    """The backends that run this site's quantizer and GEMM."""
    given = {"x": x, "smooth_inv": weights.smooth_inv, "modality": modality, "bits": 8}
    given |= {"norm_weight": None, "eps": 0.0, "up": None}
    q, scale = reference.smooth_quant(x, weights.smooth_inv, modality, 8)
    packed = weights.packed4 if bits == 4 else weights.packed8
    product = {"q": q, "scale": scale, "weight_packed": packed, "weight_scale": weights.scale}
    product |= {"weight_zero_point": None} if bits == 4 else {}
    product |= {"group_size": 0, "bias": None, "h": None, "lr_b": None, "modality": None}
    product["dtype"] = x.dtype
    asked = (("smooth_quant", given), (f"gemm_w{bits}a8", product))
    return list(dict.fromkeys(gate.serving(op, given) for op, given in asked))
