"""Which stages of a run still hold: what each one's result depends on, and what of it changed.

No model is loaded for it: manifests and the hashes of files say it all. Start at `plan`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from masquant_cli import recipe as recipes
from masquant_cli.rundir import STAGES, RunDir, damaged_output, fingerprint, read_manifest


@dataclass(frozen=True)
class StagePlan:
    """What `run` would do with a stage: cached | stale | todo, and why."""

    stage: str
    state: str
    why: str
    fingerprint: str
    reads: dict  # what the fingerprint hashes
    folder: Path


def plan(
    recipe: recipes.Recipe, run_dir: Path, reuse: Sequence[Path] = (), *, download: bool = True
) -> list[StagePlan]:
    """The state of every stage, from manifests alone; no model is loaded.

    A model on the hub is downloaded, as its files decide; without `download` every stage of a
    model that is not in the cache is to do.
    """
    run = RunDir(Path(run_dir))
    reads = inputs(recipe, download=download)
    if reads is None:
        why = f"{recipe.model.path} has yet to be downloaded"
        return [StagePlan(stage, "todo", why, "", {}, run.stage(stage)) for stage in STAGES]
    steps: list[StagePlan] = []
    before = ""
    for stage in STAGES:
        before = wanted = fingerprint([stage, reads[stage], before])
        folder, state, why = run.stage(stage), *_state(run.stage(stage), wanted, reads[stage])
        if stage == "calibrate" and state != "cached":
            for other in reuse:
                candidate = RunDir(Path(other)).stage(stage)
                found, reason = _state(candidate, wanted, reads[stage])
                if found == "cached":
                    folder, state, why = candidate, "cached", f"reused from {other}"
                    break
                why += f"; not reused from {other}: {reason}"
        if stage == "export" and state == "cached" and (lack := _unverified(recipe, folder)):
            state, why = "stale", lack
        steps.append(StagePlan(stage, state, why, wanted, reads[stage], folder))
    return steps


def inputs(recipe: recipes.Recipe, *, download: bool = True) -> dict[str, dict] | None:
    """Per stage, all that its result depends on besides the stages before it, json-able.

    None when the model is on the hub and `download` is not wanted.
    """
    from masquant_cli.stages import VERSIONS, data_fingerprint, model_fingerprint

    if (model := model_fingerprint(recipe.model, download=download)) is None:
        return None
    whole = recipe.model_dump(mode="json")
    compensation, weights = whole["compensation"], whole["weights"]
    rounding = weights.pop("rounding")  # of the base weight, after its scales are chosen
    reads = {
        "calibrate": {
            "the model's files": model,
            "the data files": data_fingerprint(recipe.calibration),
            "model": {"dtype": recipe.model.dtype},
            "device": device_of(recipe),
            **{key: whole[key] for key in ("modalities", "calibration", "seed")},
        },
        "smooth": {
            "weights": weights,
            **{key: whole[key] for key in ("method", "activations", "smoothing")},
            "compensation": {key: compensation[key] for key in ("rank", "sites")},
        },
        "compensate": {"compensation": compensation, "weights": {"rounding": rounding}},
        # How it is verified changes nothing in it: `_unverified` asks whether that was done.
        "export": {"name": recipe.name, "model": {"path": recipe.model.path}},
    }
    return {stage: {"masquant's stage": VERSIONS[stage], **reads[stage]} for stage in STAGES}


def device_of(recipe: recipes.Recipe) -> str:
    """Where the job runs: devices round differently, and `dtype: auto` depends on it."""
    if recipe.device != "auto":
        return recipe.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _state(folder: Path, wanted: str, reads: dict) -> tuple[str, str]:
    manifest = read_manifest(folder)
    if manifest is None:
        return "todo", "never finished"
    if manifest.fingerprint != wanted:
        return "stale", _changed(_flat(manifest.reads), _flat(reads))
    if lost := damaged_output(folder, manifest):
        return "stale", f"its output {lost} is gone or was changed"
    return "cached", "finished"


def _unverified(recipe: recipes.Recipe, folder: Path) -> str | None:
    """What a finished export lacks that the recipe asks for, or None."""
    found = read_manifest(folder).summary.get("verified")
    if not recipe.export.verify:
        return None
    if found is None:
        return "it was written without being verified"
    worst, tolerance = max(found.values()), recipe.export.tolerance
    return f"its logits are verified to {worst:.1e} only" if worst > tolerance else None


def _changed(old: dict[str, object], new: dict[str, object]) -> str:
    """Which inputs differ: "weights.bits was 4, is 8"."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if not keys or not old:
        return "a stage before it changed" if old else "its inputs are not known"
    first = keys[0]
    values = f"{json.dumps(old.get(first))} -> {json.dumps(new.get(first))}"  # as YAML has them
    # Hashes, and lists that were longer on one side, say nothing to a person.
    brief = len(values) < 60 and "files" not in first and first in old and first in new
    more = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{first} changed{f': {values}' if brief else ''}{more}"


def _flat(content: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings and lists as one mapping of dotted keys, as `--set` writes them."""
    if isinstance(content, dict):
        pairs = list(content.items())
    elif isinstance(content, list):
        pairs = list(enumerate(content))
    else:
        return {prefix: content}
    flat: dict[str, object] = {}
    for key, value in pairs:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
