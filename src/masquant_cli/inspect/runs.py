"""Run directories and single stages, by their manifests."""

import json
import re
from pathlib import Path

from masquant_cli.errors import ArtifactError
from masquant_cli.inspect import checkpoints
from masquant_cli.recipe import Recipe
from masquant_cli.rundir import RECIPE, STAGES, Manifest, fingerprint, read_manifest


def is_run(path: Path) -> bool:
    found = (path / stage / "manifest.json" for stage in STAGES)
    return (path / RECIPE).is_file() or any(file.is_file() for file in found)


def is_stage(path: Path) -> bool:
    return path.absolute().name in STAGES and (path / "manifest.json").is_file()


def run(path: Path) -> dict:
    """A run: its recipe, the state and cost of its stages, its checkpoint and evaluation.

    States: finished, stale (and why), unfinished, absent. They are told from the run's files
    alone; `masquant run --dry-run` also looks whether the model or the data changed. Raises
    ArtifactError for what is damaged.
    """
    recipe = _recipe(path)
    manifests = {stage: read_manifest(path / stage) for stage in STAGES}
    stages = {}
    for stage, before in zip(STAGES, (None, *STAGES), strict=False):
        state, why = _state(path, stage, before, manifests, recipe)
        stages[stage] = {"state": state, "why": why, **_stage(path / stage, manifests[stage])}
    _elsewhere(stages, manifests)
    model = path / "export" / "model"
    exported = (model / "config.json").is_file()
    return {
        "kind": "run",
        "path": str(path),
        "name": recipe.name if recipe else None,
        **(said(recipe) if recipe else {}),
        "stages": stages,
        "seconds": sum(s["seconds"] or 0 for s in stages.values()),
        "peak_bytes": max((s["peak_bytes"] or 0 for s in stages.values()), default=0),
        "bytes_on_disk": sum(p.stat().st_size for p in path.rglob("*") if p.is_file()),
        "provenance": _provenance(recipe, manifests),
        "checkpoint": checkpoints.folder(model) if exported else None,
        "evaluation": _evaluation(path),
        "recipe": recipe.model_dump(mode="json") if recipe else None,
    }


def stage(path: Path) -> dict:
    """One finished stage's folder."""
    manifest = read_manifest(path)
    lost = _lost(path, manifest)
    why = f"its output {lost} is gone or was changed" if lost else ""
    return {
        "kind": "stage",
        "path": str(path),
        "stage": manifest.stage,
        "state": "stale" if lost else "finished",
        "why": why,
        **_stage(path, manifest),
        "seed": manifest.seed,
        "versions": manifest.versions,
        "upstream": manifest.upstream,
        "reads": manifest.reads,
        "files": [
            {"name": name, "bytes": manifest.sizes.get(name), "sha256": digest}
            for name, digest in manifest.outputs.items()
        ],
    }


def said(recipe: Recipe) -> dict:
    """What a recipe decides about the checkpoint."""
    return {
        "method": recipe.method,
        "bits": f"W{recipe.weights.bits}A{recipe.activations.bits}",
        "weights": recipe.weights.model_dump(mode="json"),
        "activations": recipe.activations.model_dump(mode="json"),
        "modalities": list(recipe.modalities),
        "base_modality": recipe.modalities[0],
        "compensation": recipe.compensation.model_dump(mode="json"),
        "seed": recipe.seed,
        "sources": [source.dataset for source in recipe.calibration.sources],
        "tasks": {task.name: task.metric for task in recipe.evaluation.tasks},
    }


def _recipe(path: Path) -> Recipe | None:
    file = path / RECIPE
    try:
        return Recipe.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"this run's recipe cannot be read: {str(error).splitlines()[0]}",
            where=str(file),
            hint="run the recipe again in this directory",
        ) from error


def _stage(folder: Path, manifest: Manifest | None) -> dict:
    there = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    outputs = manifest.outputs if manifest else [p.relative_to(folder).as_posix() for p in there]
    layers = [name for name in outputs if re.fullmatch(r"layers/\d+\.safetensors", name)]
    return {
        "seconds": manifest.seconds if manifest else None,
        "peak_bytes": manifest.peak_bytes if manifest else None,
        "peak_gpu_bytes": manifest.peak_gpu_bytes if manifest else None,
        "layers": len(layers),
        "bytes": sum(p.stat().st_size for p in there if p.name != "manifest.json"),
        "fingerprint": manifest.fingerprint if manifest else None,
        "summary": manifest.summary if manifest else {},
    }


def _state(
    path: Path, stage: str, before: str | None, manifests: dict, recipe: Recipe | None
) -> tuple[str, str]:
    manifest, earlier = manifests[stage], manifests.get(before)
    if manifest is None:
        begun = any((path / stage).glob("*"))
        return ("unfinished", "interrupted, or failed") if begun else ("absent", "")
    if lost := _lost(path / stage, manifest):
        return "stale", f"its output {lost} is gone or was changed"
    if earlier is not None and manifest.upstream != fingerprint(earlier.outputs):
        return "stale", f"the {before} stage was done again after it"
    if recipe is not None and (key := _differs(manifest.reads, recipe)):
        return "stale", f"the run's recipe has another {key}"
    return "finished", ""


def _elsewhere(stages: dict, manifests: dict) -> None:
    """A calibration that was taken from another run leaves nothing here."""
    smooth = manifests["smooth"]
    if stages["calibrate"]["state"] == "absent" and smooth is not None and smooth.upstream:
        stages["calibrate"]["why"] = "reused from another run"


def _lost(folder: Path, manifest: Manifest) -> str | None:
    """An output that is not there in the size it was written; contents are not read."""
    for name in manifest.outputs:
        file = folder / name
        if not file.is_file() or file.stat().st_size != manifest.sizes.get(name):
            return name
    return None


def _differs(reads: dict, recipe: Recipe) -> str | None:
    """The first part of the recipe that is not as the stage read it."""
    whole = recipe.model_dump(mode="json")
    for key, value in reads.items():
        now = whole.get(key)
        if key not in whole or (key == "device" and now == "auto"):
            continue
        if isinstance(value, dict) and isinstance(now, dict):
            now = {k: now.get(k) for k in value}  # a stage reads only some of a section
        if now != value:
            return key
    return None


def _provenance(recipe: Recipe | None, manifests: dict[str, Manifest | None]) -> dict:
    calibrate = manifests["calibrate"]
    reads = calibrate.reads if calibrate else {}
    last = next((m for m in reversed(manifests.values()) if m), None)
    export = manifests["export"]
    said = checkpoints.provenance(export) if export else {}
    return {
        "recipe": recipe.name if recipe else said.get("recipe"),
        "model": recipe.model.path if recipe else said.get("model"),
        "model_files": reads.get("the model's files"),
        "data_files": reads.get("the data files"),
        "data": calibrate.summary.get("data") if calibrate else None,
        "seed": last.seed if last else recipe.seed,
        "versions": last.versions if last else {},
        "fingerprints": {stage: m.fingerprint for stage, m in manifests.items() if m},
    }


def _evaluation(path: Path) -> dict | None:
    """The last evaluation, as it was written; whether it is of this export is not checked."""
    file = path / "eval" / "result.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {
            "model": found.get("model"),
            "model_fingerprint": found.get("model_fingerprint"),
            "tasks": found["tasks"],
            "sqnr_db": found.get("sqnr_db"),
        }
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"this evaluation cannot be read: {error}",
            where=str(file),
            hint="delete it and run masquant eval again",
        ) from error
