"""The float model's safetensors by their headers alone; tensors are read one at a time.

Files are read, not mapped: a mapped page counts as this process's memory for as long as it stays
mapped, and a model of 140 GB would. Start at `open_checkpoint`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from masquant_cli.errors import RecipeError
from masquant_cli.models.experts import Piece, pieces
from masquant_cli.models.index import INDEX, weight_map
from masquant_cli.models.names import disk_names

SINGLE = "model.safetensors"
CHUNK = 16 << 20  # bytes read at once where the dtype changes on the way
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
QUANTIZED_DTYPES = ("F8", "F6", "F4")  # how their names begin
PACKED = (".qweight", ".weight_packed")  # of GPTQ and AWQ, of compressed-tensors and masquant
AGAIN = "download the model again"
FROM_FLOAT = "start from the float checkpoint"


@dataclass(frozen=True)
class Stored:
    """One tensor on disk: its bytes begin at `start` of `file`.

    `columns`, (first, all): it lies there transposed, as columns of a matrix [shape[1], all].
    """

    key: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    columns: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A folder's tensors. `tensors` are all of them by their names on disk; `stored` those of the
    model by their names in the module, tied ones under each of their names."""

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Stored]
    stored: dict[str, Stored] = field(default_factory=dict)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The module's tensor `name` in CPU memory of its own, as `dtype` or as it is stored.

        Raises RecipeError when it is not there, cannot be read, or holds NaN or infinity.
        """
        if name not in self.stored:
            raise RecipeError(
                f"the checkpoint has no tensor for {name}", where=str(self.folder), hint=AGAIN
            )
        return read(self.stored[name], dtype)


def open_checkpoint(folder: Path, model: nn.Module) -> Checkpoint:
    """The checkpoint of `model`, which may lie on meta.

    Reads headers only. Tied parameters that are stored twice with different values are untied,
    as Transformers does. Raises RecipeError when files are missing, truncated or damaged, when
    the index and they disagree, when a tensor lies in two files, has another shape than the
    model's or is not stored in floats, and when the model has tensors that the files lack.
    """
    tensors = read_headers(folder)
    checkpoint = Checkpoint(folder, tuple(_files(folder)), tensors)
    names = disk_names(model, tensors)
    state = model.state_dict(keep_vars=True)
    tied: dict[int, list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    for group in tied.values():
        held = [name for name in group if name in names]
        for name in held:
            checkpoint.stored[name] = tensors[names[name]]
        if len(held) > 1 and not _all_equal([checkpoint.stored[name] for name in held]):
            for name in held[1:]:
                _untie(model, name)
        if held:
            for name in group:
                checkpoint.stored.setdefault(name, checkpoint.stored[held[0]])
    for name, piece in pieces(model).items():
        if name not in names and piece.whole in names:
            whole = tensors[names[piece.whole]]
            checkpoint.stored[name] = _of_expert(whole, piece, state[name].shape)
    _refuse_missing(checkpoint, model, state)
    _refuse_misfits(checkpoint, state)
    return checkpoint


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors by its name on disk. Raises RecipeError."""
    files = _files(folder)
    index = _index(folder)
    found: dict[str, Stored] = {}
    for path in files:
        for stored in _header(path):
            if stored.key in found:
                raise RecipeError(
                    f"the tensor {stored.key} lies in two files, {found[stored.key].file.name} "
                    f"and {path.name}", where=str(folder),
                    hint="remove the files that are not part of this checkpoint",
                )  # fmt: skip
            found[stored.key] = stored
    for key, name in (index or {}).items():
        if key not in found or found[key].file.name != name:
            raise RecipeError(
                f"the index says that {name} holds {key}, and it does not",
                where=str(folder / INDEX), hint=AGAIN,
            )  # fmt: skip
    return found


