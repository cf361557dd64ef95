"""Closed-form smoothing scales (eq. 8, 11, 12) and the constants between modalities."""

import torch

FLOOR = 1e-5  # of the largest channel: a channel that never fired must not blow up at run time


def closed_form_scale(
    absmax_x: torch.Tensor, absmax_w: torch.Tensor, beta: float = 0.5
) -> torch.Tensor:
    """s = absmax_x^beta / absmax_w^(1 - beta), eq. 8; eq. 12 is beta = 0.5. All [in], fp32."""
    x = absmax_x.float().clamp_min(FLOOR * float(absmax_x.max()) + 1e-12)
    w = absmax_w.float().clamp_min(FLOOR * float(absmax_w.max()) + 1e-12)
    return x.pow(beta) / w.pow(1 - beta)


def uniform_absmax(absmax: torch.Tensor) -> torch.Tensor:
    """The range that one scale for all modalities must serve, eq. 11: [M, in] -> [in]."""
    return absmax.amax(0)


def align(scale: torch.Tensor, base: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`scale` times the one constant that brings it nearest to `base` in log space.

    A per-token quantizer does not see a constant, the residual (S_m - S_0) W does. Channels
    count by `weight [in]` (their share of the output energy).
    """
    weight = weight / weight.sum().clamp_min(1e-30)
    return scale * torch.exp((weight * (base.log() - scale.log())).sum())
