"""One safetensors file per decoder layer, written whole or not at all.

Every shard carries the fingerprint of the stage that wrote it, so a resumed run knows which
layers are its own. Nothing is pickled.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from masquant_cli.errors import ArtifactError
from masquant_cli.rundir import file_sha256, replace_atomic


def layer_file(stage_dir: Path, layer: int) -> Path:
    return stage_dir / "layers" / f"{layer:03d}.safetensors"


def save(path: Path, tensors: dict[str, torch.Tensor], *, fingerprint: str, notes: dict) -> None:
    """Write `tensors` (made contiguous, moved to CPU) and json-able `notes` atomically."""
    ready = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    # One metadata key only: safetensors does not keep the order of several, and bytes must repeat.
    header = json.dumps({"fingerprint": fingerprint, "notes": notes}, sort_keys=True)
    with replace_atomic(path) as temporary:
        save_file(ready, temporary, metadata={"masquant": header})


def read_header(path: Path) -> dict | None:
    """{"fingerprint", "notes"} of a readable shard; None when it is absent or damaged."""
    try:
        with safe_open(path, framework="pt") as shard:
            return json.loads((shard.metadata() or {})["masquant"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def is_done(path: Path, fingerprint: str) -> bool:
    header = read_header(path)
    return header is not None and header["fingerprint"] == fingerprint


def load(
    path: Path, *, sha256: str | None = None, prefix: str = "", suffix: str | tuple[str, ...] = ""
) -> dict[str, torch.Tensor]:
    """A shard's tensors whose names begin and end so (several ends: one of them), by name; others
    are not read.

    Raises ArtifactError when the file is damaged or, with its hash given, changed.
    """
    try:
        if sha256 is not None and file_sha256(path) != sha256:
            raise ArtifactError(
                "this file changed after the stage that wrote it finished",
                where=str(path),
                hint="delete the stage's folder and run again",
            )
        with safe_open(path, framework="pt") as shard:
            names = (n for n in shard.keys() if n.startswith(prefix) and n.endswith(suffix))
            return {name: shard.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"cannot read this layer: {error}",
            where=str(path),
            hint="delete the stage's folder and run again; finished stages before it are kept",
        ) from error
