"""Samples of a recipe's Source: chat messages, the row they came from and a content hash."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from masquant_cli.data import chat, sources
from masquant_cli.data.benchmarks import Reading
from masquant_cli.data.text import missing_column, normalise
from masquant_cli.errors import RecipeError
from masquant_cli.recipe import Modality, Source


@dataclass(frozen=True)
class Sample:
    """One chat. `messages` is what `chat.to_messages` makes; `row` holds the raw columns."""

    messages: list[dict]
    row: dict[str, Any]
    key: str  # sha256 of roles, texts and decoded media
    where: str = ""  # data set and row, for errors

    def media(self, kind: str) -> list:
        """Every image, audio or video of the chat, in order."""
        parts = (part for message in self.messages for part in message["content"])
        return [part[kind] for part in parts if part["type"] == kind]


PLAIN = Reading()


def load_samples(
    source: Source,
    *,
    seed: int,
    modalities: tuple[Modality, ...],
    reading: Reading = PLAIN,
    also: Iterable[str] = (),
) -> Iterator[Sample]:
    """Yield the source's samples in seeded order, decoding media one row at a time.

    `also` names columns that the rows must have besides those of the messages. Raises
    RecipeError for anything wrong with the source, a column or a row's media, and
    EnvironmentProblem when the hub or a package is out of reach.
    """
    where = sources.where_of(source)
    refuse_kinds(source, modalities, reading)
    columns = [*chat.columns_of(source.messages, where), *also]
    columns = [c for c in columns if c not in reading.makes] + list(reading.reads)
    base = sources.base_folder(source)
    for index, row in sources.iterate(source, seed=seed, columns=columns):
        at = f"{where}, split {source.split}, row {index}"
        for column in columns:  # a stream may not know its columns in advance
            if column not in row:
                raise missing_column(column, row, at)
        row = {**row, **reading.derive(row, at)}
        messages = _messages(source, reading, row, base, at)
        yield Sample(messages=messages, row=row, key=content_key(messages), where=at)


def refuse_kinds(source: Source, modalities: tuple[Modality, ...], reading: Reading) -> None:
    """Raise RecipeError when the messages use media that the modalities lack."""
    # With a single modality nothing is told apart, so anything may come.
    kinds = (*chat.kinds_of(source.messages), *reading.kinds) if len(modalities) > 1 else ()
    for kind in kinds:
        if chat.modality_of(kind, modalities) not in modalities:
            raise RecipeError(
                f"the messages use {kind}, which the recipe's modalities {list(modalities)} lack",
                where=sources.where_of(source),
                hint=f"add {chat.modality_of(kind, modalities)!r} to `modalities`, or remove it",
            )


def lighten(sample: Sample) -> Sample:
    """The sample without its decoded messages; `restore` brings them back from the row."""
    return replace(sample, messages=[])


def restore(sample: Sample, source: Source, reading: Reading = PLAIN) -> Sample:
    """Undo `lighten`; a sample that has its messages is returned as it is."""
    if sample.messages:
        return sample
    base = sources.base_folder(source)
    return replace(sample, messages=_messages(source, reading, sample.row, base, sample.where))


def _messages(source: Source, reading: Reading, row: dict, base: str | None, where: str) -> list:
    messages = chat.to_messages(source.messages, row, base, where)
    return reading.interleave(messages, row, base, where) if reading.interleave else messages


def content_key(messages: list[dict]) -> str:
    """sha256 over roles, texts and decoded pixels and waveforms, hex."""
    digest = hashlib.sha256()
    for message in messages:
        digest.update(f"\0role {message['role']}".encode())
        for part in message["content"]:
            value = part[part["type"]]
            for item in value if isinstance(value, list) else [value]:
                data = item.encode() if isinstance(item, str) else item.tobytes()
                size = getattr(item, "size", len(data))  # images: equal bytes, other shape
                digest.update(f"\0{part['type']} {size} {len(data)}\0".encode())
                digest.update(data)
    return digest.hexdigest()


def content_hashes(sample: Sample) -> tuple[str, ...]:
    """What a sample shares with any other that shows the same thing: a sha256 of every picture,
    frame and sound, or, without media, of the normalised user's text."""
    images = [*sample.media("image"), *(f for video in sample.media("video") for f in video)]
    media = [(image.tobytes(), image.size) for image in images]
    media += [(wave.tobytes(), wave.shape) for wave in sample.media("audio")]
    if media:
        return tuple(
            hashlib.sha256(f"{size}\0".encode() + data).hexdigest() for data, size in media
        )
    said = [m for m in sample.messages if m["role"] == "user"] or sample.messages
    return (text_hash(" ".join(p["text"] for m in said for p in m["content"])),)


def text_hash(text: str) -> str:
    """sha256 of a text after `normalise`."""
    return hashlib.sha256(f"text\0{normalise(text)}".encode()).hexdigest()
