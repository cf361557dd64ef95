"""Several recipes and finished runs on the same samples: one table. Start at `compare`.

Recipes are run, with one calibration for all that may share it; run directories are taken as they
are. Float model and inputs are loaded once, and only if a row is not already in its run's
eval/result.json.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from masquant_cli import pipeline
from masquant_cli.entries import Entry
from masquant_cli.errors import RecipeError
from masquant_cli.progress import NullProgress, Progress
from masquant_cli.recipe import Evaluation, Model, Recipe
from masquant_cli.rows import FLOAT_BITS, row
from masquant_cli.rundir import (
    STAGES,
    Manifest,
    RunDir,
    calibration_of,
    fingerprint,
    read_manifest,
    versions,
    write_json,
)


def compare(
    chosen: Sequence[Entry],
    *,
    evaluation: Evaluation | None = None,
    with_float: bool = False,
    run_root: Path = Path("runs"),
    allow_overlap: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Run what has to be run, evaluate every row. {"metrics", "modalities", "rows", "runs",
    "calibrations"}, json-able.

    `evaluation` (default: the first row's) is used for all, with the first row's seed. A row's
    seconds are its own stages'; a calibration, which rows share, is in "calibrations" once, by
    folder. `bytes` are the quantized linears', low rank included; a float weight counts 16 bits.
    Raises RecipeError for rows that cannot be compared, ArtifactError for a stale run, and
    CheckError where a run calibrated on rows of a task, unless `allow_overlap`.
    """
    progress = progress or NullProgress()
    judge = Judge(chosen[0].recipe, evaluation or chosen[0].recipe.evaluation, progress)
    judge.allow_overlap = allow_overlap
    judge.refuse_others(chosen)
    runs, calibrations = {}, {}
    ready = _ready(chosen, progress, runs)
    rows = [judge.row(entry, runs.get(entry.name), calibrations) for entry in ready]
    if with_float:
        rows.insert(0, judge.float_row(Path(run_root) / "float", beside=chosen[0].run_dir))
    return {
        "metrics": {n: task["metric"] for n, task in rows[0]["tasks"].items()},
        "modalities": list(judge.recipe.modalities),
        "rows": rows,
        "runs": runs,
        "calibrations": calibrations,
    }


def _ready(chosen: Sequence[Entry], progress: Progress, runs: dict) -> Iterable[Entry]:
    """Each entry when its export is there; `runs` gets what `pipeline.run` returns."""
    calibrated: dict[str, Path] = {}  # by fingerprint
    wanted = []
    for entry in chosen:
        if entry.finished:  # before minutes are spent on the others
            pipeline.exported(entry.recipe, entry.run_dir)
        step = pipeline.plan(entry.recipe, entry.run_dir)[0]
        wanted.append(step.fingerprint)
        if step.state == "cached":
            calibrated.setdefault(step.fingerprint, entry.run_dir)
    for entry, calibration in zip(chosen, wanted, strict=True):
        if not entry.finished:
            progress.note(f"compare: {entry.name}")
            shared = calibrated.setdefault(calibration, entry.run_dir)
            reuse = [] if shared == entry.run_dir else [shared]
            runs[entry.name] = pipeline.run(
                entry.recipe, entry.run_dir, reuse=reuse, progress=progress
            )
        yield entry


