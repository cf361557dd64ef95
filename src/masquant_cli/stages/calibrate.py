"""calibrate: one pass over the calibration samples, statistics per layer, site and modality.

Nothing here depends on the method, the bits or the rank, so changing those never repeats it.
"""

from pathlib import Path

import torch

from masquant_cli import shards
from masquant_cli.algo.statistics import InputStatistics
from masquant_cli.data.samples import content_hashes
from masquant_cli.errors import RecipeError
from masquant_cli.models.capture import Batch, first_layer_inputs, run_layer, watch_sites
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.models.sites import LayerSites, Site
from masquant_cli.rundir import write_json
from masquant_cli.stages.job import Job
from masquant_cli.stages.probes import save_probes
from masquant_cli.stages.samples import CalibrationSet, batches, choose_samples


def calibrate(job: Job, folder: Path, fingerprint: str) -> dict:
    """Write `layers/NNN.safetensors` with, per site kind and modality:

    `{site}.{modality}.absmax`, `.mean_abs` [in] f32, `.count` [1] i64, `.rows` [n, in] f32 and
    `.gram` [in, in] f32 for the sites named in the recipe. Finished layers are kept. Also
    `samples.json`: per chosen sample the hashes of its media or text, sorted.
    Raises RecipeError when a modality got no tokens or activations are not finite.
    """
    progress, layers = job.progress, job.layers
    chosen = choose_samples(job.recipe, job.loaded, progress)
    # Data on a hub may change between an interruption and its resumption.
    fingerprint = f"{fingerprint} {chosen.digest}"
    # Evaluation refuses rows that were calibrated on.
    shown = sorted(sorted(content_hashes(sample)) for sample in chosen.samples)
    write_json(folder / "samples.json", {"samples": shown})
    done = [shards.is_done(shards.layer_file(folder, x.layer), fingerprint) for x in layers]
    save_probes(job, chosen, folder, fingerprint)
    todo = len(layers) - next((i for i, d in enumerate(reversed(done)) if not d), len(layers))
    if todo > 0:
        work = _embed(job, chosen)
        progress.stage("calibrate", len(layers), "layers")
        for site_layer in layers[:todo]:
            _layer(job, site_layer, work, folder, fingerprint, skip=done[site_layer.layer])
    return {
        "samples": len(chosen.samples),
        "tokens": chosen.tokens,
        "skipped_long": chosen.skipped_long,
        "data": chosen.digest,
    }


def _embed(job: Job, chosen: CalibrationSet) -> list[Batch]:
    model, names = job.loaded.model, job.recipe.modalities
    tokens = token_ids_of(model.config)
    first = model.get_submodule(job.layers[0].module)
    job.progress.stage("embed", len(chosen.samples), "samples")
    work = []
    for inputs in batches(job.recipe, chosen, job.loaded.processor):
        inputs = {k: v.to(model.device) for k, v in inputs.items()}
        ids = modality_ids(inputs["input_ids"], tokens, names)
        work.append(first_layer_inputs(model, first, inputs, ids))
        job.progress.advance(len(ids), tokens=int(inputs["attention_mask"].sum()))
    return work


def _layer(
    job: Job, layer: LayerSites, work: list[Batch], folder: Path, fingerprint: str, *, skip: bool
) -> None:
    """Advance every batch through one layer; gather and write its statistics unless done."""
    model, recipe = job.loaded.model, job.recipe
    module = model.get_submodule(layer.module)
    gathered = {} if skip else _fresh(job, layer)
    current: list[Batch] = []

    def see(site: Site, x: torch.Tensor) -> None:
        ids, real = current[0].ids[current[0].real], current[0].real
        seen = x[real]
        for index, name in enumerate(recipe.modalities):
            gathered[site.key, name].update(seen[ids == index])

    with watch_sites(model, () if skip else layer.sites, see):
        for batch in work:
            current[:] = [batch]
            run_layer(module, batch)
            job.progress.advance(0, tokens=int(batch.real.sum()))
    if not skip:
        tensors = {
            f"{kind}.{name}.{key}": value
            for (kind, name), statistics in gathered.items()
            for key, value in statistics.tensors().items()
        }
        _refuse_not_finite(layer, gathered)
        shards.save(
            shards.layer_file(folder, layer.layer), tensors, fingerprint=fingerprint, notes={}
        )
    job.progress.advance(1)


def _fresh(job: Job, layer: LayerSites) -> dict[tuple[str, str], InputStatistics]:
    recipe = job.recipe
    found = {}
    for s, site in enumerate(layer.sites):
        for m, name in enumerate(recipe.modalities):
            seed = ((recipe.seed * 1009 + layer.layer) * 31 + s) * 17 + m
            found[site.key, name] = InputStatistics(
                width=site.in_features,
                keep=recipe.calibration.rows,
                with_gram=site.kind in recipe.calibration.gram,
                generator=torch.Generator().manual_seed(seed),
                device=job.loaded.model.device,
            )
    return found


def _refuse_not_finite(layer: LayerSites, gathered: dict) -> None:
    for (kind, name), statistics in gathered.items():
        if not bool(torch.isfinite(statistics.absmax).all()):
            raise RecipeError(
                f"the {name} activations entering {kind} hold NaN or infinity",
                where=f"layer {layer.layer}, {layer.module}",
                hint="the float model overflows here: try model.dtype float32 or bfloat16",
            )
