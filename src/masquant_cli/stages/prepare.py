"""Evaluation inputs: a task's samples loaded, sorted by length and encoded once.

Encoded media are many times the size of the files they come from, so beyond KEEP_BYTES only
the rows are kept, and those batches are decoded and encoded again each time they are used.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from masquant_cli.data.benchmarks import reading_of
from masquant_cli.data.chat import kinds_of
from masquant_cli.data.inputs import encode, encode_scored, tokenizer_of
from masquant_cli.data.samples import Sample, content_hashes, lighten, load_samples, restore
from masquant_cli.errors import RecipeError
from masquant_cli.progress import NullProgress, Progress
from masquant_cli.recipe import Evaluation, Modality, Task
from masquant_cli.stages import scoring, windows

KEEP_BYTES = 2**31  # per task: of decoded media while loading, and of encoded batches after


@dataclass(frozen=True)
class Batch:
    """Model inputs of some samples, left-padded."""

    inputs: dict[str, Tensor]
    order: tuple[int, ...]  # positions of the rows in the task's own order
    scored: Tensor | None = None  # bool [B, S], perplexity only


@dataclass(frozen=True)
class Waiting:
    """A batch that did not fit in memory: its samples without their media."""

    samples: tuple[Sample, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Prepared:
    """A task ready for `score`, for any number of models. Use `batches` to read it."""

    task: Task
    parts: tuple[Batch | Waiting, ...]  # without the samples that were known
    references: tuple[Any, ...]  # in the task's own order; empty for perplexity
    keys: tuple[str, ...]  # content hashes, in the task's own order
    seed: int
    shown: tuple[tuple[str, ...], ...] = ()  # hashes of every sample's media or text


def prepare_all(
    evaluation: Evaluation,
    processor,
    *,
    modalities: tuple[Modality, ...],
    seed: int,
    progress: Progress | None = None,
) -> list[Prepared]:
    """Every task of the evaluation, ready for `score`."""
    progress = progress or NullProgress()
    progress.stage("prepare evaluation", len(evaluation.tasks), "tasks")
    prepared = []
    for task in evaluation.tasks:
        item = prepare(
            task,
            processor,
            modalities=modalities,
            seed=seed,
            batch_size=evaluation.batch_size,
        )
        prepared.append(item)
        progress.advance(1)
    return prepared


def prepare(
    task: Task,
    processor,
    *,
    modalities: tuple[Modality, ...],
    seed: int,
    batch_size: int,
    keep_bytes: int = KEEP_BYTES,
    known: Collection[str] = (),
) -> Prepared:
    """Load and encode a task's samples, in batches of similar length; those whose key is `known`
    are not encoded, as they have an answer already. Raises RecipeError."""
    _refuse_media_for_text_models(task, processor)
    if task.window is not None:
        made = windows.cut(task, processor, modalities=modalities, seed=seed)
        parts = [
            Batch(inputs, (i,), scored)
            for i, (inputs, scored) in enumerate(made.windows)
            if made.keys[i] not in known
        ]
        return Prepared(task, tuple(parts), (), made.keys, seed, made.shown)
    samples, references, keys, shown, sizes, held = [], [], [], [], [], 0
    for sample in _first(task, modalities=modalities, seed=seed):
        if task.metric != "perplexity":
            references.append(reference(task, sample))
        keys.append(sample.key)
        shown.append(content_hashes(sample))
        tokens, media = _size(sample)
        sizes.append(tokens)
        if sample.key in known:
            samples.append(None)
            continue
        held += media
        samples.append(sample if held <= keep_bytes else lighten(sample))
    # Sorted by text and media size, as batches of like lengths waste little on padding; the
    # token count itself is only known after the processor.
    todo = (i for i in range(len(samples)) if samples[i] is not None)
    order = sorted(todo, key=lambda i: (sizes[i], i))
    parts: list[Batch | Waiting] = []
    for start in range(0, len(order), batch_size):
        rows = tuple(order[start : start + batch_size])
        chosen = [samples[i] for i in rows]
        if keep_bytes > 0:
            batch = _encode(task, processor, chosen, rows)
            keep_bytes -= sum(t.numel() * t.element_size() for t in batch.inputs.values())
            parts.append(batch)
        else:
            parts.append(Waiting(tuple(map(lighten, chosen)), rows))
        for i in rows:
            samples[i] = None  # what is encoded need not be held decoded too
    return Prepared(task, tuple(parts), tuple(references), tuple(keys), seed, tuple(shown))


def batches(prepared: Prepared, processor, *, known: Collection[str] = ()) -> Iterator[Batch]:
    """The task's batches, encoding those that were not kept, without those that are `known`."""
    for part in prepared.parts:
        if all(prepared.keys[row] in known for row in part.order):
            continue
        if isinstance(part, Batch):
            yield part
        else:
            yield _encode(prepared.task, processor, part.samples, part.order)


def _encode(task: Task, processor, samples: Sequence[Sample], order: tuple[int, ...]) -> Batch:
    whole = [restore(sample, task.source, reading_of(task)) for sample in samples]
    if task.metric == "perplexity":
        inputs, scored = encode_scored(processor, whole)
        return Batch(inputs, order, scored)
    return Batch(encode(processor, whole, for_generation=True), order)


def task_samples(
    task: Task, *, modalities: tuple[Modality, ...], seed: int, limit: int | None = None
) -> list[Sample]:
    """The task's first samples in seeded order: `task.samples` of them, or `limit` if less.

    Of running text that is cut into windows: its paragraphs.
    """
    if task.window is None:
        return list(_first(task, modalities=modalities, seed=seed, limit=limit))
    whole = windows.paragraphs(task, modalities=modalities, seed=seed)
    return list(itertools.islice(whole, limit))


def _first(
    task: Task, *, modalities: tuple[Modality, ...], seed: int, limit: int | None = None
) -> Iterator[Sample]:
    wanted = min((x for x in (task.samples, limit) if x is not None), default=None)
    samples = load_samples(
        task.source,
        seed=seed,
        modalities=modalities,
        reading=reading_of(task),
        also=scoring.columns_of(task),
    )
    yield from itertools.islice(samples, wanted)


def reference(task: Task, sample: Sample) -> Any:
    """What the sample's row expects, see `scoring.reference`."""
    return scoring.reference(task, sample.row, sample.where)


def _refuse_media_for_text_models(task: Task, processor) -> None:
    kinds = (*kinds_of(task.source.messages), *reading_of(task).kinds)
    if kinds and processor is tokenizer_of(processor):
        raise RecipeError(
            f"task {task.name!r} shows {' and '.join(dict.fromkeys(kinds))}, and the model reads "
            "text alone",
            where=f"dataset {task.source.dataset}",
            hint="leave the task out, or use a model of that modality",
        )


def _size(sample: Sample) -> tuple[int, int]:
    """(a cheap stand-in for the token count, which only the processor knows; bytes of media)"""
    waves = sum(len(wave) for wave in sample.media("audio"))
    images = [*sample.media("image"), *(f for video in sample.media("video") for f in video)]
    pixels = sum(image.size[0] * image.size[1] for image in images)
    texts = sum(len(p["text"]) for m in sample.messages for p in m["content"] if "text" in p)
    return waves // 640 + pixels // 784 + texts // 4, 4 * waves + 3 * pixels
