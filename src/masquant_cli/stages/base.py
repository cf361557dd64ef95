"""The base weight Q(W s_0) of a site, rounded as the recipe says."""

import torch
from masquant_kernels.quantizers import QWeight, dequantize_weight, quantize_weight
from torch import Tensor

from masquant_cli.algo.gptq import gptq_round
from masquant_cli.algo.low_rank import output_energy, smoothed_gram
from masquant_cli.algo.site import SiteProblem, base_error
from masquant_cli.models.sites import Site
from masquant_cli.recipe import Weights
from masquant_cli.stages.job import Job


def base_weight(
    job: Job, site: Site, problem: SiteProblem, scale: Tensor, statistics: dict[str, Tensor]
) -> tuple[QWeight, str]:
    """Integers and scales of W s_0 for scale [M, in], and how they were rounded.

    GPTQ yields to rounding to nearest where that does better on held-out rows, as it can where
    fewer rows than channels are known.
    """
    smoothed, form = problem.weight * scale[0], _form(job.recipe.weights)
    nearest = quantize_weight(smoothed, *form)
    if job.rounding == "nearest":
        return nearest, "nearest"
    rounded = gptq_round(smoothed, pooled_gram(job, site, problem, scale, statistics), *form)
    errors = [base_error(problem, dequantize_weight(q), scale) for q in (rounded, nearest)]
    return (rounded, "gptq") if errors[0] <= errors[1] else (nearest, "nearest")


def _form(options: Weights) -> tuple[int, int | None, bool]:
    return options.bits, options.group_size, options.symmetric


def pooled_gram(
    job: Job, site: Site, problem: SiteProblem, scale: Tensor, statistics: dict[str, Tensor]
) -> Tensor:
    """Gram [in, in] of the smoothed inputs of all modalities, each relative to its own output.

    A modality's share of the error that GPTQ minimises is then its noise over its signal, times
    the recipe's weight for it: no modality decides the rounding because it is loud or long.
    """
    total = torch.zeros(problem.weight.shape[1], problem.weight.shape[1], device=scale.device)
    for m, name in enumerate(job.recipe.modalities):
        key = f"{site.kind}.{name}.gram"
        gram = statistics[key].to(scale.device) if key in statistics else _gram(problem.rows[m])
        energy = output_energy(problem.weight, gram)
        if energy > 0:
            total += smoothed_gram(gram * (problem.loss_weights[m] / energy), scale[m])
    return total


def _gram(rows: Tensor) -> Tensor:
    return rows.T @ rows
