"""One row of a data set as chat messages, in the form chat templates take."""

from typing import Any

from masquant_cli.data.audio import decode_audio
from masquant_cli.data.media import decode_image
from masquant_cli.data.text import columns_in, fill
from masquant_cli.errors import RecipeError
from masquant_cli.recipe import Message, Modality, Part

MEDIA = ("image", "audio", "video")


def modality_of(kind: str, modalities: tuple[Modality, ...]) -> str:
    """The recipe's name for a content type: images are vision, video is unless listed itself."""
    if kind == "image" or (kind == "video" and "video" not in modalities):
        return "vision"
    return kind


def columns_of(messages: tuple[Message, ...], where: str) -> list[str]:
    """Every column that the messages read."""
    columns = []
    for part in (part for message in messages for part in message.content):
        if part.text is not None:
            columns += columns_in(part.text, where)
        else:
            columns += [getattr(part, k) for k in MEDIA if getattr(part, k) is not None]
    return list(dict.fromkeys(columns))


def kinds_of(messages: tuple[Message, ...]) -> list[str]:
    """The content types other than text that the messages use."""
    parts = [part for message in messages for part in message.content]
    return [k for k in MEDIA if any(getattr(part, k) is not None for part in parts)]


def to_messages(
    messages: tuple[Message, ...], row: dict[str, Any], base: str | None, where: str
) -> list[dict]:
    """[{"role", "content": [{"type": "text", "text": str} | {"type": "image", "image": PIL RGB}
    | {"type": "audio", "audio": f32 [n] at 16 kHz} | {"type": "video", "video": [PIL RGB]}]}].

    A list in an image or audio column becomes one part per item. Raises RecipeError.
    """
    return [
        {
            "role": message.role,
            "content": [
                item for part in message.content for item in _items(part, row, base, where)
            ],
        }
        for message in messages
    ]


def _items(part: Part, row: dict, base: str | None, where: str) -> list[dict]:
    if part.text is not None:
        return [{"type": "text", "text": fill(part.text, row, where)}]
    if part.video is not None:
        frames = row[part.video]
        if not isinstance(frames, list | tuple) or not frames:
            raise RecipeError(
                f"column {part.video!r} is not a list of frames",
                where=where,
                hint="store a video as a list of images",
            )
        return [{"type": "video", "video": [decode_image(f, base, where) for f in frames]}]
    kind, decode = ("image", decode_image) if part.image is not None else ("audio", decode_audio)
    value = row[getattr(part, kind)]
    values = value if isinstance(value, list | tuple) else [value]
    return [{"type": kind, kind: decode(v, base, where)} for v in values]
