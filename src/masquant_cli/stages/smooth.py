"""smooth: one scale per site, modality and channel, by the recipe's method."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from masquant_cli import shards
from masquant_cli.algo.learning import (
    Learned,
    Schedule,
    SiteProblem,
    eq12,
    heldout_error,
    learn_joint,
    learn_mas,
)
from masquant_cli.algo.smoothing import closed_form_scale, uniform_absmax
from masquant_cli.models.sites import Site
from masquant_cli.recipe import Recipe
from masquant_cli.stages.job import Job


def rtn(problem: SiteProblem, recipe: Recipe, seed: int) -> Learned:
    """No smoothing: round to nearest."""
    scale = torch.ones_like(problem.absmax)
    return Learned(scale, heldout_error(problem, scale), "ones")


def smoothquant(problem: SiteProblem, recipe: Recipe, seed: int) -> Learned:
    """One scale for all modalities, from the range of the loudest (eq. 8 and 11)."""
    one = closed_form_scale(uniform_absmax(problem.absmax), problem.absmax_w, recipe.smoothing.beta)
    scale = one.expand_as(problem.absmax).contiguous()
    return Learned(scale, heldout_error(problem, scale), "uniform eq. 8")


def masquant(problem: SiteProblem, recipe: Recipe, seed: int) -> Learned:
    """Scales per modality: eq. 12, then eq. 13-14 (`mas`) or eq. 29 itself (`joint`)."""
    options = recipe.smoothing
    epochs = options.epochs if options.learn else 0
    schedule = Schedule(epochs, options.learning_rate, options.batch_rows, seed)
    scale = eq12(problem, options.beta)
    if epochs:
        scale = learn_mas(problem, schedule, scale)
    if options.objective == "joint":
        return learn_joint(problem, schedule, scale)
    origin = "eq. 14" if epochs else "eq. 12"
    return Learned(scale, heldout_error(problem, scale), origin)


# A method is one function of this form; the rest of the line does not know which one ran.
METHODS: dict[str, Callable[[SiteProblem, Recipe, int], Learned]] = {
    "rtn": rtn,
    "smoothquant": smoothquant,
    "masquant": masquant,
}


def smooth(job: Job, folder: Path, fingerprint: str) -> dict:
    """Write `layers/NNN.safetensors` with `{site}.scale` [M, in] f32, row m divides modality m.

    The notes of each shard, and the summary, hold the held-out SQNR of eq. 29 in dB.
    """
    recipe = job.recipe
    method = METHODS[recipe.method]
    job.progress.stage("smooth", len(job.layers), "layers")
    sqnr: dict[str, list[float]] = {m: [] for m in recipe.modalities}
    for layer in job.layers:
        path = shards.layer_file(folder, layer.layer)
        if not shards.is_done(path, fingerprint):
            statistics = job.read("calibrate", layer.layer)
            tensors, notes = {}, {}
            for s, site in enumerate(layer.sites):
                problem = site_problem(job, site, statistics)
                found = method(problem, recipe, recipe.seed * 7919 + layer.layer * 31 + s)
                tensors[f"{site.kind}.scale"] = found.scale
                notes[site.kind] = {
                    "origin": found.origin,
                    "heldout_sqnr_db": [_db(e) for e in found.error],
                }
            shards.save(path, tensors, fingerprint=fingerprint, notes=notes)
        for note in shards.read_header(path)["notes"].values():
            for m, value in zip(recipe.modalities, note["heldout_sqnr_db"], strict=True):
                sqnr[m].append(value)
        job.progress.advance(1)
    return {"heldout_sqnr_db": {m: round(sum(v) / len(v), 2) for m, v in sqnr.items()}}


def site_problem(job: Job, site: Site, statistics: dict[str, torch.Tensor]) -> SiteProblem:
    """The site's weight and statistics as the pure functions want them."""
    recipe = job.recipe
    device = job.loaded.model.device
    rows, heldout, absmax = [], [], []
    for name in recipe.modalities:
        sample = statistics[f"{site.kind}.{name}.rows"].to(device)
        # Rows come in random order; at least one on each side, however few there are.
        judged = min(max(1, int(recipe.smoothing.heldout * len(sample))), len(sample))
        heldout.append(sample[:judged])
        rows.append(sample[judged:] if judged < len(sample) else sample)
        absmax.append(statistics[f"{site.kind}.{name}.absmax"].to(device))
    weights = recipe.smoothing.loss_weights
    return SiteProblem(
        weight=job.weight(site),
        rows=tuple(rows),
        heldout=tuple(heldout),
        absmax=torch.stack(absmax),
        weight_bits=recipe.weights.bits,
        group_size=recipe.weights.group_size,
        symmetric=recipe.weights.symmetric,
        activation_bits=recipe.activations.bits,
        rank=job.rank(site),
        loss_weights=tuple(float(weights.get(m, 1.0)) for m in recipe.modalities),
    )


def _db(error: float) -> float:
    return round(-10 * math.log10(max(error, 1e-30)), 3)
