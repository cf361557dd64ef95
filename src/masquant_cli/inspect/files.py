"""safetensors files by their headers: 8 bytes of length, JSON, then the tensors."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from masquant_cli.errors import ArtifactError, RecipeError
from masquant_cli.recipe import SITE_KINDS
from masquant_cli.rundir import STAGES, file_sha256, read_manifest

LOW_RANK = (".lr_a", ".lr_b")  # endings of the tensors of an exported folder, docs/format.md
STORED = (".weight_packed", ".weight_scale", ".weight_zero_point", ".smooth_inv")
HEADER_MOST = 100_000_000  # bytes, as the format's own library allows
AGAIN = "delete the stage's folder and run again, or download the file again"


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str  # as the format writes it: F32, BF16, I8, ...
    shape: tuple[int, ...]
    bytes: int
    start: int  # of its bytes in the file

    def plain(self) -> dict:
        shape = list(self.shape)
        return {"name": self.name, "dtype": self.dtype, "shape": shape, "bytes": self.bytes}


def read(path: Path) -> tuple[list[Tensor], dict]:
    """The tensors of a file in its order, and its metadata. ArtifactError unless it is whole."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_MOST):
                raise ValueError("it ends within its header")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        first = 8 + length
        found = [
            Tensor(name, t["dtype"], tuple(t["shape"]), end - start, first + start)
            for name, t in header.items()
            for start, end in [t["data_offsets"]]
        ]
        found.sort(key=lambda t: t.start)
        wanted = max((t.start + t.bytes for t in found), default=first)
        if size != wanted:
            raise ValueError(f"it has {size} bytes, its header speaks of {wanted}")
    except FileNotFoundError:
        raise RecipeError("there is no such file", where=str(path), hint="check the path") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"not a whole safetensors file: {error}", where=str(path), hint=AGAIN
        ) from error
    return found, metadata


def dtypes(tensors: Iterable[Tensor]) -> dict[str, dict]:
    """{dtype: {"tensors", "bytes"}}, the largest first."""
    sizes, counts = Counter(), Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.bytes
        counts[tensor.dtype] += 1
    return {d: {"tensors": counts[d], "bytes": size} for d, size in sizes.most_common()}


def parts(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Bytes of quantized linears (integers, scales, smoothing), low rank, and all else."""
    sizes = {"quantized_linears": 0, "low_rank": 0, "other": 0}
    for tensor in tensors:
        low_rank, stored = tensor.name.endswith(LOW_RANK), tensor.name.endswith(STORED)
        sizes["low_rank" if low_rank else "quantized_linears" if stored else "other"] += (
            tensor.bytes
        )
    return {**sizes, "total": sum(sizes.values())}


def shard(path: Path) -> dict:
    """One file: all its tensors and, in a stage's, what that stage noted."""
    tensors, metadata = read(path)
    document = {
        "kind": "shard",
        "path": str(path),
        "of": "stage" if "masquant" in metadata else "model",
        "bytes": {
            "total": sum(t.bytes for t in tensors),
            "file": path.stat().st_size,
        },
        "dtypes": dtypes(tensors),
    }
    if document["of"] == "stage":
        document |= _of_stage(path, tensors, metadata)
    else:
        document["bytes"] = {**parts(tensors), "file": document["bytes"]["file"]}
        document["metadata"] = metadata
    return document | {"tensors": [tensor.plain() for tensor in tensors]}


def _of_stage(path: Path, tensors: list[Tensor], metadata: dict) -> dict:
    try:
        header = json.loads(metadata["masquant"])
        fingerprint, notes = header["fingerprint"], header["notes"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"its notes cannot be read: {error}", where=str(path), hint=AGAIN
        ) from error
    stage = next((f for f in path.absolute().parents[:2] if f.name in STAGES), None)
    named = [tuple(t.name.split(".")) for t in tensors]
    number = re.fullmatch(r"\d+", path.stem)
    tokens, experts = _tokens(path, tensors)
    return {
        "stage": stage.name if stage else None,
        "layer": int(path.stem) if number else None,
        "sites": [kind for kind in SITE_KINDS if any(kind == name[0] for name in named)],
        "modalities": list(
            dict.fromkeys(n[-2] for n in named if len(n) >= 3 and not n[-2].isdigit())
        ),
        "ranks": {
            t.name.removesuffix(".lr_a"): t.shape[1] for t in tensors if t.name.endswith(".lr_a")
        },
        "tokens": tokens,
        **({"experts": experts} if experts else {}),
        "fingerprint": fingerprint,
        "finished": _vouched(stage, path) if stage else None,
        "notes": notes,
    }


def _tokens(path: Path, tensors: list[Tensor]) -> tuple[dict[str, int], dict[str, dict]]:
    """Tokens of each modality that calibration saw: by every site of the layer, and by its
    experts' own (min, median, and how many saw none)."""
    found: dict[str, int] = {}
    own: dict[str, list[int]] = {}
    with path.open("rb") as file:
        for tensor in tensors:
            if not tensor.name.endswith(".count") or tensor.bytes != 8:
                continue
            *site, modality, _ = tensor.name.split(".")
            file.seek(tensor.start)
            count = int.from_bytes(file.read(8), "little")
            if len(site) == 1:
                found[modality] = count
            else:
                own.setdefault(modality, []).append(count)
    return found, {
        m: {"min": min(seen), "median": median(seen), "without": seen.count(0)}
        for m, seen in own.items()
    }


def _vouched(stage: Path, path: Path) -> bool:
    """Whether the stage finished with the file as it is."""
    manifest = read_manifest(stage)
    if manifest is None:
        return False
    said = manifest.outputs.get(path.absolute().relative_to(stage).as_posix())
    return said == file_sha256(path)
