"""Scores of a quantized model, as pure functions: SQNR, KL, flips and their intervals."""

import math

import torch
from torch import Tensor

MAX_DB = 200.0  # an exact match; infinity is not JSON


def db(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two energies, at most MAX_DB."""
    if noise <= signal * 10 ** (-MAX_DB / 10):
        return MAX_DB
    return max(10 * math.log10(signal / noise), -MAX_DB) if signal > 0 else -MAX_DB


def energies(reference: Tensor, other: Tensor, ids: Tensor, classes: int) -> Tensor:
    """Signal and noise energy per class: f64 [classes, 2], so that batches can be added up.

    reference, other: [T, C]; ids: i64 [T] in [0, classes), negative ones are left out.
    """
    signal = reference.float().square().sum(-1, dtype=torch.float64)
    noise = (reference.float() - other.float()).square().sum(-1, dtype=torch.float64)
    kept = ids >= 0
    out = torch.zeros(classes, 2, dtype=torch.float64, device=reference.device)
    pairs = torch.stack([signal, noise], -1)[kept]
    return out.index_add_(0, ids[kept], pairs)


def kl_nats(logits: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) in nats per row, p = softmax(logits), q = softmax(other). [T, V] -> f32 [T]."""
    p, q = logits.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)  # rounding alone can make it negative


def flips(logits: Tensor, other: Tensor) -> Tensor:
    """Whether the most likely token changed. [T, V], [T, V] -> bool [T]."""
    return logits.argmax(-1) != other.argmax(-1)


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a share, both ends in [0, 1]. Unlike a bootstrap it stays honest
    at 0 and at 1. Raises ValueError when n is 0."""
    if n <= 0:
        raise ValueError("an interval needs at least one sample")
    p, z2 = hits / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_ratio(
    numerator: Tensor, denominator: Tensor, *, seed: int, resamples: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of sum(numerator) / sum(denominator) over resampled samples.

    numerator, denominator: [n], one entry per sample (edits and words, nats and tokens).
    """
    n, generator = len(numerator), torch.Generator().manual_seed(seed)
    numerator, denominator = numerator.double(), denominator.double()
    ratios = []
    for _ in range(resamples):
        draw = torch.randint(n, (n,), generator=generator)
        below = denominator[draw].sum()
        if below > 0:  # a resample of only empty references has no ratio
            ratios.append(numerator[draw].sum() / below)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(torch.stack(ratios), ends).tolist()
    return low, high
