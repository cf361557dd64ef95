"""The base weight Q(W s_0) of a site, rounded as the recipe says."""

import torch
from masquant_kernels.quantizers import QWeight, quantize_weight
from torch import Tensor

from masquant_cli.algo.low_rank import output_energy, smoothed_gram
from masquant_cli.models.sites import Site
from masquant_cli.stages.job import Job


def base_weight(
    job: Job, site: Site, weight: Tensor, scale: Tensor, statistics: dict[str, Tensor]
) -> QWeight:
    """Integers and scales of W s_0, from weight [out, in] and scale [M, in]."""
    options = job.recipe.weights
    form = options.bits, options.group_size, options.symmetric
    if options.rounding == "nearest":
        return quantize_weight(weight * scale[0], *form)
    from masquant_cli.algo.gptq import gptq_round

    return gptq_round(weight * scale[0], pooled_gram(job, site, weight, scale, statistics), *form)


def pooled_gram(
    job: Job, site: Site, weight: Tensor, scale: Tensor, statistics: dict[str, Tensor]
) -> Tensor:
    """Gram [in, in] of the smoothed inputs of the modalities that lean on the base weight alone.

    Each modality counts by its share of its own output energy. Where a correction follows, text
    alone decides: what rounding costs the others is in the residual that the correction sees.
    """
    leaning = job.recipe.modalities[:1] if job.rank(site) else job.recipe.modalities
    total = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    for m, name in enumerate(leaning):
        gram = site_gram(site, name, statistics).to(weight.device)
        energy = output_energy(weight, gram)
        if energy > 0:
            total += smoothed_gram(gram / energy, scale[m])
    return total


def site_gram(site: Site, modality: str, statistics: dict[str, Tensor]) -> Tensor:
    """The modality's Gram [in, in]: of all tokens, or of the kept rows where none was collected."""
    key = f"{site.kind}.{modality}"
    if f"{key}.gram" in statistics:
        return statistics[f"{key}.gram"]
    rows = statistics[f"{key}.rows"]
    return rows.T @ rows
