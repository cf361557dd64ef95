"""export: a normal Hugging Face folder with packed weights, verified before it gets its name.

Only the quantized linears change: every other tensor is copied from its shard as it lies there,
under its name on disk. Memory is that of one site. Everything else in the folder (processor,
tokenizer, templates) is carried along.
"""

import json
import shutil
from contextlib import ExitStack, nullcontext
from pathlib import Path

from masquant_cli.errors import EnvironmentProblem
from masquant_cli.models.families import FAMILIES
from masquant_cli.models.index import INDEX
from masquant_cli.models.resolve import model_files
from masquant_cli.models.sites import Site
from masquant_cli.rundir import disk_errors
from masquant_cli.runtime.pack import export_tensors
from masquant_cli.shard_writer import new_shard
from masquant_cli.stages.card import write_card
from masquant_cli.stages.job import Job
from masquant_cli.stages.layout import Layout, lay_out, pieces
from masquant_cli.stages.verify import fresh_process, verify

# Not carried: weights in any format, and files that describe the float model.
LEFT_BEHIND = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
REPLACED = ("config.json", INDEX, "README.md")


def export(job: Job, folder: Path, fingerprint: str) -> dict:
    """Write `model/`, the exported folder, and verify it in a fresh process.

    Raises RecipeError when the source cannot be streamed, EnvironmentProblem when the disk is too
    small, CheckError when the reloaded model does not give the reference's logits.
    """
    partial, final, previous = (folder / f"model{s}" for s in (".partial", "", ".previous"))
    shutil.rmtree(partial, ignore_errors=True)
    prefix, config = _exported_part(job)
    layout = lay_out(job.float.checkpoint, job.layers, job.scheme, prefix)
    sizes = {
        "float": 2 * layout.weights,
        "quantized": layout.packed_nbytes,
        "total": layout.nbytes,
    }
    if final.exists():  # of another recipe: neither lost nor taken for the new one
        shutil.rmtree(previous, ignore_errors=True)
        final.rename(previous)
    carried = _carried(job.float.path)
    with disk_errors(folder):
        partial.mkdir(parents=True)
        _refuse_small_disk(folder, layout.nbytes + sum(p.stat().st_size for p in carried))
    with fresh_process(job) if job.recipe.export.verify else nullcontext() as fresh:
        with disk_errors(folder):
            _write_weights(job, layout, partial)
            _write_config(job, config, partial)
            for path in carried:
                copy = partial / path.relative_to(job.float.path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            write_card(job, partial, sizes)
        checked = verify(job, partial, fresh) if fresh else None
    partial.rename(final)
    shutil.rmtree(previous, ignore_errors=True)
    return {
        "export_dir": str(final),
        "bytes": sizes,
        "bits_per_weight": round(8 * layout.packed_nbytes / layout.weights, 3),
        "verified": checked,
    }


def _exported_part(job: Job) -> tuple[str, dict]:
    """What keys of the exported tensors begin with on disk, and the config that describes them.

    Of a full Omni checkpoint the thinker alone is exported, and "thinker." taken off its keys.
    """
    config = json.loads((job.float.path / "config.json").read_text())
    prefix, family = "", FAMILIES.get(config.get("model_type"))
    subconfig = family.subconfig if family else ""
    if subconfig and (part := config.get(subconfig)) is not None:
        prefix = subconfig.removesuffix("_config") + "."
        config = {**part, "model_type": job.float.config.model_type}
    config["architectures"] = [type(job.float.model).__name__]
    return prefix, config


def _refuse_small_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EnvironmentProblem(
            f"the export needs {needed / 1e9:.2f} GB, this disk has {free / 1e9:.2f} GB left",
            where=str(folder),
            hint="free space and run the same command again: finished stages are kept",
        )


def _write_weights(job: Job, layout: Layout, folder: Path) -> None:
    """Fill all files at once, so that a site is packed once wherever its linears lie."""
    job.progress.stage("export", len(job.layers), "layers")
    with ExitStack() as stack:
        shards = {
            file: stack.enter_context(new_shard(folder / file, entries))
            for file, entries in layout.files.items()
        }
        for stored, name in layout.copied:
            shards[stored.file.name].copy(name, pieces(stored))
        for layer in job.layers:
            for site in layer.sites:
                for key, tensor in _pack(job, site).items():
                    file, name = layout.packed[key]
                    shards[file].write(name, tensor)
            job.progress.advance(1)
    if (job.float.path / INDEX).exists():
        index = {name: file for file, entries in layout.files.items() for name in entries}
        content = {"metadata": {"total_size": layout.nbytes}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _pack(job: Job, site: Site) -> dict:
    """The site's tensors, from its solved scales and corrections."""
    scale = job.read("smooth", site.layer, f"{site.key}.")[f"{site.key}.scale"]
    compensate = job.read("compensate", site.layer, f"{site.key}.")
    low_rank = {
        name: (compensate[f"{site.key}.{name}.lr_a"], compensate[f"{site.key}.{name}.lr_b"])
        for name in job.recipe.modalities
        if f"{site.key}.{name}.lr_a" in compensate
    }
    weights = (job.float.weight(linear) for linear in site.linears)
    return export_tensors(
        site, weights, scale, low_rank, job.scheme, compensate.get(f"{site.key}.weight")
    )


def _write_config(job: Job, config: dict, folder: Path) -> None:
    config = {**config, "quantization_config": job.scheme.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _carried(source: Path) -> list[Path]:
    """Files of the float folder that the export takes over."""
    return [
        path
        for path in model_files(source)
        if path.relative_to(source).as_posix() not in REPLACED and path.suffix not in LEFT_BEHIND
    ]
