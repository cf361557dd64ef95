"""Perplexity of running text as it is usually measured: all rows in one, in windows of one length.

No chat template takes part. The rows are joined by an empty line and tokenized once; every token
of a window but its first is predicted from those before it, and a shorter rest is left out.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from masquant_cli.data.inputs import tokenizer_of
from masquant_cli.data.samples import Sample, load_samples, text_hash
from masquant_cli.errors import RecipeError
from masquant_cli.recipe import Modality, Task

WORDS = 8  # a shorter row is a heading or empty: it says nothing about where it comes from


@dataclass(frozen=True)
class Windows:
    """Model inputs of one window each with bool [1, window] of what is scored; all keys."""

    windows: tuple[tuple[dict[str, Tensor], Tensor], ...]
    keys: tuple[str, ...]
    shown: tuple[tuple[str, ...], ...]  # of the rows, not of the windows


def cut(task: Task, processor, *, modalities: tuple[Modality, ...], seed: int) -> Windows:
    """The task's first `samples` windows, one to a batch. Raises RecipeError for a text shorter
    than one window and for messages with media."""
    texts = [_text(sample, task) for sample in _rows(task, modalities, seed)]
    tokenizer = tokenizer_of(processor)
    ids = tokenizer("\n\n".join(texts), return_tensors="pt", verbose=False)["input_ids"][0]
    count = len(ids) // task.window
    if count == 0:
        raise RecipeError(
            f"task {task.name!r}: the text has {len(ids)} tokens, a window has {task.window}",
            where=f"dataset {task.source.dataset}",
            hint="set `window` to at most the text's length",
        )
    count = min(count, task.samples or count)
    pieces = ids[: count * task.window].view(count, 1, task.window)
    windows = tuple(
        (
            {"input_ids": piece, "attention_mask": torch.ones_like(piece)},
            torch.ones_like(piece).bool(),
        )
        for piece in pieces
    )
    keys = tuple(hashlib.sha256(piece.numpy().tobytes()).hexdigest() for piece in pieces)
    shown = tuple((text_hash(text),) for text in texts if len(text.split()) >= WORDS)
    return Windows(windows, keys, shown)


def paragraphs(task: Task, *, modalities: tuple[Modality, ...], seed: int) -> Iterator[Sample]:
    """The rows that are more than headings, as chats."""
    for sample in _rows(task, modalities, seed):
        if len(_text(sample, task).split()) >= WORDS:
            yield sample


def _rows(task: Task, modalities: tuple[Modality, ...], seed: int) -> Iterator[Sample]:
    return load_samples(task.source, seed=seed, modalities=modalities)


def _text(sample: Sample, task: Task) -> str:
    parts = [part for message in sample.messages for part in message["content"]]
    if any(part["type"] != "text" for part in parts):
        raise RecipeError(
            f"task {task.name!r}: windows are of text alone, the messages hold media",
            where=sample.where,
            hint="leave `window` out to score an assistant's message",
        )
    return "".join(part["text"] for part in parts)
