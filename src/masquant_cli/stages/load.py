"""What the stages share: the job, calibration batches, and the artifacts of earlier stages."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from masquant_cli import shards
from masquant_cli.algo.low_rank import rank_for
from masquant_cli.data.inputs import encode
from masquant_cli.data.samples import Sample, load_samples
from masquant_cli.errors import ArtifactError, RecipeError
from masquant_cli.models.loading import Loaded, load_float
from masquant_cli.models.modality import check_modalities, merge_video, modality_ids, token_ids_of
from masquant_cli.models.sites import LayerSites, Site, find_sites
from masquant_cli.progress import Progress
from masquant_cli.recipe import SITE_KINDS, Recipe
from masquant_cli.rundir import Manifest
from masquant_cli.runtime.scheme import Scheme


@dataclass
class Job:
    """One recipe being worked on. The float model is loaded when a stage first needs it."""

    recipe: Recipe
    progress: Progress
    finished: dict[str, tuple[Path, Manifest]] = field(default_factory=dict)

    @cached_property
    def loaded(self) -> Loaded:
        self.progress.note(f"loading {self.recipe.model.path}")
        loaded = load_float(self.recipe.model, self.recipe.device)
        check_modalities(loaded.model.config, self.recipe.modalities, where="modalities")
        return loaded

    @cached_property
    def layers(self) -> list[LayerSites]:
        layers = find_sites(self.loaded.model)
        group = self.recipe.weights.group_size
        for site in layers[0].sites:
            if group and site.in_features % group:
                raise RecipeError(
                    f"group_size {group} does not divide the {site.in_features} inputs "
                    f"of {site.kind}",
                    where="weights.group_size",
                    hint="choose a divisor, or leave group_size out for one scale per channel",
                )
        return layers

    @cached_property
    def scheme(self) -> Scheme:
        """What the exported quantization_config will say."""
        recipe = self.recipe
        tokens = merge_video(token_ids_of(self.loaded.model.config), recipe.modalities)
        return Scheme(
            weight_bits=recipe.weights.bits,
            group_size=recipe.weights.group_size,
            symmetric=recipe.weights.symmetric,
            activation_bits=recipe.activations.bits,
            modalities=recipe.modalities,
            token_ids={m: tuple(ids) for m, ids in tokens.items()},
            ranks={site.kind: self.rank(site) for site in self.layers[0].sites},
            sites=SITE_KINDS,
        )

    @cached_property
    def chosen(self) -> "CalibrationSet":
        return choose_samples(self)

    def rank(self, site: Site) -> int:
        """Columns of the site's correction; 0 where the method or the recipe has none."""
        compensation = self.recipe.compensation
        if self.recipe.method != "masquant" or site.kind not in compensation.sites:
            return 0
        if len(self.recipe.modalities) == 1:
            return 0
        return rank_for(compensation.rank, site.in_features, sum(site.out_features))

    def weight(self, site: Site) -> torch.Tensor:
        """The site's linears stacked along their outputs: fp32 [sum of outs, in]."""
        modules = (self.loaded.model.get_submodule(name) for name in site.linears)
        return torch.cat([m.weight.detach().float() for m in modules])

    def read(self, stage: str, layer: int) -> dict[str, torch.Tensor]:
        """One layer's tensors of a finished stage, checked against its manifest."""
        folder, manifest = self.finished[stage]
        path = shards.layer_file(folder, layer)
        relative = path.relative_to(folder).as_posix()
        if relative not in manifest.outputs:
            raise ArtifactError(
                f"the {stage} stage has no layer {layer}",
                where=str(path),
                hint="delete the stage's folder and run again",
            )
        return shards.load(path, sha256=manifest.outputs[relative])


@dataclass(frozen=True)
class CalibrationSet:
    """Chosen samples with their lengths, and how many tokens each modality got."""

    samples: tuple[Sample, ...]
    lengths: tuple[int, ...]
    tokens: dict[str, int]
    skipped_long: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([s.key for s in self.samples]).encode()).hexdigest()


def choose_samples(job: Job) -> CalibrationSet:
    """Take samples from all sources in turn until every modality's token quota is met.

    A sample with media counts for its media alone; text-only samples fill the text quota.
    """
    recipe, processor = job.recipe, job.loaded.processor
    calibration, names = recipe.calibration, recipe.modalities
    lookup = token_ids_of(job.loaded.model.config)
    got = dict.fromkeys(names, 0)
    only_text = 0
    chosen, lengths, skipped = [], [], 0
    for sample in _interleave(recipe):
        inputs = encode(processor, [sample], for_generation=False)
        ids = modality_ids(inputs["input_ids"], lookup, names)
        length = ids.numel()
        if length > calibration.max_length:
            skipped += 1
            continue
        counts = {m: int((ids == i).sum()) for i, m in enumerate(names)}
        media = [m for m in names[1:] if counts[m]]
        quota = calibration.tokens
        wants = [m for m in media if got[m] < quota.get(m, length + got[m])]
        if not media and only_text < quota.get(names[0], length + only_text):
            only_text += counts[names[0]]
            wants = [names[0]]
        if wants:
            chosen.append(sample)
            lengths.append(length)
            for m in names:
                got[m] += counts[m]
        full = all(
            m in quota and (got[m] if m != names[0] else only_text) >= quota[m] for m in names
        )
        if full:
            break
    _refuse_or_warn(recipe, got, skipped, job.progress)
    return CalibrationSet(tuple(chosen), tuple(lengths), got, skipped)


def batches(recipe: Recipe, chosen: CalibrationSet, processor) -> Iterator[dict[str, torch.Tensor]]:
    """Encoded batches of similar length, at most `batch_tokens` padded tokens each."""
    order = sorted(range(len(chosen.samples)), key=lambda i: (chosen.lengths[i], i))
    group: list[int] = []
    for i in order:
        if group and (len(group) + 1) * chosen.lengths[i] > recipe.calibration.batch_tokens:
            yield encode(processor, [chosen.samples[j] for j in group], for_generation=False)
            group = []
        group.append(i)
    if group:
        yield encode(processor, [chosen.samples[j] for j in group], for_generation=False)


def _interleave(recipe: Recipe) -> Iterator[Sample]:
    sources = [
        iter(load_samples(s, seed=recipe.seed, modalities=recipe.modalities))
        for s in recipe.calibration.sources
    ]
    while sources:
        for source in list(sources):
            try:
                yield next(source)
            except StopIteration:
                sources.remove(source)


def _refuse_or_warn(recipe: Recipe, got: dict[str, int], skipped: int, progress: Progress) -> None:
    for m, n in got.items():
        if n == 0:
            raise RecipeError(
                f"no calibration sample has {m} tokens, and the recipe names {m}",
                where="calibration.sources",
                hint=f"add a source whose messages use {m}, or leave {m} out of modalities",
            )
        if n < recipe.calibration.min_tokens:
            progress.warn(
                f"{m} has only {n} calibration tokens (fewer than min_tokens "
                f"{recipe.calibration.min_tokens}); its scales will be rough"
            )
    if skipped:
        progress.warn(f"{skipped} samples longer than {recipe.calibration.max_length} were skipped")
