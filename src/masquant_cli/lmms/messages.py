"""What an lmms-eval task shows, as the chat messages that the rest of masquant speaks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from masquant_cli.data.audio import decode_audio
from masquant_cli.data.media import decode_image
from masquant_cli.data.samples import Sample
from masquant_cli.errors import RecipeError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp")
SOUNDS = (".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus")


def from_visuals(visuals: Any, text: str, *, where: str, frames: int) -> Sample:
    """One user turn: every picture, sound and video in order, then the text.

    `visuals` is what a task's doc_to_visual returns: None, one medium or (nested) lists of them.
    A video file becomes at most `frames` pictures. Raises RecipeError for what is none of these.
    """
    content = [_part(value, None, where, frames) for value in _flat(visuals)]
    content.append({"type": "text", "text": text})
    return Sample([{"role": "user", "content": content}], {}, "", where)


def from_chat(messages: Sequence[dict], *, where: str, frames: int) -> Sample:
    """A task's own messages; media lie under `url` or under the part's type."""
    turns = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        turns.append(
            {"role": message["role"], "content": [_item(p, where, frames) for p in content]}
        )
    return Sample(turns, {}, "", where)


def _item(part: dict, where: str, frames: int) -> dict:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    value = part.get("url", part.get(kind))
    cut = {"start_time", "end_time", "video_start", "video_end"}
    if cut & part.keys() and any(part.get(key) is not None for key in cut):
        raise _piece(where)
    return _part(value, kind, where, frames)


def _part(value: Any, kind: str | None, where: str, frames: int) -> dict:
    """One medium. `kind` is what the task calls it, which for sounds is not to be relied on."""
    if isinstance(value, dict) and value.get("array") is not None:
        return {"type": "audio", "audio": decode_audio(value, None, where)}
    if hasattr(value, "get_all_samples"):  # how newer releases of datasets hand out audio
        heard = value.get_all_samples()
        wave = {"array": np.asarray(heard.data).T, "sampling_rate": heard.sample_rate}
        return {"type": "audio", "audio": decode_audio(wave, None, where)}
    if isinstance(value, dict):
        if {"video_start", "video_end"} & value.keys():
            raise _piece(where)
        if value.get("bytes") is None:
            named = value.get("path") or value.get("url")
            return _part(named, value.get("type") or kind, where, frames)
        kind = value.get("type") or _kind(value.get("path")) or kind
    elif isinstance(value, str | Path):
        kind = _kind(value) or "video"
    elif isinstance(value, Image.Image):
        kind = "image"
    elif isinstance(value, np.ndarray) and value.ndim in (3, 4):
        kind = "image" if value.ndim == 3 else "video"
        value = _picture(value) if value.ndim == 3 else list(value)
    if kind == "image":
        return {"type": "image", "image": decode_image(value, None, where)}
    if kind == "audio":
        return {"type": "audio", "audio": decode_audio(value, None, where)}
    if kind == "video":
        return {"type": "video", "video": _video(value, where, frames)}
    raise RecipeError(
        f"the task shows a {type(value).__name__}, which is no picture, sound or video known here",
        where=where,
        hint="leave this task out, or evaluate it with lmms-eval's own model classes",
    )


def _video(value: Any, where: str, frames: int) -> list[Image.Image]:
    if isinstance(value, list | tuple):
        return [decode_image(_picture(frame), None, where) for frame in value]
    if not isinstance(value, str | Path):
        raise RecipeError(f"the video is a {type(value).__name__}, not a file", where=where)
    path = str(value)
    if "://" not in path and not Path(path).is_file():
        raise RecipeError(
            f"the video {path} does not exist",
            where=where,
            hint="lmms-eval unpacks a task's videos when it downloads the task",
        )
    from lmms_eval.models.model_utils.load_video import read_video

    try:
        return [_picture(frame) for frame in read_video(path, num_frm=frames)]
    except Exception as error:  # whatever the decoder raises
        raise RecipeError(
            f"the video {path} cannot be decoded ({type(error).__name__}: {error})", where=where
        ) from error


def _picture(frame: Any) -> Any:
    return Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame


def _kind(path: str | Path | None) -> str | None:
    ending = Path(path or "").suffix.lower()
    return "image" if ending in IMAGES else "audio" if ending in SOUNDS else None


def _flat(visuals: Any) -> list:
    if visuals is None:
        return []
    if isinstance(visuals, list | tuple):
        return [item for visual in visuals for item in _flat(visual)]
    return [visuals]


def _piece(where: str) -> RecipeError:
    return RecipeError(
        "the task shows a piece of a video, which is not supported",
        where=where,
        hint="evaluate this task with lmms-eval's own model classes",
    )
