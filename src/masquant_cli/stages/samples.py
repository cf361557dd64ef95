"""Which samples calibrate: taken in turn from all sources until every modality has enough."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from masquant_cli.data.chat import MEDIA, kinds_of, modality_of
from masquant_cli.data.inputs import encode
from masquant_cli.data.samples import Sample, load_samples
from masquant_cli.distributed import World
from masquant_cli.errors import ArtifactError, RecipeError
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.models.skeleton import Skeleton
from masquant_cli.progress import Progress
from masquant_cli.recipe import Recipe, Source

T = TypeVar("T")
AHEAD = 8  # samples that each of several ranks encodes before they compare


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


def choose_samples(
    recipe: Recipe, model: Skeleton, progress: Progress, world: World | None = None
) -> CalibrationSet:
    """Take samples from all sources in turn until every modality's token quota is met.

    A sample with media counts for its media alone; text-only samples fill the text quota. A
    source is read no further once all that it can fill is full. The ranks of a world share the
    encoding and choose alike.
    """
    names, quota = recipe.modalities, recipe.calibration.tokens
    tokens = token_ids_of(model.config)
    got, filled = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    chosen, lengths, skipped = [], [], 0

    def wanted(modalities: Iterable[str]) -> bool:
        return any(m not in quota or filled[m] < quota[m] for m in modalities)

    def measure(sample: Sample) -> tuple[int, dict[str, int]]:
        inputs = encode(model.processor, [sample], for_generation=False)
        ids = modality_ids(inputs["input_ids"], tokens, names)
        return ids.numel(), {m: int((ids == i).sum()) for i, m in enumerate(names)}

    progress.stage("choose samples", None, "samples")
    for sample, (length, counts) in _measured(recipe, wanted, measure, world or World()):
        if length > recipe.calibration.max_length:
            skipped += 1
            continue
        counted = [m for m in names[1:] if counts[m]] or [names[0]]
        if wanted(counted):
            chosen.append(sample)
            lengths.append(length)
            for m in names:
                got[m] += counts[m]
            for m in counted:
                filled[m] += counts[m]
            progress.advance(1, tokens=length)
    refuse_or_warn(recipe, got, skipped, progress)
    return CalibrationSet(tuple(chosen), tuple(lengths), got, skipped)


def same_samples(job, world: World | None = None) -> CalibrationSet:
    """The samples that calibrate chose, for methods that need the model to see them again.

    Asked for by all ranks of the job, unless `world` says otherwise. Raises ArtifactError when
    the data are not what they were.
    """
    chosen = choose_samples(job.recipe, job.float, job.progress, world or job.world)
    if "calibrate" in job.finished:
        folder, manifest = job.finished["calibrate"]
        if manifest.summary.get("data") != chosen.digest:
            raise ArtifactError(
                "the calibration data changed since the calibrate stage read them",
                where=str(folder),
                hint="pin the data sets' revisions, or delete this folder and calibrate anew",
            )
    return chosen


def groups(recipe: Recipe, chosen: CalibrationSet) -> list[list[int]]:
    """The samples of every batch: of the same media and of similar length, at most `batch_tokens`
    padded tokens together. Formed once, however many processes share them."""

    def media(i: int) -> tuple[bool, ...]:
        return tuple(bool(chosen.samples[i].media(kind)) for kind in MEDIA)

    order = sorted(range(len(chosen.samples)), key=lambda i: (media(i), chosen.lengths[i], i))
    found: list[list[int]] = []
    for i in order:
        full = found and (len(found[-1]) + 1) * chosen.lengths[i] > recipe.calibration.batch_tokens
        if not found or full or media(found[-1][0]) != media(i):
            found.append([])
        found[-1].append(i)
    return found


def encode_group(chosen: CalibrationSet, group: Sequence[int], processor) -> dict[str, Tensor]:
    """The padded batch of these samples."""
    return encode(processor, [chosen.samples[i] for i in group], for_generation=False)


def row_keys(seed: int, group: Sequence[int], real: Tensor) -> Tensor:
    """f64 [B, T]: every token's place in the order in which rows are sampled, drawn from the seed
    and the sample's index alone; 1 for padding. real: bool [B, T], a row per sample of `group`."""
    keys = torch.ones(real.shape, dtype=torch.float64)
    for row, index in enumerate(group):
        name = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(name, "little") >> 1)
        count = int(real[row].sum())
        keys[row, real[row]] = torch.rand(count, dtype=torch.float64, generator=generator)
    return keys


def _measured(
    recipe: Recipe,
    wanted: Callable[[Iterable[str]], bool],
    measure: Callable[[Sample], T],
    world: World,
) -> Iterator[tuple[Sample, T]]:
    """Samples from all sources in turn, each with what `measure` says of it.

    Several ranks read ahead and share the measuring. What they read too much of is passed over,
    errors included, so that they get what one process gets.
    """
    samples = _interleave(recipe, wanted)
    ahead = 1 if world.size == 1 else AHEAD * world.size
    while True:
        with world.busy():
            wave = list(itertools.islice(samples, ahead))
        if not wave:
            return
        mine = {
            i: _or_error(measure, sample)
            for i, (_, sample) in enumerate(wave)
            if i % world.size == world.rank
        }
        measured = {i: m for part in world.all_gather(mine) for i, m in part.items()}
        for i, (fills, sample) in enumerate(wave):
            if wanted(fills) or world.size == 1:
                if isinstance(measured[i], Exception):
                    raise measured[i]
                yield sample, measured[i]


def _or_error(measure: Callable[[Sample], T], sample: Sample | Exception) -> T | Exception:
    if isinstance(sample, Exception):
        return sample
    try:
        return measure(sample)
    except Exception as error:
        return error


def _interleave(
    recipe: Recipe, wanted: Callable[[Iterable[str]], bool]
) -> Iterator[tuple[list[str], Sample | Exception]]:
    """From all sources in turn: what the source fills, and its next sample, or why it has none."""
    names = recipe.modalities
    sources = [
        (_fills(source, names), load_samples(source, seed=recipe.seed, modalities=names))
        for source in recipe.calibration.sources
    ]
    while sources:
        for pair in list(sources):
            fills, samples = pair
            # Without this a stream of pictures would be read to its end for the last text token.
            try:
                sample = next(samples, None) if wanted(fills) else None
            except Exception as error:
                sample = error
            if sample is None:
                sources.remove(pair)
            else:
                yield fills, sample


def _fills(source: Source, names: tuple[str, ...]) -> list[str]:
    """The modalities whose quota the source's samples count for."""
    media = {modality_of(kind, names) for kind in kinds_of(source.messages)}
    return [m for m in names[1:] if m in media] or [names[0]]


def refuse_or_warn(recipe: Recipe, got: dict[str, int], skipped: int, progress: Progress) -> None:
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
