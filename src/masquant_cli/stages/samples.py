"""Which samples calibrate: taken in turn from all sources until every modality has enough."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from masquant_cli.data.inputs import encode
from masquant_cli.data.samples import Sample, load_samples
from masquant_cli.errors import RecipeError
from masquant_cli.models.loading import Loaded
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.progress import Progress
from masquant_cli.recipe import Recipe


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


def choose_samples(recipe: Recipe, loaded: Loaded, progress: Progress) -> CalibrationSet:
    """Take samples from all sources in turn until every modality's token quota is met.

    A sample with media counts for its media alone; text-only samples fill the text quota.
    """
    names, quota = recipe.modalities, recipe.calibration.tokens
    tokens = token_ids_of(loaded.model.config)
    got, filled = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    chosen, lengths, skipped = [], [], 0
    for sample in _interleave(recipe):
        inputs = encode(loaded.processor, [sample], for_generation=False)
        ids = modality_ids(inputs["input_ids"], tokens, names)
        if ids.numel() > recipe.calibration.max_length:
            skipped += 1
            continue
        counts = {m: int((ids == i).sum()) for i, m in enumerate(names)}
        counted = [m for m in names[1:] if counts[m]] or [names[0]]
        if any(m not in quota or filled[m] < quota[m] for m in counted):
            chosen.append(sample)
            lengths.append(ids.numel())
            for m in names:
                got[m] += counts[m]
            for m in counted:
                filled[m] += counts[m]
        if all(m in quota and filled[m] >= quota[m] for m in names):
            break
    _refuse_or_warn(recipe, got, skipped, progress)
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
