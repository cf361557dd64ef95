"""`masquant eval --backend lmms-eval`: lmms-eval's tasks on a checkpoint."""

from pathlib import Path
from typing import Any

from masquant_cli.cli.common import do
from masquant_cli.errors import RecipeError


def refuse(options: dict[str, Any]) -> None:
    """Options of masquant's own runner that say nothing to lmms-eval's."""
    for name, given in options.items():
        if given:
            raise RecipeError(
                "this option is not lmms-eval's",
                where=f"{name} --backend lmms-eval",
                hint="leave it out: this backend keeps no answers and compares with no model",
            )


def evaluate(
    recipe, run_dir: Path, model: Path | None, tasks, samples: int | None, json: bool, quiet: bool
) -> None:
    """Score `tasks` of lmms-eval on `model`, by default the run's export, and show them.

    What is found is also kept in RUN/eval/lmms-eval.json, what tasks write beside it.
    """

    def work(progress) -> dict[str, Any]:
        from masquant_cli import pipeline
        from masquant_cli.lmms import backend

        backend.require()  # before anything is read
        folder = model or pipeline.exported(recipe, run_dir)
        output = run_dir / "eval" / "lmms-eval"
        found = backend.evaluate(
            recipe, folder, tasks, samples=samples, output=output, progress=progress
        )
        pipeline.write_json(output.with_suffix(".json"), found)
        return found

    do(work, "lmms-eval", json, quiet)


def table(document: dict[str, Any]) -> None:
    """One row per metric of a task, in the task's own units."""
    from masquant_cli.cli import render

    rows = []
    for name, task in document["tasks"].items():
        for metric, value in task["metrics"].items():
            main = metric.partition(",")[0] == task["metric"]
            interval = " - ".join(f"{end:.4g}" for end in task["ci"] or ()) if main else ""
            rows.append((name, metric, render.number(value, ".4g"), interval, str(task["n"])))
    heads = ("task", "metric", "value", "95 % interval", "samples")
    render.draw_table(heads, rows, right=(2, 3, 4))
    print("model:", document["model"])
