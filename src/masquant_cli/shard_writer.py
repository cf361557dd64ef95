"""A safetensors file written tensor by tensor: the header first, then bytes as they come.

The format's own library wants every tensor in memory before it writes the first. The bytes are
those that it would have written.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from masquant_cli.models.checkpoint import DTYPES
from masquant_cli.rundir import replace_atomic

NAMES = {dtype: name for name, dtype in DTYPES.items()}
# As the format orders them, so that each tensor starts at a multiple of its width.
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")


@dataclass(frozen=True)
class Entry:
    """A tensor that a file will hold."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Shard:
    """An open file whose header is written. Tensors may come in any order, each once."""

    def __init__(self, file: BinaryIO, entries: Mapping[str, Entry]):
        self._file = file
        ordered = sorted(
            entries.items(), key=lambda item: (ORDER.index(NAMES[item[1].dtype]), item[0])
        )
        header, offset, offsets = {"__metadata__": {"format": "pt"}}, 0, {}
        for name, of in ordered:
            end = offset + of.nbytes
            header[name] = {
                "dtype": NAMES[of.dtype],
                "shape": of.shape,
                "data_offsets": [offset, end],
            }
            offsets[name], offset = offset, end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._left = {
            name: (8 + len(text) + offsets[name], entries[name]) for name in sorted(entries)
        }

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Raises ValueError when `tensor` is not what the header says of it."""
        wanted = self._wanted(name)[1]
        if (found := Entry(tensor.dtype, tuple(tensor.shape))) != wanted:
            raise ValueError(f"{name} is announced as {wanted}, got {found}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self.copy(name, [flat.view(torch.uint8).numpy()] if flat.numel() else [])

    def copy(self, name: str, pieces: Iterable) -> None:
        """Write a tensor's bytes, piece by piece. Raises ValueError for too many or too few."""
        start, wanted = self._wanted(name)
        del self._left[name]
        self._file.seek(start)
        written = 0
        for piece in pieces:
            written += memoryview(piece).nbytes
            if written > wanted.nbytes:
                break
            self._file.write(piece)
        if written != wanted.nbytes:
            raise ValueError(f"{name} is announced with {wanted.nbytes} bytes, got {written}")

    def _wanted(self, name: str) -> tuple[int, Entry]:
        if name not in self._left:
            raise ValueError(f"{name} is not announced, or written already")
        return self._left[name]

    def finish(self) -> None:
        """Raises ValueError when a tensor never came."""
        if self._left:
            raise ValueError(
                f"{len(self._left)} tensors never came, first {next(iter(self._left))}"
            )


@contextlib.contextmanager
def new_shard(path: Path, entries: Mapping[str, Entry]) -> Iterator[Shard]:
    """A file of `entries` to be filled in the block; it has its name once all of them came.

    Nothing is left when the block raises. Raises ValueError where bytes do not fit the header.
    """
    with replace_atomic(path) as temporary, open(temporary, "wb") as file:
        shard = Shard(file, entries)
        yield shard
        shard.finish()
        file.flush()