def read(stored: Stored, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor in memory of its own. Raises RecipeError as `Checkpoint.read` does."""
    if stored.columns is not None:
        first, every = stored.columns
        matrix = replace(stored, shape=(stored.shape[1], every), columns=None)
        return read(matrix, dtype)[:, first : first + stored.shape[0]].T.contiguous()
    dtype = dtype or stored.dtype
    out = torch.empty(stored.numel, dtype=dtype)
    step = max(1, CHUNK // stored.dtype.itemsize)
    staging = None if dtype == stored.dtype else torch.empty(min(step, stored.numel) or 1,
                                                             dtype=stored.dtype)  # fmt: skip
    finite = True
    try:
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.start)
            for at in range(0, stored.numel, step):
                part = out[at : at + step]
                raw = part if staging is None else staging[: len(part)]
                _fill(file, raw)
                finite = finite and _finite(raw)
                if staging is not None:
                    part.copy_(raw)
    except OSError as error:
        raise RecipeError(
            f"the tensor {stored.key} cannot be read: {error}", where=str(stored.file), hint=AGAIN
        ) from error
    if not finite:
        raise RecipeError(
            f"the weight {stored.key} holds NaN or infinity", where=str(stored.file),
            hint="the checkpoint is damaged; download it again",
        )  # fmt: skip
    if stored.dtype != dtype and not _finite(out):
        raise RecipeError(
            f"the weight {stored.key} overflows {str(dtype).removeprefix('torch.')}",
            where=str(stored.file), hint="choose model.dtype float32 or bfloat16",
        )  # fmt: skip
    return out.view(stored.shape)


def _of_expert(whole: Stored, piece: Piece, shape: torch.Size) -> Stored:
    """One expert's weight of `shape` in a tensor [experts, out, in], or [experts, in, out]."""
    outs, ins = piece.outs, shape[1]
    inside = piece.expert * outs * ins
    found = partial(replace, whole, shape=tuple(shape))
    if whole.shape == (piece.experts, outs, ins):
        return found(start=whole.start + (inside + piece.start * ins) * whole.dtype.itemsize)
    if whole.shape == (piece.experts, ins, outs):
        start = whole.start + inside * whole.dtype.itemsize
        return found(start=start, columns=(piece.start, outs))
    raise RecipeError(
        f"{whole.key} is {list(whole.shape)} on disk, and config.json makes it "
        f"{[piece.experts, outs, ins]}", where=str(whole.file),
        hint="config.json is of another model",
    )  # fmt: skip


def _files(folder: Path) -> list[Path]:
    """The checkpoint's files: those that the index names, or the only one."""
    index = _index(folder)
    names = [SINGLE] if index is None else sorted(set(index.values()))
    for name in names:
        if not (folder / name).is_file():
            raise _absent(folder, name, index is not None)
    return [folder / name for name in names]


def _index(folder: Path) -> dict[str, str] | None:
    try:
        return weight_map(folder)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"the index of the shards cannot be read: {error}", where=str(folder / INDEX),
            hint=AGAIN,
        ) from error  # fmt: skip


def _absent(folder: Path, name: str, indexed: bool) -> RecipeError:
    if indexed:
        return RecipeError(
            f"the checkpoint's file {name} is missing: the index names it", where=str(folder),
            hint=AGAIN,
        )  # fmt: skip
    if any(folder.glob("*.safetensors")):
        return RecipeError(f"the shards' index {INDEX} is missing", where=str(folder), hint=AGAIN)
    if any(folder.glob("*.bin")):
        return RecipeError(
            "the weights are in .bin files", where=str(folder),
            hint="masquant streams safetensors: load the model and save_pretrained it once",
        )  # fmt: skip
    return RecipeError(f"the checkpoint's file {name} is missing", where=str(folder), hint=AGAIN)