@dataclass
class Judge:
    """The float model and the prepared inputs that all rows share; made when first needed."""

    recipe: Recipe
    evaluation: Evaluation
    progress: Progress
    allow_overlap: bool = False

    def refuse_others(self, chosen: Sequence[Entry]) -> None:
        """RecipeError unless all rows quantize one model for one set of modalities."""
        if not self.evaluation.tasks:
            raise RecipeError(
                "there are no evaluation tasks to compare by", where="evaluation.tasks",
                hint="add tasks; `masquant recipes tiny-omni-w4a8` prints an example",
            )  # fmt: skip
        for entry in chosen:
            other = entry.recipe
            if set(other.modalities) != set(self.recipe.modalities):
                raise RecipeError(
                    f"it has the modalities {', '.join(other.modalities)}, {chosen[0].name} has "
                    f"{', '.join(self.recipe.modalities)}",
                    where=entry.name, hint="compare runs of the same modalities",
                )  # fmt: skip
            same = other.model == self.recipe.model or self._model(other) == self._model()
            if not same or other.device != self.recipe.device:
                raise RecipeError(
                    f"its model is {other.model.path}, that of {chosen[0].name} is "
                    f"{self.recipe.model.path}",
                    where=entry.name, hint="compare runs of one model on one device",
                )  # fmt: skip
            if other.evaluation != chosen[0].recipe.evaluation or other.seed != self.recipe.seed:
                self.progress.warn(
                    f"{entry.name} is evaluated as {chosen[0].name} is, not by its own recipe"
                )

    def row(self, entry: Entry, done: dict | None, calibrations: dict) -> dict:
        """A finished entry's row. `done` is what `pipeline.run` returned, if it ran; the seconds
        of the run's calibration go into `calibrations`."""
        recipe, run = entry.recipe, RunDir(entry.run_dir)
        folders = {stage: run.stage(stage) for stage in STAGES}
        folders["calibrate"] = calibration_of(run)
        if done:
            folders = {stage: Path(found["folder"]) for stage, found in done["stages"].items()}
        manifests = {stage: read_manifest(folder) for stage, folder in folders.items()}
        there = {stage: manifest for stage, manifest in manifests.items() if manifest}
        model, calibration = run.stage("export") / "model", folders["calibrate"]
        found = self._evaluated(entry.run_dir, model, there["export"], calibration)
        listed = {Path(folder).resolve() for folder in calibrations}
        if "calibrate" in there and calibration.resolve() not in listed:
            calibrations[str(calibration)] = there["calibrate"].seconds
        who = {
            "name": entry.name,
            "method": recipe.method,
            "bits": f"W{recipe.weights.bits}A{recipe.activations.bits}",
            "recipe": recipe.name,
            "run_dir": str(entry.run_dir),
        }
        return row(who, self._asked(found), there)

    def float_row(self, run_dir: Path, *, beside: Path) -> dict:
        """The float model's; its linears are those that the run `beside` quantized."""
        sizes = read_manifest(RunDir(beside).stage("export")).summary["bytes"]
        who = {
            "name": "float",
            "method": "float",
            "bits": "",
            "recipe": self.recipe.name,
            "run_dir": None,
        }
        size = {"bits_per_weight": FLOAT_BITS, "bytes": sizes["float"]}
        return row(who, self._asked(self._evaluated(run_dir)), {}) | size

    def _asked(self, found: dict) -> dict:
        """The evaluation with its tasks in the order of the recipe's."""
        scored = found["tasks"]
        return {**found, "tasks": {t.name: scored[t.name] for t in self.evaluation.tasks}}

    def _evaluated(
        self,
        run_dir: Path,
        folder: Path | None = None,
        manifest: Manifest | None = None,
        calibration: Path | None = None,
    ) -> dict:
        """What `pipeline.evaluate` says of an exported folder, or of the float model."""
        from masquant_cli.stages import leak, model_fingerprint

        path = Path(run_dir) / "eval" / "result.json"
        calibrated = leak.calibrated_on(calibration) if calibration else None
        if calibration and calibrated is None:
            self.progress.warn(
                f"{run_dir}: this run's calibration is gone: overlap with it is not checked"
            )
        # The model as the export stage left it; plan() has compared its files with their hashes.
        model = fingerprint(manifest.outputs) if manifest else self._model()
        seen = None if calibrated is None else sorted(calibrated)
        wanted = fingerprint([model, self._settings, seen])
        old = _read(path) or {}
        usable = old.get("compare_fingerprint") == wanted
        if usable and (not (flattered := _flattered(old)) or self.allow_overlap):
            for said in flattered:
                self.progress.warn(said)
            return old
        from masquant_cli.stages.judge import load_beside

        original, spec = self._original, self.recipe.model
        tested, float_model = original.model, None
        if folder is not None:
            spec = Model(path=str(folder))
            tested, float_model = load_beside(tested, folder, self.progress), tested
        known = model_fingerprint(spec)
        kept = path.parent / known[:12]
        found = self._score(tested, float_model, kept, calibrated)
        said = {"model": spec.path, "model_fingerprint": known, "recipe": self.recipe.name, **found}
        for file in (kept / "result.json", path):
            write_json(file, {**said, "compare_fingerprint": wanted})
        return found

    def _score(self, model, float_model, kept: Path, calibrated: set[str] | None) -> dict:
        from masquant_cli.stages.evaluate import evaluate

        return evaluate(
            model,
            self._original.processor,
            self.evaluation,
            modalities=self.recipe.modalities,
            seed=self.recipe.seed,
            float_model=float_model,
            prepared=self._prepared,
            progress=self.progress,
            cache=kept,
            calibrated=calibrated,
            allow_overlap=self.allow_overlap,
        )

    def _model(self, recipe: Recipe | None = None) -> list:
        from masquant_cli.stages import model_fingerprint

        spec = (recipe or self.recipe).model
        return [model_fingerprint(spec), spec.dtype]

    @cached_property
    def _settings(self) -> list:
        """All but the model that an evaluation's numbers depend on."""
        from masquant_cli.stages import data_fingerprint

        tasks = self.evaluation.tasks
        whole = self.recipe.calibration.model_copy(
            update={"sources": tuple(task.source for task in tasks)}
        )
        return [
            versions()["masquant"], self._model(), self.evaluation.model_dump(mode="json"),
            data_fingerprint(whole), self.recipe.modalities, self.recipe.seed, self.recipe.device,
        ]  # fmt: skip

    @cached_property
    def _original(self):
        from masquant_cli.models.loading import load_float

        self.progress.note(f"loading {self.recipe.model.path}")
        return load_float(self.recipe.model, self.recipe.device)

    @cached_property
    def _prepared(self) -> list:
        from masquant_cli.stages.prepare import prepare_all

        return prepare_all(
            self.evaluation,
            self._original.processor,
            modalities=self.recipe.modalities,
            seed=self.recipe.seed,
            progress=self.progress,
        )


def _flattered(kept: dict) -> list[str]:
    """Of which tasks of a kept result the rows were calibrated on, in sentences."""
    return [
        f"{task['overlap']} rows of task {name!r} were calibrated on: its score flatters the model"
        for name, task in kept["tasks"].items()
        if task.get("overlap")
    ]


def _read(path: Path) -> dict | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):  # none yet, or not ours: it is made again
        return None
    return found if isinstance(found, dict) else None
