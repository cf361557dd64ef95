"""smooth: one scale per site, modality and channel, by the recipe's method."""

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from masquant_cli import shards
from masquant_cli.algo.site import Learned, SiteProblem, judged
from masquant_cli.machine import give_back_memory
from masquant_cli.methods import find
from masquant_cli.methods.method import Layer
from masquant_cli.models.sites import LayerSites, Site
from masquant_cli.stages.blocks import Blocks
from masquant_cli.stages.coverage import stand_ins
from masquant_cli.stages.job import Job
from masquant_cli.stages.sensitivity import Sensitivity
from masquant_cli.stages.share import begin, share

READ = (".rows", ".absmax", ".mean_abs", ".count")  # of the statistics: no Grams


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
    prepared = method.prepared(recipe.smoothing)
    alone = "block" in prepared  # a layer is learned from what the layers before it give
    dealt = share(job, files, fingerprint, alone=alone)
    if alone and job.world.size > 1:
        job.progress.note("objective block solves layer after layer: rank 0 alone, others wait")
    for name in prepared if dealt.todo else ():
        if name != "block" or job.world.main:
            asked[name].prepare()
    begin(job, "smooth", dealt)
    for index in dealt.mine:
        solved = _solve(job, job.layers[index], **asked)
        tensors = {f"{key}.scale": found.scale for key, found in solved.items()}
        notes = {
            key: {"origin": found.origin, "heldout_sqnr_db": [_db(e) for e in found.error]}
            for key, found in solved.items()
        }
        shards.save(files[index], tensors, fingerprint=fingerprint, notes=notes)
        job.progress.advance(1)
    asked["block"].close()
    job.world.barrier(folder)
    return job.world.from_main(lambda: _summary(recipe.modalities, files))


def _summary(modalities: tuple[str, ...], files: list[Path]) -> dict:
    sqnr: dict[str, list[float]] = {m: [] for m in modalities}
    for path in files:
        for note in shards.read_header(path)["notes"].values():
            for m, value in zip(modalities, note["heldout_sqnr_db"], strict=True):
                if value is not None:
                    sqnr[m].append(value)
    return {"heldout_sqnr_db": {m: round(sum(v) / len(v), 2) for m, v in sqnr.items() if v}}


def _solve(
    job: Job, layer: LayerSites, sensitivity: Sensitivity, block: Blocks
) -> dict[str, Learned]:
    """The scales [M, in] of the layer's sites by the recipe's method.

    Of an expert that too few tokens of a modality reached, that modality's scale is another's
    (stand_ins); of one that no token reached, scales are one.
    """
    counts = job.read("calibrate", layer.layer, suffix=".count")
    tokens = {
        site.key: tuple(int(counts[f"{site.key}.{m}.count"]) for m in job.recipe.modalities)
        for site in layer.sites
    }
    seed = job.recipe.seed * 7919 + layer.layer * 31
    problem = Layer(
        modalities=job.recipe.modalities,
        sites=_Problems(job, [site for site in layer.sites if any(tokens[site.key])]),
        smoothing=job.recipe.smoothing,
        seeds={site.key: seed + s for s, site in enumerate(layer.sites)},
        sensitivity=functools.partial(sensitivity.of, layer.layer),
        block=functools.partial(block.at, layer.layer),
    )
    solved = find(job.recipe.method).solve(problem)
    found: dict[str, Learned] = {}
    for site in layer.sites:
        if site.key in solved:
            one, known = solved[site.key], tokens[site.key]
            scale = one.scale[stand_ins(site, known)]
            used = [m for m, count in enumerate(known) if count or m == 0]
            if not torch.equal(scale[used], one.scale[used]):  # then it was judged for others
                one = judged(problem.sites[site.key], scale, one.origin)
            errors = tuple(e if n else None for e, n in zip(one.error, known, strict=True))
            found[site.key] = replace(one, scale=scale, error=errors)
        else:
            ones = torch.ones(len(job.recipe.modalities), site.in_features)
            found[site.key] = Learned(ones, (None,) * len(ones), "no tokens")
    return found


class _Problems(Mapping):
    """The layer's sites by key, each read when it is asked for and forgotten after the next: one
    weight in memory, however many experts there are."""

    def __init__(self, job: Job, sites: list[Site]):
        self._job, self._sites = job, {site.key: site for site in sites}
        self._last: tuple[str, SiteProblem] | None = None

    def __getitem__(self, key: str) -> SiteProblem:
        if self._last is None or self._last[0] != key:
            self._last, site = None, self._sites[key]
            give_back_memory()  # what stays lies among what was freed
            statistics = self._job.read("calibrate", site.layer, f"{key}.", READ)
            self._last = key, site_problem(self._job, site, statistics)
        return self._last[1]

    def __iter__(self):
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def site_problem(job: Job, site: Site, statistics: dict[str, torch.Tensor]) -> SiteProblem:
    """The site's weight and statistics as the pure functions want them."""
    recipe = job.recipe
    device = job.float.device
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
    known = stand_ins(site, tokens)
    weights = recipe.smoothing.loss_weights
    return SiteProblem(
        weight=job.weight(site),
        rows=tuple(rows),
        heldout=tuple(heldout),
        absmax=torch.stack(absmax)[known],
        mean_abs=torch.stack(mean_abs)[known],
        tokens=tuple(tokens),
        weight_bits=recipe.weights.bits,
        group_size=recipe.weights.group_size,
        symmetric=recipe.weights.symmetric,
        activation_bits=recipe.activations.bits,
        rank=job.rank(site),
        loss_weights=tuple(float(weights.get(m, 1.0)) for m in recipe.modalities),
    )


def _db(error: float | None) -> float | None:
    return None if error is None else round(-10 * math.log10(max(error, 1e-30)), 3)
