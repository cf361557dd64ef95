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

# What the other modalities count for in GPTQ's error where a correction takes up part of theirs.
SHARES = (1.0, 0.1, 0.0)


def base_weight(
    job: Job, site: Site, problem: SiteProblem, scale: Tensor, statistics: dict[str, Tensor]
) -> tuple[QWeight, str]:
    """Integers and scales of W s_0 for scale [M, in], and how they were rounded.

    GPTQ has one error to minimise and eq. 29 has one for each modality, so a few ways to weigh
    them are tried, and rounding to nearest; held-out rows decide. That also guards against Grams
    of fewer rows than channels.
    """
    smoothed, form = problem.weight * scale[0], _form(job.recipe.weights)
    tried = {"nearest": quantize_weight(smoothed, *form)}
    if job.rounding == "gptq" and any(problem.tokens):
        for share in SHARES if problem.rank else SHARES[:1]:
            gram = pooled_gram(job, site, problem, scale, statistics, share)
            tried[f"gptq, others {share:g}"] = gptq_round(smoothed, gram, *form)
    if len(tried) == 1:
        return tried["nearest"], "nearest"
    how = min(tried, key=lambda h: base_error(problem, dequantize_weight(tried[h]), scale))
    return tried[how], how


def _form(options: Weights) -> tuple[int, int | None, bool]:
    return options.bits, options.group_size, options.symmetric


def pooled_gram(
    job: Job,
    site: Site,
    problem: SiteProblem,
    scale: Tensor,
    statistics: dict[str, Tensor],
    others: float,
) -> Tensor:
    """Gram [in, in] of the smoothed inputs of all modalities, each relative to its own output,
    without the held-out rows.

    A modality's share of the error that GPTQ minimises is then its noise over its signal, times
    the recipe's weight for it and, unless it is the base, `others`: no modality decides the
    rounding because it is loud or long.
    """
    total = torch.zeros(problem.weight.shape[1], problem.weight.shape[1], device=scale.device)
    for m, name in enumerate(job.recipe.modalities):
        key = f"{site.key}.{name}.gram"
        gram = _gram(problem.rows[m])
        if key in statistics:  # of all tokens: those that will judge are taken out
            gram = statistics[key].to(scale.device) - _gram(problem.heldout[m])
        energy = output_energy(problem.weight, gram)
        share = problem.loss_weights[m] * (others if m else 1.0)
        if energy > 0 and share > 0:
            total += smoothed_gram(gram * (share / energy), scale[m])
    return total


def _gram(rows: Tensor) -> Tensor:
    return rows.T @ rows
