"""calibrate: one pass over the calibration samples, statistics per layer, site and modality.

Nothing here depends on the method, the bits or the rank, so changing those never repeats it. The
model's towers and embeddings are needed once, at the start; from then on memory is that of one
decoder layer and of the hidden states, which go to disk where `resources.max_memory` asks for it.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from masquant_cli import shards
from masquant_cli.algo.statistics import InputStatistics
from masquant_cli.data.inputs import model_inputs
from masquant_cli.data.samples import content_hashes
from masquant_cli.distributed import World, deal
from masquant_cli.errors import EnvironmentProblem, RecipeError
from masquant_cli.models.capture import Batch, embed, run_layer, watch_sites
from masquant_cli.models.experts import routed
from masquant_cli.models.hidden import Store
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.models.sites import LayerSites, Site
from masquant_cli.rundir import disk_errors, write_json
from masquant_cli.stages.coverage import coverage, keeps_gram, rows_kept
from masquant_cli.stages.job import Job
from masquant_cli.stages.memory import embeds_at_once, room_for_hidden
from masquant_cli.stages.probes import save_probes
from masquant_cli.stages.samples import (
    CalibrationSet,
    choose_samples,
    encode_group,
    groups,
    row_keys,
)
from masquant_cli.stages.share import cost, merged
from masquant_cli.stages.walk import before_layers

SCRATCH = ".scratch"  # of the stage's folder: hidden states, while it runs
Gathered = dict[tuple[str, str], InputStatistics]  # by a site's key and a modality


def calibrate(job: Job, folder: Path, fingerprint: str) -> dict:
    """Write `layers/NNN.safetensors` with, per site key and modality:

    `{site}.{modality}.absmax`, `.mean_abs` [in] f32, `.count` [1] i64, `.rows` [n, in] f32 and
    `.gram` [in, in] f32 for the sites named in the recipe. Finished layers are kept. Also
    `samples.json`: per chosen sample the hashes of its media or text, sorted.
    Raises RecipeError when a modality got no tokens or activations are not finite.
    """
    progress, layers, world = job.progress, job.layers, job.world
    chosen = choose_samples(job.recipe, job.float, progress, world)
    # Data on a hub may change between an interruption and its resumption, and `dtype: auto` may
    # be another one on the machine that goes on.
    fingerprint = f"{fingerprint} {chosen.digest} {_same_dtype(job)}"
    done = world.from_main(lambda: _begin(job, chosen, folder, fingerprint))
    summary = {
        "samples": len(chosen.samples),
        "tokens": chosen.tokens,
        "skipped_long": chosen.skipped_long,
        "data": chosen.digest,
    }
    todo = len(layers) - next((i for i, d in enumerate(reversed(done)) if not d), len(layers))
    owners = deal([cost(layer) for layer in layers], world.size)
    with disk_errors(folder), Store(_scratch(folder, world), room_for_hidden(job)) as store:
        if todo > 0:
            start = _resumed(store, world, fingerprint, done)
            work = _embed(job, chosen, store, fresh=start == 0)
            del chosen  # decoded pictures may be larger than all that is in memory from now on
            progress.stage("calibrate", len(layers), "layers")
            progress.advance(start)
            for layer in layers[start:todo]:
                with job.float.materialised(layer.module):
                    gathered = {} if done[layer.layer] else _fresh(job, layer)
                    _advance(job, layer, work, store, gathered)
                gathered = merged(world, owners[layer.layer], gathered)
                if gathered:
                    _save(layer, gathered, job.recipe.modalities, folder, fingerprint)
                gathered.clear()
                _next_layer(store, work, layer.layer + 1, fingerprint)
                progress.advance(1)
    world.barrier(folder)
    experts = world.from_main(lambda: coverage(job, folder))
    return {**summary, **({"experts": experts} if experts else {})}


def _same_dtype(job: Job) -> str:
    """What all ranks compute in. Raises EnvironmentProblem when `auto` differs among them."""
    dtypes = job.world.all_gather(str(job.float.dtype).removeprefix("torch."))
    if len(set(dtypes)) > 1:
        raise EnvironmentProblem(
            f"the ranks' processors differ: model.dtype auto is {' and '.join(sorted({*dtypes}))}",
            where="model.dtype",
            hint=f"choose one for all of them: --set model.dtype={max(dtypes)}",
        )
    return dtypes[0]


def _begin(job: Job, chosen: CalibrationSet, folder: Path, fingerprint: str) -> list[bool]:
    """Write what is not by layer; returns which layers are finished."""
    # Evaluation refuses rows that were calibrated on.
    shown = sorted(sorted(content_hashes(sample)) for sample in chosen.samples)
    write_json(folder / "samples.json", {"samples": shown})
    save_probes(job, chosen, folder, fingerprint)
    for left in folder.glob(f"{SCRATCH}*"):
        if left != _scratch(folder, job.world) and not left.name.endswith(f"of{job.world.size}"):
            shutil.rmtree(left, ignore_errors=True)  # of another number of processes
    return [shards.is_done(shards.layer_file(folder, x.layer), fingerprint) for x in job.layers]


def _scratch(folder: Path, world: World) -> Path:
    return folder / (SCRATCH if world.size == 1 else f"{SCRATCH}{world.rank}of{world.size}")


def _embed(job: Job, chosen: CalibrationSet, store: Store, *, fresh: bool) -> list[Batch]:
    """Every batch as it enters the first layer; its hidden states go to the store if `fresh`."""
    skeleton, recipe = job.float, job.recipe
    tokens = token_ids_of(skeleton.config)
    job.progress.stage("embed", len(chosen.samples), "samples")
    work = []
    with before_layers(skeleton, at_once=embeds_at_once(job)):
        for group in _mine(job, chosen):
            inputs = encode_group(chosen, group, skeleton.processor)
            real = inputs["attention_mask"].bool()
            ids = modality_ids(inputs["input_ids"], tokens, recipe.modalities)
            keys = row_keys(recipe.seed, group, real)
            batch = embed(skeleton, model_inputs(skeleton.model, inputs), ids, keys)
            if fresh:
                store.put(_hidden(len(work), 0), [batch.hidden])
            store.put(_others(len(work)), batch.arguments.tensors)
            batch.hidden, batch.arguments.tensors = None, []
            work.append(batch)
            job.progress.advance(len(group), tokens=int(real.sum()))
    return work


def _mine(job: Job, chosen: CalibrationSet) -> list[list[int]]:
    """This rank's batches, as lists of samples."""
    every = groups(job.recipe, chosen)
    padded = [len(group) * max(chosen.lengths[i] for i in group) for group in every]
    owners = deal(padded, job.world.size)
    return [g for g, owner in zip(every, owners, strict=True) if owner == job.world.rank]


