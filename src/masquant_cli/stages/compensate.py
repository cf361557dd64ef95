"""compensate: the low-rank correction of every site and non-base modality (eq. 22-26)."""

import math
from pathlib import Path

import torch
from masquant_kernels.quantizers import dequantize_weight
from torch import Tensor

from masquant_cli import shards
from masquant_cli.algo.low_rank import (
    EXACT_SIDE,
    LowRank,
    best_low_rank,
    effective_rank,
    output_energy,
    singular_values,
    smoothed_gram,
    unwhitened_low_rank,
)
from masquant_cli.errors import RecipeError
from masquant_cli.machine import give_back_memory
from masquant_cli.models.sites import Site
from masquant_cli.stages.base_weight import base_weight
from masquant_cli.stages.job import Job
from masquant_cli.stages.share import begin, share
from masquant_cli.stages.smooth import site_problem


def compensate(job: Job, folder: Path, fingerprint: str) -> dict:
    """Write `layers/NNN.safetensors` with, per corrected site and modality:

    `{site}.{modality}.lr_a` [in, r] and `.lr_b` [r, sum of outs] f16, `.singular_values` f32; and
    with GPTQ rounding, per site, the base weight's integers `{site}.weight` [sum of outs, in] i8.
    The notes hold how a base weight was rounded and, per correction, the effective rank before
    and after whitening, the share of the residual's energy that is left, and the SQNR that this
    predicts for exact activations.
    """
    files = [shards.layer_file(folder, layer.layer) for layer in job.layers]
    dealt = share(job, files, fingerprint)
    begin(job, "compensate", dealt)
    for index in dealt.mine:
        tensors: dict[str, torch.Tensor] = {}
        notes: dict[str, dict] = {}
        scales = job.read("smooth", index)
        for site in job.layers[index].sites:
            if is_needed(job, site):
                statistics = job.read("calibrate", index, f"{site.key}.")
                _site(job, site, statistics, scales[f"{site.key}.scale"], tensors, notes)
                give_back_memory()  # what stays lies among what was freed
                job.progress.advance(0)
        shards.save(files[index], tensors, fingerprint=fingerprint, notes=notes)
        job.progress.advance(1)
    job.world.barrier(folder)
    return job.world.from_main(lambda: _summary(files))


def is_needed(job: Job, site: Site) -> bool:
    """Whether the site has a base weight to keep or a correction."""
    return job.rounding != "nearest" or job.rank(site) > 0


def _summary(files: list[Path]) -> dict:
    notes = [n for path in files for n in shards.read_header(path)["notes"].values()]
    left = [n["residual_energy_left"] for n in notes if "rank" in n]
    return {"mean_residual_energy_left": round(sum(left) / len(left), 4) if left else None}


def _site(
    job: Job,
    site: Site,
    statistics: dict[str, torch.Tensor],
    scale: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    notes: dict[str, dict],
) -> None:
    recipe, device = job.recipe, job.float.device
    problem, scale = site_problem(job, site, statistics), scale.to(device)
    rounded, how = base_weight(job, site, problem, scale, statistics)
    if job.rounding != "nearest":
        tensors[f"{site.key}.weight"] = rounded.q
        notes[site.key] = {"rounding": how}
    if not job.rank(site):
        return
    base, some = dequantize_weight(rounded), problem.some_outputs()
    for m, name in enumerate(recipe.modalities[1:], start=1):
        if not problem.tokens[m]:  # an expert that no such token reached: nothing to go by
            continue
        key = f"{site.key}.{name}"
        if recipe.compensation.target == "quantized":
            delta = problem.smoothed(scale[m])
        else:
            delta = problem.weight * scale[m]
        delta -= base
        if f"{key}.gram" in statistics:
            # Divided by the token count, so that numbers do not grow with the data.
            count = max(1, int(statistics[f"{key}.count"]))
            gram = smoothed_gram(statistics[f"{key}.gram"].to(device) / count, scale[m])
            smoothed = {"gram": gram}
        else:
            rows = statistics[f"{key}.rows"].to(device)
            rows = rows / scale[m] / math.sqrt(max(1, len(rows)))
            smoothed = {"rows": rows}
        found = (
            best_low_rank(delta, job.rank(site), **smoothed)
            if recipe.compensation.whiten
            else unwhitened_low_rank(delta, job.rank(site))
        )
        lr_a, lr_b = found.lr_a.half(), found.lr_b.half()
        if not bool(torch.isfinite(lr_a).all() and torch.isfinite(lr_b).all()):
            raise RecipeError(
                f"the correction of {site.name} for {name} does not fit fp16",
                where=f"compensate, {site.module}",
                hint="smoothing scales this far apart point at a damaged calibration sample",
            )
        tensors |= {
            f"{key}.lr_a": lr_a,
            f"{key}.lr_b": lr_b,
            f"{key}.singular_values": found.singular_values,
        }
        left = delta[some] - (lr_a.float() @ lr_b.float()[:, some]).T
        missed = problem.weight[some] * scale[m] - base[some] - delta[some]
        notes[key] = _report(
            found, problem.weight[some] * scale[m], delta[some], left, missed, smoothed
        )


def _report(
    found: LowRank, weight: Tensor, delta: Tensor, left: Tensor, missed: Tensor, x: dict
) -> dict:
    """What the stored (fp16) correction leaves for the inputs `x` (a Gram or rows).

    Of some outputs, of small sites all: the smoothed weight, the residual, what is left of it, and
    what the residual does not reach for. Effective ranks only where all of the spectrum is known.
    """
    energy, rest = output_energy(delta, **x), output_energy(left, **x)
    signal, noise = output_energy(weight, **x), output_energy(left + missed, **x)
    note = {
        "rank": found.lr_b.shape[0],
        "residual_energy_left": round(rest / max(energy, 1e-30), 6),
        "predicted_sqnr_db": round(10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30)), 3),
    }
    if found.complete and min(delta.shape) <= EXACT_SIDE:  # a note must not cost more than the work
        note["effective_rank_unwhitened"] = round(effective_rank(singular_values(delta)), 2)
        note["effective_rank_whitened"] = round(effective_rank(found.singular_values), 2)
    return note
