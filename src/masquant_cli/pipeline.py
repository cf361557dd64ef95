"""READ FIRST. The whole line: recipe -> calibrate -> smooth -> compensate -> export.

A stage is a function that reads the artifacts of the stages before it and writes its own. Its
fingerprint (states.py) hashes everything its result depends on, so a finished stage whose
fingerprint still holds is never repeated, and one whose inputs changed is never trusted.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from masquant_cli import distributed
from masquant_cli import recipe as recipes
from masquant_cli.errors import ArtifactError, RecipeError
from masquant_cli.machine import measure
from masquant_cli.progress import NullProgress, Progress
from masquant_cli.rundir import (
    RECIPE,
    Manifest,
    RunDir,
    file_sha256,
    fingerprint,
    read_manifest,
    remember_calibration,
    reopen,
    versions,
    write_json,
    write_manifest,
)
from masquant_cli.states import StagePlan, device_of, plan

ALONE = ("export",)  # stages that rank 0 does by itself; the others wait


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

    world = distributed.world()
    job = Job(recipe, distributed.pulsing(progress or NullProgress(), world), world=world)
    run = RunDir(Path(run_dir))
    done: dict[str, dict] = {}
    with run.lock() if world.main else nullcontext():
        world.use(device_of(recipe))
        steps = world.from_main(lambda: _begin(job, run, reuse))
        world.check_shared(run.path)
        upstream = ""
        for step in steps:
            manifest = world.from_main(functools.partial(_still_cached, step, upstream))
            cached = manifest is not None
            if not cached:
                manifest = _run_stage(job, step, recipe.seed, upstream)
                _warn_of_memory(job, manifest)
            upstream = fingerprint(manifest.outputs)
            job.finished[step.stage] = (step.folder, manifest)
            if step.stage == "calibrate" and world.main:
                remember_calibration(run, step.folder)
            done[step.stage] = {
                "state": "cached" if cached else "done",
                "seconds": manifest.seconds,
                "peak_bytes": manifest.peak_bytes,
                "peak_gpu_bytes": manifest.peak_gpu_bytes,
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


def _begin(job, run: RunDir, reuse: Sequence[Path]) -> list[StagePlan]:
    write_json(run.path / RECIPE, job.recipe.model_dump(mode="json"))
    with job.world.busy():
        steps = plan(job.recipe, run.path, reuse)
    if reuse and steps[0].state != "cached":
        job.progress.warn(f"calibrating anew: {steps[0].why}")
    return steps


def _still_cached(step: StagePlan, upstream: str) -> Manifest | None:
    manifest = read_manifest(step.folder) if step.state == "cached" else None
    # A stage before it may have been done again and come out differently.
    return manifest if manifest is not None and manifest.upstream == upstream else None


def _run_stage(job, step: StagePlan, seed: int, upstream: str) -> Manifest:
    from masquant_cli.stages import stage_function

    stage: Callable[..., dict] = stage_function(step.stage)
    world, wanted = job.world, fingerprint([step.fingerprint, upstream])
    # From here on the stage is unfinished: its old manifest must not vouch for new files.
    world.from_main(lambda: reopen(step.folder))
    with measure() as cost:
        if step.stage in ALONE:
            summary = world.from_main(lambda: stage(job, step.folder, wanted))
        else:
            summary = stage(job, step.folder, wanted)
            world.barrier(step.folder)
    costs = world.all_gather(cost)
    sizes = world.from_main(lambda: _outputs(step.folder))
    owners = distributed.deal(list(sizes.values()), world.size)
    mine = {p: file_sha256(step.folder / p) for p, r in zip(sizes, owners, strict=True)
            if r == world.rank}  # fmt: skip
    outputs = {p: digest for part in world.all_gather(mine) for p, digest in part.items()}
    manifest = Manifest(
        stage=step.stage,
        fingerprint=step.fingerprint,
        outputs={p: outputs[p] for p in sizes},
        sizes=sizes,
        seed=seed,
        seconds=cost.seconds,
        peak_bytes=max(c.peak_bytes for c in costs),
        peak_gpu_bytes=max(c.peak_gpu_bytes for c in costs),
        processes=world.size,
        summary=summary,
        versions=versions(),
        reads=step.reads,
        upstream=upstream,
    )
    world.from_main(lambda: write_manifest(step.folder, manifest))
    return world.from_main(lambda: read_manifest(step.folder))  # as a resumed run will read it


def _outputs(folder: Path) -> dict[str, int]:
    """What a stage left behind, hidden files and folders aside, and its sizes in bytes."""
    paths = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    shown = [p for p in paths if not any(part[0] == "." for part in p.parts)]
    return {p.as_posix(): (folder / p).stat().st_size for p in shown}


def _warn_of_memory(job, manifest: Manifest) -> None:
    """A limit below what one layer, one batch and the libraries take cannot be kept."""
    limit, took = job.recipe.resources.max_bytes, manifest.peak_bytes * job.world.local_size
    if limit and took > limit and job.world.main:
        job.progress.warn(
            f"{manifest.stage} took {took / 1e9:.1f} GB of memory, resources.max_memory is "
            f"{job.recipe.resources.max_memory}: `--dry-run` says what a run needs"
        )


def recipe_of(run_dir: Path) -> recipes.Recipe:
    """The recipe that a run directory was last run with. Raises RecipeError, ArtifactError."""
    path = Path(run_dir) / RECIPE
    try:
        return recipes.Recipe.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RecipeError(
            "not a run directory: it has no recipe.json",
            where=str(run_dir),
            hint="name a directory that `masquant run` has written to",
        ) from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(
            f"this run's recipe cannot be read: {reason}",
            where=str(path),
            hint="run the recipe again in this directory",
        ) from error


def exported(recipe: recipes.Recipe, run_dir: Path) -> Path:
    """The exported folder of a finished run of this recipe.

    Raises RecipeError when there is none, ArtifactError when it belongs to another recipe.
    """
    steps = plan(recipe, run_dir)
    step = steps[-1]
    if step.state == "todo":
        raise RecipeError(
            "this run has no finished export",
            where=str(run_dir),
            hint=f"first: masquant run --config {recipe.name} --run-dir {run_dir}",
        )
    if step.state == "stale":
        first = next(s for s in steps if s.state == "stale")
        raise ArtifactError(
            f"this run's export is stale: {first.why}",
            where=str(run_dir),
            hint="run again, or name the folder to use it as it is: --model "
            f"{step.folder / 'model'}",
        )
    return step.folder / "model"


def evaluate(
    recipe: recipes.Recipe,
    run_dir: Path,
    *,
    model: Path | None = None,
    against: Path | None = None,
    fresh: bool = False,
    allow_overlap: bool = False,
    progress: Progress | None = None,
) -> dict:
    """The recipe's tasks on the run's export, or on any exported or float folder `model`.

    A quantized model is also compared (SQNR, KL, flips) with the float model: the recipe's, or
    the one in `against`. Answers are cached in RUN/eval, unless `fresh`; the result is also
    written to RUN/eval/result.json. Raises CheckError when the run calibrated on rows of a task
    and `allow_overlap` is not set.
    """
    from masquant_cli.stages.judge import evaluate_folder

    return evaluate_folder(
        recipe,
        Path(model) if model else exported(recipe, run_dir),
        against=against,
        progress=progress or NullProgress(),
        run=RunDir(Path(run_dir)),
        fresh=fresh,
        allow_overlap=allow_overlap,
    )


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
