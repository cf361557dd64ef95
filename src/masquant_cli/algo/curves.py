"""What reports draw of one site: who dominates its channels, and what a correction buys at each
rank (the paper's Figures 4 to 6).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from masquant_kernels.quantizers import dequantize_weight, quantize_weight
from torch import Tensor

from masquant_cli.algo.linear import fake_quant_rows
from masquant_cli.algo.low_rank import (
    LowRank,
    best_low_rank,
    effective_rank,
    smoothed_gram,
    unwhitened_low_rank,
)
from masquant_cli.algo.metrics import db


@dataclass(frozen=True)
class Bits:
    """How a site is quantized; see `quantize_weight` and `quantize_rows`."""

    weight: int = 4
    activation: int = 8
    group_size: int | None = None
    symmetric: bool = True


@dataclass(frozen=True)
class RankCurve:
    """SQNR in dB of eq. 29 at each of `ranks`, with the whitened correction (`cmc`) and with the
    plain truncated SVD of the residual (`svd`); effective ranks of the residual's spectrum."""

    ranks: tuple[int, ...]
    cmc: tuple[float, ...]
    svd: tuple[float, ...]
    effective_unwhitened: float
    effective_whitened: float


def dominance(absmax: Tensor) -> Tensor:
    """Share of channels whose largest range is each modality's: absmax [M, in] -> f64 [M].

    That modality sets the uniform smoothing factor (eq. 11). Channels that never fired belong to
    no one; a tie goes to the modality listed first.
    """
    fired = absmax.amax(0) > 0
    winner = absmax.argmax(0)[fired]
    counts = torch.bincount(winner, minlength=len(absmax)).double()
    return counts / counts.sum().clamp_min(1)


def range_ratios(absmax: Tensor) -> list[Tensor]:
    """alpha of every modality: the largest range of a channel over the modality's own, >= 1.

    absmax [M, in] -> M vectors, each without the channels where that modality never fired.
    """
    largest = absmax.double().amax(0)
    return [(largest / own.double())[own > 0] for own in absmax]


def own_weight_db(weight: Tensor, scale: Tensor, rows: Tensor, bits: Bits) -> float:
    """SQNR in dB of eq. 21: a modality served by a weight quantized for its own scale.

    weight [out, in], scale [in], rows [n, in], all fp32. With one scale for all modalities this
    is what uniform smoothing gives.
    """
    wanted = rows @ weight.T
    got = fake_quant_rows(rows / scale, bits.activation) @ rounded(weight * scale, bits).T
    return _db(wanted, wanted - got)


def rounded(weight: Tensor, bits: Bits, integers: Tensor | None = None) -> Tensor:
    """`weight [out, in]` after rounding to nearest, or to `integers [out, in]` on the same grid."""
    nearest = quantize_weight(weight, bits.weight, bits.group_size, bits.symmetric)
    return dequantize_weight(nearest if integers is None else nearest._replace(q=integers))


def rank_curve(
    weight: Tensor,
    base: Tensor,
    scale: Tensor,
    heldout: Tensor,
    ratios: Sequence[float],
    bits: Bits,
    *,
    gram: Tensor | None = None,
    rows: Tensor | None = None,
) -> RankCurve:
    """Eq. 29 at the rank int(ratio * min(out, in)) of each ratio, activations quantized.

    weight [out, in]; base [out, in] is the shared Q(W s_0); scale [in] is the modality's; heldout
    [n, in] judges. The correction is found from exactly one of `gram` [in, in] (of unsmoothed
    inputs, to any constant factor) and `rows` [k, in]; past k columns it has nothing to add.
    """
    delta = weight * scale - base
    ranks = tuple(int(ratio * min(weight.shape)) for ratio in ratios)
    inputs = {"rows": rows / scale} if rows is not None else {"gram": smoothed_gram(gram, scale)}
    top = max(ranks)
    whitened, plain = best_low_rank(delta, top, **inputs), unwhitened_low_rank(delta, top)
    smoothed = heldout / scale
    target = heldout @ weight.T
    error = target - fake_quant_rows(smoothed, bits.activation) @ base.T

    def at(found: LowRank, rank: int) -> float:  # the first r columns are the best of rank r
        fixed = smoothed @ found.lr_a[:, :rank] @ found.lr_b[:rank]
        return _db(target, error - fixed)

    return RankCurve(
        ranks=ranks,
        cmc=tuple(at(whitened, rank) for rank in ranks),
        svd=tuple(at(plain, rank) for rank in ranks),
        effective_unwhitened=effective_rank(plain.singular_values),
        effective_whitened=effective_rank(whitened.singular_values),
    )


def _db(signal: Tensor, noise: Tensor) -> float:
    return db(float(signal.double().square().sum()), float(noise.double().square().sum()))