def _header(path: Path) -> list[Stored]:
    """The tensors of one file. Raises RecipeError when it is truncated or no safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, 100 << 20):
                raise ValueError("it is truncated, or no safetensors file")
            entries = json.loads(file.read(length))
        found, end = [], 0
        for key, entry in entries.items():
            if key == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                small = entry["dtype"].startswith(QUANTIZED_DTYPES)
                why = ": this checkpoint is already quantized" if small else ", not as floats"
                raise RecipeError(
                    f"{key} is stored as {entry['dtype']}{why}", where=str(path), hint=FROM_FLOAT
                )
            stored = Stored(key, path, dtype, tuple(entry["shape"]), 8 + length + start)
            if start < 0 or stop - start != stored.nbytes:
                raise ValueError(f"the header contradicts itself about {key}")
            found.append(stored)
            end = max(end, stop)
        if size < 8 + length + end:
            raise ValueError(f"it is truncated: {size:,} bytes of {8 + length + end:,}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"the weights cannot be loaded from {path.name}: {error}", where=str(path.parent),
            hint=AGAIN,
        ) from error  # fmt: skip
    return found


def _fill(file, tensor: Tensor) -> None:
    """Read exactly the bytes of a contiguous 1-D `tensor`."""
    view = memoryview(tensor.view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
    while len(view):
        got = file.readinto(view)  # at most 2 GB a call
        if not got:
            raise OSError("the file ends before it")
        view = view[got:]


def _finite(x: Tensor) -> bool:
    if not x.is_floating_point() or not x.numel():
        return True
    wide = torch.promote_types(x.dtype, torch.float32)
    # One fast pass; sums of large finite numbers may overflow, so a bad sum is looked at closely.
    return bool(torch.isfinite(x.sum(dtype=wide))) or bool(torch.isfinite(x).all())


def _all_equal(stored: list[Stored]) -> bool:
    """Whether tensors hold the same bytes, compared piece by piece."""
    first, *others = stored
    if any((s.dtype, s.shape) != (first.dtype, first.shape) for s in others):
        return False
    for other in others:
        try:
            with first.file.open("rb") as a, other.file.open("rb") as b:
                a.seek(first.start), b.seek(other.start)
                for at in range(0, first.nbytes, CHUNK):
                    size = min(CHUNK, first.nbytes - at)
                    if a.read(size) != b.read(size):
                        return False
        except OSError as error:
            raise RecipeError(
                f"{first.key} or {other.key} cannot be read: {error.strerror}",
                where=str(first.file.parent), hint=AGAIN,
            ) from error  # fmt: skip
    return True


def _untie(model: nn.Module, name: str) -> None:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    shared = module._parameters[own]
    module._parameters[own] = nn.Parameter(torch.empty_like(shared), requires_grad=False)


def _refuse_missing(checkpoint: Checkpoint, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    parameters = {id(p) for p in model.parameters()}
    # Transformers makes up a buffer that old checkpoints do not have; a weight it would invent.
    missing = sorted(
        name
        for name, tensor in state.items()
        if name not in checkpoint.stored and id(tensor) in parameters
    )
    # Its config.json need not say so: GPTQ's folders may have a file of their own for that.
    packed = sorted(key for key in checkpoint.tensors if key.endswith(PACKED))
    if missing and packed:
        raise RecipeError(
            f"this checkpoint is already quantized: it holds {packed[0]}",
            where=str(checkpoint.tensors[packed[0]].file), hint=FROM_FLOAT,
        )  # fmt: skip
    if missing:
        raise RecipeError(
            f"the checkpoint lacks {len(missing)} tensors, first {missing[0]}",
            where=str(checkpoint.folder), hint=f"is a shard missing? {AGAIN}",
        )  # fmt: skip


def _refuse_misfits(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> None:
    for name, stored in checkpoint.stored.items():
        wanted = state[name]
        if stored.shape != tuple(wanted.shape):
            raise RecipeError(
                f"{stored.key} is {list(stored.shape)} on disk, and config.json makes it "
                f"{list(wanted.shape)}", where=str(stored.file),
                hint="config.json is of another model",
            )  # fmt: skip
        if wanted.is_floating_point() and not stored.dtype.is_floating_point:
            raise RecipeError(
                f"{stored.key} is stored as {str(stored.dtype).removeprefix('torch.')}: this "
                "checkpoint is already quantized", where=str(stored.file), hint=FROM_FLOAT,
            )  # fmt: skip
