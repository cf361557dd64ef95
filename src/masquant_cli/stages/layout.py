"""Which tensor lies in which file of the export, known from headers before anything is read.

Files, their names and the names in them are the float checkpoint's; the packed tensors of a linear
lie in the file that held its weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from masquant_cli.errors import RecipeError
from masquant_cli.models.checkpoint import CHUNK, Checkpoint, Stored
from masquant_cli.models.names import new_disk_names
from masquant_cli.models.sites import LayerSites
from masquant_cli.runtime.pack import export_shapes
from masquant_cli.runtime.scheme import Scheme
from masquant_cli.shard_writer import Entry


@dataclass(frozen=True)
class Layout:
    """The files of an export. Tied tensors stay as on disk: once, or as often as they were."""

    files: dict[str, dict[str, Entry]] = field(default_factory=dict)  # file -> name on disk
    copied: list[tuple[Stored, str]] = field(default_factory=list)  # and its name in the export
    packed: dict[str, tuple[str, str]] = field(default_factory=dict)  # module key -> file, name
    weights: int = 0  # in the quantized linears

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for entries in self.files.values() for e in entries.values())

    @property
    def packed_nbytes(self) -> int:
        return sum(self.files[file][name].nbytes for file, name in self.packed.values())


def lay_out(
    checkpoint: Checkpoint, layers: list[LayerSites], scheme: Scheme, prefix: str = ""
) -> Layout:
    """The export of `checkpoint`. Only keys that start with `prefix` are kept, and lose it.

    Raises RecipeError when a linear's weight is not on disk.
    """
    sites = [site for layer in layers for site in layer.sites]
    known = {module: stored.key for module, stored in checkpoint.stored.items()}
    layout = Layout(weights=sum(s.in_features * sum(s.out_features) for s in sites))
    home: dict[str, Stored] = {}  # linear -> where its float weight lies
    for linear in (name for site in sites for name in site.linears):
        if (stored := checkpoint.stored.get(f"{linear}.weight")) is None:
            raise RecipeError(
                f"no tensor on disk for {linear}.weight", where=str(checkpoint.folder),
                hint="the checkpoint stores this layer in a form masquant does not know yet",
            )  # fmt: skip
        home[linear] = stored
    replaced = {stored.key for stored in home.values()}
    for key, stored in checkpoint.tensors.items():
        if key.startswith(prefix) and key not in replaced:
            name = key.removeprefix(prefix)
            layout.copied.append((stored, name))
            entries = layout.files.setdefault(stored.file.name, {})
            entries[name] = Entry(stored.dtype, stored.shape)
    for site in sites:
        shapes = export_shapes(site, scheme)
        disk = new_disk_names(shapes, known)
        for key, (dtype, shape) in shapes.items():
            linear = key.rpartition(".")[0]
            file = home.get(linear, home[site.linears[0]]).file.name  # the site's own: its first's
            name = disk[key].removeprefix(prefix)
            layout.files.setdefault(file, {})[name] = Entry(dtype, shape)
            layout.packed[key] = file, name
    return layout


def pieces(stored: Stored) -> Iterator[bytes]:
    """The bytes of a tensor, undecoded. Raises RecipeError when they cannot be read."""
    try:
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.start)
            yield from _read(file, stored.nbytes)
    except (EOFError, OSError) as error:
        why = getattr(error, "strerror", None) or "the file ends within it"
        raise RecipeError(
            f"{stored.key} cannot be read: {why}", where=str(stored.file),
            hint="download the model again",
        ) from error  # fmt: skip


def _read(file: BinaryIO, left: int) -> Iterator[bytes]:
    while left:
        if not (piece := file.read(min(CHUNK, left))):
            raise EOFError
        left -= len(piece)
        yield piece
