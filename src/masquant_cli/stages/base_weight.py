"""The base weight Q(W s_0) of a site, rounded as the recipe says."""

import torch
from masquant_kernels.quantizers import QWeight, dequantize_weight, quantize_weight
from torch import Tensor

from masquant_cli.algo.gptq import gptq_round
from masquant_cli.algo.low_rank import output_energy, smoothed_gram
from masquant_cli.algo.site import SiteProblem, base_error
from masquant_cli.models.sites import Site
from masquant_cli.stages.job import Job

# What the other modalities count for in GPTQ's error where a correction takes up part of theirs.
SHARES = (1.0, 0.1, 0.0)


def base_weight(
    job: Job, site: Site, problem: SiteProblem, scale: Tensor, statistics: dict[str, Tensor]
) -> tuple[QWeight, str]:
    """Integers and scales of W s_0 for scale [M, in], and how they were rounded.

    GPTQ has one error to minimise and eq. 29 has one for each modality, so a few ways to weigh
    them are tried, and rounding to nearest; held-out rows decide, of a large site on a part of its
    outputs. That also guards against Grams of fewer rows than channels.
    """
    form, part = job.recipe.weights.form, problem.part()
    ways: dict[str, float | None] = {"nearest": None}
    if job.rounding == "gptq" and any(problem.tokens):
        shares = SHARES if problem.rank else SHARES[:1]
        ways |= {f"gptq, others {share:g}": share for share in shares}

    def rounded(of: SiteProblem, way: str) -> QWeight:
        weight, share = of.weight * scale[0], ways[way]
        if share is None:
            return quantize_weight(weight, *form)
        inputs = pooled_inputs(job, site, problem, scale, statistics, share)
        return gptq_round(weight, inputs.get("gram"), *form, rows=inputs.get("rows"))

    if len(ways) == 1:
        return rounded(problem, "nearest"), "nearest"
    if len(ways) == 2:  # then the other is nearly always the answer: all of it at once
        found = {way: rounded(problem, way) for way in ways}
        some = problem.some_outputs()
        seen = {way: _outputs(weight, some) for way, weight in found.items()}
    else:
        seen = {way: rounded(part, way) for way in ways}
        found = seen if part is problem else {}
    how = min(seen, key=lambda way: base_error(part, dequantize_weight(seen[way]), scale))
    return (found[how] if found else rounded(problem, how)), how


def _outputs(weight: QWeight, some: Tensor) -> QWeight:
    zero = None if weight.zero is None else weight.zero[some]
    return QWeight(weight.q[some], weight.scale[some], zero)


def pooled_inputs(
    job: Job,
    site: Site,
    problem: SiteProblem,
    scale: Tensor,
    statistics: dict[str, Tensor],
    others: float,
) -> dict[str, Tensor]:
    """{"gram": [in, in]}, as pooled_gram has it, or where calibration kept none {"rows": [n, in]}
    of which it is the Gram."""
    names = job.recipe.modalities
    if any(f"{site.key}.{name}.gram" in statistics for name in names):
        return {"gram": pooled_gram(job, site, problem, scale, statistics, others)}
    weights = problem.part().weight
    pooled = []
    for m, rows in enumerate(problem.rows):
        energy = output_energy(weights, rows=rows)
        share = problem.loss_weights[m] * (others if m else 1.0)
        if energy > 0 and share > 0:
            pooled.append(rows / scale[m] * (share / energy) ** 0.5)
    return {"rows": torch.cat(pooled) if pooled else problem.rows[0][:0]}


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
    weights = problem.part().weight
    total = torch.zeros(weights.shape[1], weights.shape[1], device=scale.device)
    for m, name in enumerate(job.recipe.modalities):
        key = f"{site.key}.{name}.gram"
        # Of all tokens; those that will judge are taken out, unless they are all there are.
        if key in statistics and problem.tokens[m] > len(problem.heldout[m]):
            gram = (
                statistics[key]
                .to(scale.device)
                .addmm(problem.heldout[m].T, problem.heldout[m], alpha=-1)
            )
        else:
            gram = problem.rows[m].T @ problem.rows[m]
        energy = output_energy(weights, gram)
        share = problem.loss_weights[m] * (others if m else 1.0)
        if energy > 0 and share > 0:
            total += smoothed_gram(gram, scale[m]).mul_(share / energy)
    return total