def _advance(
    job: Job, layer: LayerSites, work: list[Batch], store: Store, gathered: Gathered
) -> None:
    """Take every batch through one layer and gather its statistics, unless `gathered` is empty."""
    model, modalities = job.float.model, job.recipe.modalities
    current: list[Batch] = []

    def see(site: Site, x: Tensor) -> None:
        batch = current[0]
        marks = routed(model, site.linears[0], batch.marks).flatten()
        keys = routed(model, site.linears[0], batch.keys).flatten()
        x = x.detach().reshape(len(marks), -1)
        for index, name in enumerate(modalities):
            for part, part_keys in _of(marks == index, x, keys):
                gathered[site.key, name].update(part, part_keys)

    with watch_sites(model, layer.sites if gathered else (), see):
        for index, batch in enumerate(work):
            (hidden,) = store.get(_hidden(index, layer.layer))
            batch.hidden = hidden
            batch.arguments.tensors = store.get(_others(index))
            current[:] = [batch]
            run_layer(job.float, layer.layer, batch)
            if not store.on_disk:
                store.drop(_hidden(index, layer.layer))
                # In its old place: what lives long must not settle among what is freed at once.
                batch.hidden = hidden.copy_(batch.hidden)
            store.put(_hidden(index, layer.layer + 1), [batch.hidden])
            batch.hidden, batch.arguments.tensors = None, []
            job.progress.advance(0, tokens=int(batch.real.sum()))


def _of(here: Tensor, x: Tensor, keys: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens of x [n, in] that are `here`, without a copy where all or none are."""
    count = int(here.sum())
    if count == len(here):
        yield x, keys
    elif count:
        index = here.nonzero()[:, 0]
        yield x.index_select(0, index.to(x.device)), keys[index]


def _save(
    layer: LayerSites,
    gathered: Gathered,
    modalities: tuple[str, ...],
    folder: Path,
    fingerprint: str,
) -> None:
    """Write a layer's complete statistics, which are gone then."""
    _refuse_not_finite(layer, gathered)
    _refuse_unseen(layer, gathered, modalities)
    tensors = {
        f"{key}.{name}.{part}": value
        for key, name in list(gathered)  # each is freed as its tensors are made
        for part, value in gathered.pop((key, name)).tensors().items()
    }
    shards.save(shards.layer_file(folder, layer.layer), tensors, fingerprint=fingerprint, notes={})


def _fresh(job: Job, layer: LayerSites) -> Gathered:
    calibration = job.recipe.calibration
    return {
        (site.key, name): InputStatistics(
            width=site.in_features,
            keep=rows_kept(site, calibration),
            with_gram=keeps_gram(site, calibration),
            device=job.float.device,
        )
        for site in layer.sites
        for name in job.recipe.modalities
    }


def _hidden(batch: int, layer: int) -> str:
    return f"hidden-{batch}-{layer}"


def _others(batch: int) -> str:
    return f"arguments-{batch}"


def _next_layer(store: Store, work: list[Batch], layer: int, fingerprint: str) -> None:
    """What enters `layer` is complete: what entered the one before it is no longer needed."""
    before = [_hidden(index, layer - 1) for index in range(len(work))]
    store.checkpoint({"fingerprint": fingerprint, "layer": layer}, dropping=before)


def _resumed(store: Store, world: World, fingerprint: str, done: list[bool]) -> int:
    """The layer whose inputs an interrupted run left on disk; 0 where it left none, or where its
    ranks were at different layers."""
    note = store.resume()
    usable = note and note["fingerprint"] == fingerprint and all(done[: note["layer"]])
    starts = world.all_gather(note["layer"] if usable else 0)
    if usable and len(set(starts)) == 1:
        return note["layer"]
    store.clear()
    store.on_disk = False
    return 0


def _refuse_not_finite(layer: LayerSites, gathered: Gathered) -> None:
    for (key, name), statistics in gathered.items():
        if not bool(torch.isfinite(statistics.absmax).all()):
            raise RecipeError(
                f"the {name} activations entering {key} hold NaN or infinity",
                where=f"layer {layer.layer}, {layer.module}",
                hint="the float model overflows here: try model.dtype float32 or bfloat16",
            )


def _refuse_unseen(layer: LayerSites, gathered: Gathered, modalities: tuple[str, ...]) -> None:
    """An expert may see nothing of a modality; all experts of a layer may not."""
    for kind in {site.kind for site in layer.sites}:
        keys = [site.key for site in layer.sites if site.kind == kind]
        for name in modalities:
            if not any(gathered[key, name].count for key in keys):
                raise RecipeError(
                    f"no {name} token reached {kind}",
                    where=f"layer {layer.layer}, {layer.module}",
                    hint=f"give calibration more {name} samples: no expert saw one",
                )
