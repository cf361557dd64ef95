"""What the paper's Theorem 1 predicts, with the signs that its own proof gives."""

import math

import torch


def misalignment_db(alpha: torch.Tensor) -> float:
    """Change in dB of a modality's SQNR when it is smoothed for another, louder one (eq. 20).

        10 log10( sum_i(1 / alpha_i^2) / (d max_i(1 / alpha_i)^2) )  <= 0,  0 iff alpha is constant

    alpha [d]: per channel, the range of the modality that the scale was made for over the range
    of this one, R^m / R^m'. Only its shape counts: c * alpha gives the same. Raises ValueError
    unless alpha is a non-empty vector of positive, finite numbers; leave dead channels out.

    Reached by tokens that fill every channel of their own range alike. For tokens that only do so
    on average it is the most that is lost over all of them together; a single token may lose more
    or gain, by at most 20 log10(max alpha / min alpha) either way. It presumes rounding errors
    spread evenly over a step; channels pushed below half a step err by less.

    Eq. 17 of the paper subtracts 10 log10(d min_i(alpha_i)^2 / sum_i(1 / alpha_i^2)), which has
    min_i(alpha_i)^2 upside down: it is max_i(1 / alpha_i)^2 in eq. 20. Eq. 19 lacks a factor 10.
    """
    alpha = alpha.double()
    if alpha.ndim != 1 or not len(alpha):
        raise ValueError(f"alpha is [channels], got shape {tuple(alpha.shape)}")
    if not bool(((alpha > 0) & alpha.isfinite()).all()):
        raise ValueError("range ratios are positive and finite")
    return 10 * math.log10(float((alpha.min() / alpha).square().mean()))
