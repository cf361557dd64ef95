"""What a plan is about: the model without its weights, what in it is quantized and what is not,
and how large the result is. Bytes are exact, from headers or, without weights, from config.json.
"""

import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from masquant_kernels import packed_columns

from masquant_cli.models import loading
from masquant_cli.models.checkpoint import SINGLE, Checkpoint, Stored
from masquant_cli.models.families import family_of
from masquant_cli.models.index import INDEX, weight_map
from masquant_cli.models.modality import check_modalities
from masquant_cli.models.resolve import BUILTIN, resolve
from masquant_cli.models.sites import layers_path
from masquant_cli.models.skeleton import Skeleton, build, load_skeleton
from masquant_cli.plan.work import META, PlannedJob
from masquant_cli.progress import NullProgress
from masquant_cli.recipe import Model, Recipe
from masquant_cli.shard_writer import Shard
from masquant_cli.stages import export
from masquant_cli.stages.layout import Layout, lay_out


@dataclass(frozen=True)
class Subject:
    """A recipe's job on shapes, where its weights are known from (files | config), how long the
    model took to open, and the export's layout."""

    job: PlannedJob
    known_from: str
    seconds: float
    layout: Layout

    @property
    def folder(self) -> Path:
        return self.job.float.path


def open_subject(recipe: Recipe, device: str) -> Subject | None:
    """None for a model of the hub of which not even config.json is here. Raises RecipeError for
    damaged files, a group size that does not divide, modalities the model does not have."""
    folder = resolve(recipe.model, download=False) or _cached_config(recipe.model)
    if folder is None:
        return None
    job = PlannedJob(recipe, NullProgress())
    began = time.perf_counter()
    held = _are_held(recipe.model, folder)
    if held:
        spec = recipe.model.model_copy(update={"path": str(folder), "revision": None})
        skeleton = load_skeleton(spec, device)
    else:
        skeleton = _from_config(recipe, folder, device)
    check_modalities(skeleton.config, recipe.modalities, where="modalities")
    job.float = replace(skeleton, device=META)
    seconds = time.perf_counter() - began
    prefix = export._exported_part(job)[0]
    layout = lay_out(skeleton.checkpoint, job.layers, job.scheme, prefix if held else "")
    return Subject(job, "files" if held else "config", seconds, layout)


def _are_held(spec: Model, folder: Path) -> bool:
    """Whether weights are here. A download that was interrupted has some: `run` gets the rest."""
    from_hub = not spec.path.startswith(BUILTIN) and not Path(spec.path).expanduser().exists()
    if from_hub and (files := weight_map(folder)):
        return all((folder / file).exists() for file in files.values())
    return (folder / INDEX).exists() or any(folder.glob("*.safetensors"))


def _cached_config(spec: Model) -> Path | None:
    """The folder of a hub model of which at least config.json was downloaded."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(spec.path, "config.json", revision=spec.revision)
    return Path(found).parent if isinstance(found, str) else None


def _from_config(recipe: Recipe, folder: Path, device: str) -> Skeleton:
    """The model as its config.json makes it, every weight stored in the dtype named there."""
    config = loading.read_config(folder)
    family, where = family_of(config), torch.device(device)
    dtype = loading.pick_dtype(recipe.model.dtype, where, config)
    on_disk = getattr(config, "dtype", None) or torch.bfloat16  # before building changes it
    model = build(config, family, dtype)
    file, stored, seen = folder / SINGLE, {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = seen.setdefault(id(tensor), name)
        stored[name] = Stored(first, file, on_disk, tuple(tensor.shape), 0)
    tensors = {s.key: s for s in stored.values()}
    checkpoint = Checkpoint(folder, (file,), tensors, stored)
    return Skeleton(model, checkpoint, None, folder, where, dtype, family_of(model.config))


def matched(subject: Subject) -> dict[str, dict]:
    """Per site kind: in how many layers, which linears, their shapes, and their weights."""
    found: dict[str, dict] = {}
    for layer in subject.job.layers:
        for site in layer.sites:
            names = list(dict.fromkeys(name.rpartition(".")[2] for name in site.linears))
            entry = found.setdefault(
                site.kind,
                {"sites": 0, "linears": names, "in": site.in_features,
                 "out": list(site.out_features)[: len(names)], "weights": 0,
                 "rank": subject.job.rank(site)},
            )  # fmt: skip
            entry["sites"] += 1
            entry["weights"] += site.in_features * sum(site.out_features)
    for site in (s for layer in subject.job.layers for s in layer.sites):
        entry = found[site.kind]
        entry["padded_inputs"] = _padding(subject.job.recipe, site.in_features)
    return found


def _padding(recipe: Recipe, width: int) -> int:
    """Inputs that packing adds to each row of a weight: 4-bit weights are packed in blocks."""
    return packed_columns(width) * 2 - width if recipe.weights.bits == 4 else 0


def ignored(subject: Subject) -> list[dict]:
    """What stays float: {"module", "bytes", "tensors"}, the largest first."""
    skeleton = subject.job.float
    linears = {f"{n}.weight" for la in subject.job.layers for s in la.sites for n in s.linears}
    layers = layers_path(skeleton.model, skeleton.family)
    groups: dict[str, list[int]] = {}
    counted = set()
    for name, stored in skeleton.checkpoint.stored.items():
        if name in linears or stored in counted:
            continue
        counted.add(stored)
        if name.startswith(f"{layers}."):
            group = f"{layers}.*: norms, biases, routers"
        else:
            parts = name.split(".")[:-1]
            group = ".".join(parts[: 2 if parts[0] in ("model", "thinker") else 1])
        entry = groups.setdefault(group, [0, 0])
        entry[0] += stored.nbytes
        entry[1] += 1
    rows = [{"module": m, "bytes": b, "tensors": n} for m, (b, n) in groups.items()]
    return sorted(rows, key=lambda row: (-row["bytes"], row["module"]))


def size(subject: Subject) -> dict[str, Any]:
    """Of the export, in bytes: its safetensors files with their headers, and what is in them."""
    layout = subject.layout
    return {
        "files": sum(_file_bytes(entries) for entries in layout.files.values()),
        "total": layout.nbytes,
        "quantized": layout.packed_nbytes,
        "float": 2 * layout.weights,
        "source": sum(s.nbytes for s in set(subject.job.float.checkpoint.tensors.values())),
        "bits_per_weight": round(8 * layout.packed_nbytes / max(1, layout.weights), 3),
    }


def carried(subject: Subject) -> int:
    """Bytes of the other files that the export takes over."""
    return sum(p.stat().st_size for p in export._carried(subject.folder))


def _file_bytes(entries: Mapping) -> int:
    header = io.BytesIO()
    Shard(header, entries)
    return len(header.getvalue()) + sum(entry.nbytes for entry in entries.values())
