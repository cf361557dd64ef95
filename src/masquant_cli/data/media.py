"""Bytes of an image or audio column, whatever form it is stored in, and images as PIL RGB."""

import io
import os
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from masquant_cli.errors import EnvironmentProblem, RecipeError


def read_bytes(value: Any, base: str | None, where: str, kind: str) -> bytes:
    """Encoded bytes of `value`: bytes, a path, or a struct {bytes, path}.

    A relative path is looked up beside the data file (`base`), then in the working directory.
    """
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"]
        value = value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str | os.PathLike):
        got = "empty" if value is None else f"{type(value).__name__}"
        raise RecipeError(
            f"the {kind} column is {got}",
            where=where,
            hint=f"an {kind} column holds encoded bytes, paths, or structs of bytes and path",
        )
    return _read_path(os.fspath(value), base, where, kind)


def file_of(value: Any) -> str:
    """The file that a value names, after a space, for messages; nothing for bare bytes."""
    path = value.get("path") if isinstance(value, dict) else value
    return f" {path}" if isinstance(path, str | os.PathLike) else ""


def decode_image(value: Any, base: str | None, where: str) -> Image.Image:
    """A column's value as an upright RGB image. Raises RecipeError when it cannot be decoded."""
    name = file_of(value)
    if not isinstance(value, Image.Image):
        value = read_bytes(value, base, where, "image")
    try:
        image = Image.open(io.BytesIO(value)) if isinstance(value, bytes) else value
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")  # transparent pixels become white, not stray colours
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no known image format" if unknown else f"{type(error).__name__}: {error}"
        raise RecipeError(
            f"the image{name} cannot be decoded ({reason})",
            where=where,
            hint="convert it to PNG or JPEG, or remove this row",
        ) from error
    except Image.DecompressionBombError as error:
        raise RecipeError(
            "the image is too large to decode", where=where, hint=str(error)
        ) from error


def _read_path(path: str, base: str | None, where: str, kind: str) -> bytes:
    if "://" in path:  # streamed rows: hf://..., zip://...::hf://...
        from datasets.utils.file_utils import xopen

        try:
            with xopen(path, "rb") as file:
                return file.read()
        except Exception as error:  # any of fsspec's backends may have raised
            raise EnvironmentProblem(
                f"{path} cannot be read ({type(error).__name__}: {error})",
                where=where,
                hint="check the network, or use `streaming: false`",
            ) from error
    path = os.path.expanduser(path)
    tried = [path] if os.path.isabs(path) or base is None else [os.path.join(base, path), path]
    for candidate in tried:
        try:
            with open(candidate, "rb") as file:
                return file.read()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise RecipeError(
                f"{candidate} cannot be read ({error.strerror})", where=where
            ) from error
    raise RecipeError(
        f"the {kind} file {path} does not exist",
        where=where,
        hint=f"relative paths start beside the data file ({base or 'none'})",
    )
