"""Hidden states between layers: in memory, or in raw files once they pass a budget of bytes.

On disk, what enters a layer is kept until all that enters the next one is there, so a run that was
interrupted goes on with the layer it was at. Nothing is pickled. Start at `Store`.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

STATE = "state.json"


@dataclass
class Store:
    """Tensors by name. `budget` bytes may lie in memory; with one more, all go to `folder`.

    Use as a context: the folder is removed at its end unless an error ends it.
    """

    folder: Path
    budget: int | None = None
    on_disk: bool = False
    _held: dict[str, list[Tensor]] = field(default_factory=dict)
    _shapes: dict[str, list[tuple[list[int], str]]] = field(default_factory=dict)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind, *_) -> None:
        self._held.clear()
        if kind is None or not (self.folder / STATE).exists():
            self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that lie in memory."""
        return sum(t.nbytes for tensors in self._held.values() for t in tensors)

    def put(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Keep CPU tensors under a name, in place of what was there."""
        if not self.on_disk:
            self._held[name] = list(tensors)
            if self.budget is not None and self.nbytes > self.budget:
                self.spill()
            return
        self._write(name, tensors)

    def get(self, name: str) -> list[Tensor]:
        """The tensors kept under a name; from disk they are copies."""
        return self._read(name) if self.on_disk else self._held[name]

    def drop(self, name: str) -> None:
        self._held.pop(name, None)
        self._shapes.pop(name, None)
        (self.folder / name).unlink(missing_ok=True)

    def spill(self) -> None:
        """From now on everything is on disk. Raises OSError."""
        self.on_disk = True
        self.folder.mkdir(parents=True, exist_ok=True)
        while self._held:
            name, tensors = self._held.popitem()
            self._write(name, tensors)

    def clear(self) -> None:
        """Forget everything, on disk as well."""
        self._held.clear(), self._shapes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def checkpoint(self, note: dict, dropping: Sequence[str] = ()) -> None:
        """Remember on disk what is kept there but `dropping`, which goes, and the json-able `note`,
        for `resume`. Nothing of that where all lies in memory."""
        if self.on_disk:
            for name in dropping:
                self._shapes.pop(name, None)
            partial = self.folder / f"{STATE}.partial"
            partial.write_text(json.dumps({"note": note, "shapes": self._shapes}))
            partial.replace(self.folder / STATE)
            for name in dropping:
                (self.folder / name).unlink(missing_ok=True)

    def resume(self) -> dict | None:
        """The note of an interrupted run whose tensors are there again; else None, and none are."""
        try:
            state = json.loads((self.folder / STATE).read_text())
            for name, shapes in state["shapes"].items():
                if (self.folder / name).stat().st_size != sum(_nbytes(*s) for s in shapes):
                    raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.clear()
            return None
        self.on_disk, self._shapes = True, state["shapes"]
        return state["note"]

    def _write(self, name: str, tensors: Sequence[Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / name).open("wb") as file:
            for tensor in tensors:
                file.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
        self._shapes[name] = [(list(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors]

    def _read(self, name: str) -> list[Tensor]:
        found = []
        with (self.folder / name).open("rb", buffering=0) as file:
            for shape, dtype in self._shapes[name]:
                raw = torch.empty(_nbytes(shape, dtype), dtype=torch.uint8)
                view = memoryview(raw.numpy())
                while len(view):
                    if not (got := file.readinto(view)):
                        raise OSError(f"{file.name} ends early")
                    view = view[got:]
                found.append(raw.view(getattr(torch, dtype)).view(shape))
        return found


def _nbytes(shape: Sequence[int], dtype: str) -> int:
    return torch.Size(shape).numel() * getattr(torch, dtype).itemsize
