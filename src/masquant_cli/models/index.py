"""Which file of a sharded checkpoint holds which tensor. Needs neither torch nor transformers."""

import json
from pathlib import Path

INDEX = "model.safetensors.index.json"


def weight_map(folder: Path) -> dict[str, str] | None:
    """{tensor on disk: its file} as the folder's INDEX says; None where it has none.

    Raises OSError or ValueError when it cannot be read.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ValueError("it has no weight_map of tensors to files")
    return found
