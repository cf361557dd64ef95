"""READ FIRST. The whole line: recipe -> calibrate -> smooth -> compensate -> export.

A stage is a function that reads the artifacts of the stages before it and writes its own. Its
fingerprint hashes everything its result depends on, so a finished stage whose fingerprint still
holds is never repeated, and one whose inputs changed is never trusted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from masquant_cli import recipe as recipes
from masquant_cli.errors import RecipeError
from masquant_cli.machine import measure
from masquant_cli.progress import NullProgress, Progress
from masquant_cli.rundir import (
    STAGES,
    Manifest,
    RunDir,
    fingerprint,
    missing_output,
    read_manifest,
    versions,
    write_manifest,
)

WHY_TODO = "never finished"


@dataclass(frozen=True)
class StagePlan:
    """What `run` would do with a stage: cached | stale | todo, and why."""

    stage: str
    state: str
    why: str
    fingerprint: str
    folder: Path


def run(
    recipe: recipes.Recipe,
    run_dir: Path,
    *,
    until: str = "export",
    reuse: Sequence[Path] = (),
    progress: Progress | None = None,
) -> dict:
    """Bring every stage up to `until` up to date. Returns a json-able summary.

    `reuse` names other run directories whose finished calibrate stage may be read instead of
    repeating it. Raises MasquantError; what finished before an error is kept.
    """
    from masquant_cli.stages.job import Job

    job = Job(recipe, progress or NullProgress())
    run = RunDir(Path(run_dir))
    done: dict[str, dict] = {}
    with run.lock():
        for step in plan(recipe, run_dir, reuse):
            if step.state != "cached":
                _run_stage(job, step, recipe.seed)
            manifest = read_manifest(step.folder)
            job.finished[step.stage] = (step.folder, manifest)
            done[step.stage] = {
                "state": step.state if step.state == "cached" else "done",
                "seconds": manifest.seconds,
                "peak_bytes": manifest.peak_bytes,
                "folder": str(step.folder),
                **manifest.summary,
            }
            if step.stage == until:
                break
    return {
        "recipe": recipe.name,
        "run_dir": str(run.path),
        "export_dir": str(run.stage("export") / "model") if "export" in done else None,
        "stages": done,
    }


def plan(recipe: recipes.Recipe, run_dir: Path, reuse: Sequence[Path] = ()) -> list[StagePlan]:
    """The state of every stage, from manifests alone; no model is loaded."""
    run = RunDir(Path(run_dir))
    prints = fingerprints(recipe)
    steps: list[StagePlan] = []
    for stage in STAGES:
        folder, state, why = run.stage(stage), *_state(run.stage(stage), prints[stage])
        if stage == "calibrate" and state != "cached":
            for other in reuse:
                if (
                    _state(candidate := RunDir(Path(other)).stage(stage), prints[stage])[0]
                    == "cached"
                ):
                    folder, state, why = candidate, "cached", f"reused from {other}"
                    break
        steps.append(StagePlan(stage, state, why, prints[stage], folder))
    return steps


def fingerprints(recipe: recipes.Recipe) -> dict[str, str]:
    """Per stage, a hash of its version, the recipe keys it reads and the stages before it."""
    from masquant_cli.stages import VERSIONS, inputs_fingerprint

    calibration = recipe.calibration.model_dump(mode="json")
    reads: dict[str, object] = {
        "calibrate": {
            "inputs": inputs_fingerprint(recipe),
            "dtype": recipe.model.dtype,
            "modalities": recipe.modalities,
            "calibration": calibration,
            "seed": recipe.seed,
        },
        "smooth": {
            "method": recipe.method,
            "weights": recipe.weights.model_dump(),
            "activations": recipe.activations.model_dump(),
            "smoothing": recipe.smoothing.model_dump(),
            "rank": (recipe.compensation.rank, recipe.compensation.sites),
        },
        "compensate": {"compensation": recipe.compensation.model_dump()},
        "export": {"name": recipe.name, "model": recipe.model.path},
    }
    found: dict[str, str] = {}
    before = ""
    for stage in STAGES:
        before = found[stage] = fingerprint([stage, VERSIONS[stage], reads[stage], before])
    return found


def _state(folder: Path, wanted: str) -> tuple[str, str]:
    manifest = read_manifest(folder)
    if manifest is None:
        return "todo", WHY_TODO
    if manifest.fingerprint != wanted:
        return "stale", "the recipe, the model, the data or masquant changed since it ran"
    if lost := missing_output(folder, manifest):
        return "stale", f"its output {lost} is gone"
    return "cached", "finished"


def _run_stage(job, step: StagePlan, seed: int) -> None:
    from masquant_cli.shards import file_sha256
    from masquant_cli.stages import stage_function

    stage: Callable[..., dict] = stage_function(step.stage)
    # From here on the stage is unfinished: its old manifest must not vouch for new files.
    (step.folder / "manifest.json").unlink(missing_ok=True)
    with measure() as cost:
        summary = stage(job, step.folder, step.fingerprint)
    outputs = sorted(p for p in step.folder.rglob("*") if p.is_file() and p.name[0] != ".")
    manifest = Manifest(
        stage=step.stage,
        fingerprint=step.fingerprint,
        outputs={p.relative_to(step.folder).as_posix(): file_sha256(p) for p in outputs},
        seed=seed,
        seconds=cost.seconds,
        peak_bytes=cost.peak_bytes,
        summary=summary,
        versions=versions(),
    )
    write_manifest(step.folder, manifest)


def exported(recipe: recipes.Recipe, run_dir: Path) -> Path:
    """The exported folder of a finished run. Raises RecipeError when there is none."""
    folder = RunDir(Path(run_dir)).stage("export") / "model"
    if read_manifest(folder.parent) is None:
        raise RecipeError(
            "this run has no finished export",
            where=str(run_dir),
            hint=f"first: masquant run --config {recipe.name} --run-dir {run_dir}",
        )
    return folder


def evaluate(
    recipe: recipes.Recipe,
    run_dir: Path,
    *,
    model: Path | None = None,
    against: Path | None = None,
    progress: Progress | None = None,
) -> dict:
    """The recipe's tasks on the run's export, or on any exported or float folder `model`.

    A quantized model is also compared (SQNR, KL, flips) with the float model: the recipe's, or
    the one in `against`.
    """
    from masquant_cli.stages.judge import evaluate_folder

    folder = Path(model) if model else exported(recipe, run_dir)
    return evaluate_folder(recipe, folder, against=against, progress=progress or NullProgress())


def bench(
    recipe: recipes.Recipe,
    run_dir: Path,
    *,
    model: Path | None = None,
    against: Path | None = None,
    progress: Progress | None = None,
) -> dict:
    """Prefill and decode times of the float model and of the run's export, in one process."""
    from masquant_cli.stages.judge import bench_folder

    folder = Path(model) if model else exported(recipe, run_dir)
    return bench_folder(recipe, folder, against=against, progress=progress or NullProgress())
