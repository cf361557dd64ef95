"""smooth: one scale per site, modality and channel, by the recipe's method."""

import functools
import math
from pathlib import Path

import torch

from masquant_cli import shards
from masquant_cli.algo.site import SiteProblem
from masquant_cli.methods import find
from masquant_cli.methods.method import Layer
from masquant_cli.models.sites import LayerSites, Site
from masquant_cli.stages.blocks import Blocks
from masquant_cli.stages.job import Job
from masquant_cli.stages.sensitivity import Sensitivity


def smooth(job: Job, folder: Path, fingerprint: str) -> dict:
    """Write `layers/NNN.safetensors` with `{site}.scale` [M, in] f32, row m divides modality m.

    The notes of each shard, and the summary, hold the held-out SQNR of eq. 29 in dB.
    """
    recipe, method = job.recipe, find(job.recipe.method)
    for key in method.ignored(recipe.smoothing):
        if key != "loss_weights" or job.rounding != "gptq":  # which reads them
            job.progress.warn(f"{recipe.method} does not read smoothing.{key}")
    asked = {"sensitivity": Sensitivity(job), "block": Blocks(job, folder)}
    files = [shards.layer_file(folder, layer.layer) for layer in job.layers]
    if not all(shards.is_done(path, fingerprint) for path in files):
        for name in method.prepared(recipe.smoothing):
            asked[name].prepare()
    job.progress.stage("smooth", len(job.layers), "layers")
    sqnr: dict[str, list[float]] = {m: [] for m in recipe.modalities}
    for layer, path in zip(job.layers, files, strict=True):
        if not shards.is_done(path, fingerprint):
            solved = method.solve(_problem(job, layer, **asked))
            tensors = {f"{kind}.scale": found.scale for kind, found in solved.items()}
            notes = {
                kind: {"origin": found.origin, "heldout_sqnr_db": [_db(e) for e in found.error]}
                for kind, found in solved.items()
            }
            shards.save(path, tensors, fingerprint=fingerprint, notes=notes)
        for note in shards.read_header(path)["notes"].values():
            for m, value in zip(recipe.modalities, note["heldout_sqnr_db"], strict=True):
                sqnr[m].append(value)
        job.progress.advance(1)
    return {"heldout_sqnr_db": {m: round(sum(v) / len(v), 2) for m, v in sqnr.items()}}


def _problem(job: Job, layer: LayerSites, sensitivity: Sensitivity, block: Blocks) -> Layer:
    statistics = job.read("calibrate", layer.layer)
    seed = job.recipe.seed * 7919 + layer.layer * 31
    return Layer(
        modalities=job.recipe.modalities,
        sites={site.key: site_problem(job, site, statistics) for site in layer.sites},
        smoothing=job.recipe.smoothing,
        seeds={site.key: seed + s for s, site in enumerate(layer.sites)},
        sensitivity=functools.partial(sensitivity.of, layer.layer),
        block=functools.partial(block.at, layer.layer),
    )


def site_problem(job: Job, site: Site, statistics: dict[str, torch.Tensor]) -> SiteProblem:
    """The site's weight and statistics as the pure functions want them."""
    recipe = job.recipe
    device = job.loaded.model.device
    rows, heldout, absmax, mean_abs, tokens = [], [], [], [], []
    for name in recipe.modalities:
        sample = statistics[f"{site.key}.{name}.rows"].to(device)
        # Rows come in random order; at least one on each side, however few there are.
        judged = min(max(1, int(recipe.smoothing.heldout * len(sample))), len(sample))
        heldout.append(sample[:judged])
        rows.append(sample[judged:] if judged < len(sample) else sample)
        absmax.append(statistics[f"{site.key}.{name}.absmax"].to(device))
        mean_abs.append(statistics[f"{site.key}.{name}.mean_abs"].to(device))
        tokens.append(int(statistics[f"{site.key}.{name}.count"]))
    weights = recipe.smoothing.loss_weights
    return SiteProblem(
        weight=job.weight(site),
        rows=tuple(rows),
        heldout=tuple(heldout),
        absmax=torch.stack(absmax),
        mean_abs=torch.stack(mean_abs),
        tokens=tuple(tokens),
        weight_bits=recipe.weights.bits,
        group_size=recipe.weights.group_size,
        symmetric=recipe.weights.symmetric,
        activation_bits=recipe.activations.bits,
        rank=job.rank(site),
        loss_weights=tuple(float(weights.get(m, 1.0)) for m in recipe.modalities),
    )


def _db(error: float) -> float:
    return round(-10 * math.log10(max(error, 1e-30)), 3)
