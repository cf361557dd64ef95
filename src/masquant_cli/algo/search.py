"""The search for one exponent, as AWQ and MBQ do it (eq. 9): no gradients, a grid of 21 values."""

from collections.abc import Sequence

import torch

from masquant_cli.algo.linear import fake_quant_rows
from masquant_cli.algo.site import SiteProblem

GRID = tuple(i / 20 for i in range(21))
FLOOR = 1e-4  # of a scale, before it is centred


def pooled_mean_abs(problem: SiteProblem) -> torch.Tensor:
    """Mean |x| [in] over the tokens of all modalities."""
    tokens = torch.tensor(problem.tokens, dtype=torch.float32, device=problem.mean_abs.device)
    return (problem.mean_abs * tokens[:, None]).sum(0) / tokens.sum().clamp_min(1)


def power_scale(magnitude: torch.Tensor, beta: float) -> torch.Tensor:
    """magnitude^beta [in], divided by the geometric mean of its extremes, so that it is centred."""
    scale = magnitude.float().pow(beta).clamp_min(FLOOR)
    return scale / (scale.max() * scale.min()).sqrt()


def search_beta(
    problem: SiteProblem, magnitude: torch.Tensor, shares: Sequence[float], power: int
) -> tuple[torch.Tensor, float]:
    """The scale [in] and the beta of eq. 9 whose quantized output errs least.

    The error is the mean of |y - y_q|^power per modality, weighted by `shares`; activations are
    quantized too unless they keep 16 bits. Equal errors go to the smaller beta.
    """
    found: list[tuple[float, float]] = []
    for beta in GRID:
        scale = power_scale(magnitude, beta)
        base = problem.quantize(problem.weight * scale)
        error = 0.0
        for x, y, share in zip(problem.rows, problem.targets, shares, strict=True):
            if share and len(x):
                out = fake_quant_rows(x / scale, problem.activation_bits) @ base.T
                error += share * float((y - out).abs().pow(power).mean())
        found.append((error, beta))
    beta = min(found)[1]
    return power_scale(magnitude, beta), beta
