"""export: a normal Hugging Face folder with packed weights, verified before it gets its name.

The original shards are streamed one at a time under their on-disk names; only the quantized
linears change. Everything else in the folder (processor, tokenizer, templates) is carried along.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from masquant_cli.errors import RecipeError
from masquant_cli.models.families import family_of
from masquant_cli.models.index import INDEX
from masquant_cli.models.names import disk_names, new_disk_names
from masquant_cli.models.resolve import model_files
from masquant_cli.models.sites import Site
from masquant_cli.rundir import disk_errors, replace_atomic
from masquant_cli.runtime.pack import export_tensors
from masquant_cli.stages.card import write_card
from masquant_cli.stages.job import Job
from masquant_cli.stages.verify import verify

# Not carried: weights in any format, and files that describe the float model.
LEFT_BEHIND = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
REPLACED = ("config.json", INDEX, "README.md")


@dataclass(frozen=True)
class Source:
    """The float checkpoint on disk. `prefix` is stripped: "thinker." of a full Omni folder."""

    folder: Path
    files: tuple[str, ...]
    config: dict
    prefix: str


def export(job: Job, folder: Path, fingerprint: str) -> dict:
    """Write `model/`, the exported folder, and verify it in a fresh process.

    Raises RecipeError when the source cannot be streamed, CheckError when the reloaded model
    does not give the reference's logits.
    """
    source = _source(job)
    partial, final, previous = (folder / f"model{s}" for s in (".partial", "", ".previous"))
    shutil.rmtree(partial, ignore_errors=True)
    if final.exists():  # of another recipe: neither lost nor taken for the new one
        shutil.rmtree(previous, ignore_errors=True)
        final.rename(previous)
    with disk_errors(folder):
        partial.mkdir(parents=True)
        sizes = _write_weights(job, source, partial)
        _write_config(job, source, partial)
        _carry_files(source.folder, partial)
        write_card(job, partial, sizes)
    checked = verify(job, partial) if job.recipe.export.verify else None
    partial.rename(final)
    shutil.rmtree(previous, ignore_errors=True)
    return {"export_dir": str(final), "bytes": sizes, "verified": checked}


def _source(job: Job) -> Source:
    folder = job.loaded.path
    config = json.loads((folder / "config.json").read_text())
    family = family_of(job.loaded.model.config)
    prefix = ""
    if (outer := config.get("thinker_config")) is not None:
        prefix, config = "thinker.", {**outer, "model_type": family.model_type}
    config["architectures"] = [type(job.loaded.model).__name__]
    if (folder / INDEX).exists():
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    for name in files:
        if not (folder / name).exists():
            raise RecipeError(
                f"the checkpoint's file {name} is missing", where=str(folder),
                hint="masquant streams safetensors; convert other formats with "
                "save_pretrained first",
            )  # fmt: skip
    return Source(folder, tuple(files), config, prefix)


def _write_weights(job: Job, source: Source, folder: Path) -> dict[str, int]:
    """Stream every source file into one of the same name. Returns byte counts of the linears."""
    keys = {f: _keys(source.folder / f) for f in source.files}
    names = disk_names(job.loaded.model, [k for found in keys.values() for k in found])
    module_of = {disk: module for module, disk in names.items()}
    replaced = {
        f"{linear}.weight": (site, linear)
        for layer in job.layers
        for site in layer.sites
        for linear in site.linears
    }
    missing = sorted(set(replaced) - set(names))
    if missing:
        raise RecipeError(
            f"no tensor on disk for {missing[0]}", where=str(source.folder),
            hint="the checkpoint stores this layer in a form masquant does not know yet",
        )  # fmt: skip
    index: dict[str, str] = {}
    sizes = {"float": 0, "quantized": 0, "total": 0}
    packer = _Packer(job)
    job.progress.stage("export", len(source.files), "files")
    for file in source.files:
        written: dict[str, torch.Tensor] = {}
        with safe_open(source.folder / file, framework="pt") as tensors:
            for key in keys[file]:
                if source.prefix and not key.startswith(source.prefix):
                    continue
                if (module := module_of.get(key)) in replaced:
                    site, linear = replaced[module]
                    new = packer.tensors(site, linear)
                    disk = new_disk_names(new, names)
                    written |= {disk[k].removeprefix(source.prefix): t for k, t in new.items()}
                    sizes["float"] += job.loaded.model.get_submodule(linear).weight.numel() * 2
                    sizes["quantized"] += sum(t.nbytes for t in new.values())
                else:
                    written[key.removeprefix(source.prefix)] = tensors.get_tensor(key)
        if not written:
            continue
        with replace_atomic(folder / file) as temporary:
            # A single metadata key: safetensors does not keep the order of several.
            save_file(written, temporary, metadata={"format": "pt"})
        index |= dict.fromkeys(written, file)
        sizes["total"] += sum(t.nbytes for t in written.values())
        job.progress.advance(1)
    if len(source.files) > 1:
        content = {"metadata": {"total_size": sizes["total"]}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return sizes


class _Packer:
    """Packs each site of a layer once, in whatever order a file lists its linears.

    Hands out each linear's share; a site's first linear also brings the site's own tensors.
    """

    def __init__(self, job: Job):
        self.job = job
        self.layer: int | None = None
        self.solved: dict[str, dict[str, torch.Tensor]] = {}
        self.packed: dict[str, dict[str, torch.Tensor]] = {}  # by site kind

    def tensors(self, site: Site, linear: str) -> dict[str, torch.Tensor]:
        if self.layer != site.layer:
            self.layer, self.packed = site.layer, {}
            self.solved = {s: self.job.read(s, site.layer) for s in ("smooth", "compensate")}
        if site.key not in self.packed:
            self.packed[site.key] = _pack(self.job, site, **self.solved)
        owners = (f"{linear}.",)
        if linear == site.linears[0]:
            owners += (f"{site.module}.",)
        return {k: t for k, t in self.packed[site.key].items() if k.startswith(owners)}


def _pack(job: Job, site: Site, smooth: dict, compensate: dict) -> dict[str, torch.Tensor]:
    """The site's tensors, from its layer's solved scales and corrections."""
    scale = smooth[f"{site.key}.scale"]
    low_rank = {
        name: (compensate[f"{site.key}.{name}.lr_a"], compensate[f"{site.key}.{name}.lr_b"])
        for name in job.recipe.modalities
        if f"{site.key}.{name}.lr_a" in compensate
    }
    weights = [job.loaded.model.get_submodule(n).weight.detach().cpu() for n in site.linears]
    return export_tensors(
        site, weights, scale, low_rank, job.scheme, compensate.get(f"{site.key}.weight")
    )


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"this shard cannot be read: {error}", where=str(path), hint="download it again"
        ) from error


def _write_config(job: Job, source: Source, folder: Path) -> None:
    config = {**source.config, "quantization_config": job.scheme.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _carry_files(source: Path, folder: Path) -> None:
    for path in model_files(source):
        relative = path.relative_to(source)
        if relative.as_posix() in REPLACED or path.suffix in LEFT_BEHIND:
            continue
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / relative)
