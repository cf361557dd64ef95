"""What the commands share: options, the recipe they name, and how work is shown."""

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from masquant_cli import distributed
from masquant_cli.errors import RecipeError

Config = Annotated[
    str,
    typer.Option("--config", "-c", metavar="RECIPE", help="A recipe file or a shipped recipe."),
]
RunDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the stages live [default: runs/<recipe name>]."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one recipe value; repeatable."),
]
Reuse = Annotated[
    list[Path] | None,
    typer.Option(metavar="DIR", help="Take a finished calibration from this run; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only say what would be done and what it takes.")
]
On = Annotated[
    str | None,
    typer.Option(metavar="MACHINE", help="With --dry-run: predict for h200, h200x8, h100, a100."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors on stderr.")]
ModelDir = Annotated[
    Path | None,
    typer.Option("--model", metavar="DIR", help="An exported or float folder, not the run's own."),
]
Against = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The float folder to compare with, not the recipe's model."),
]


def read_recipe(config: str, run_dir: Path | None, overrides: list[str] | None):
    from masquant_cli import recipe_yaml

    recipe = recipe_yaml.load(config, overrides or ())
    return recipe, run_dir or Path("runs") / recipe.name


def show_plan(
    recipe, run_dir: Path, reuse, until: str, json: bool, tasks=None, on: str | None = None
) -> None:
    """The state of every stage and, for those of `run`, what they would take: on stdout. Exits
    with 3 when they would not fit. Of several ranks the first plans; the others wait."""
    from masquant_cli.errors import EXIT_ENVIRONMENT

    world = distributed.world()

    def said() -> bool:
        with world.busy():
            return _plan(recipe, run_dir, reuse, until, json, tasks, on)

    if not world.from_main(said):
        raise typer.Exit(EXIT_ENVIRONMENT)


def _plan(recipe, run_dir: Path, reuse, until: str, json: bool, tasks, on: str | None) -> bool:
    """Print the plan; whether it fits."""
    from masquant_cli import pipeline, plan
    from masquant_cli.cli import render, render_plan

    world = distributed.world()
    world.use(recipe.device)
    with render.stdout_reserved():
        steps = pipeline.plan(recipe, run_dir, reuse, download=False)
        names = [step.stage for step in steps]
        steps = steps[: names.index(until) + 1] if until in names else steps
        todo = [step.stage for step in steps if on or step.state != "cached"]
        found = None
        if todo and tasks is None:
            found = plan.predict(
                recipe, run_dir, todo, on=on,
                processes=world.size, machines=max(1, world.size // world.local_size),
            )  # fmt: skip
    states = [{"stage": s.stage, "state": s.state, "why": s.why} for s in steps]
    document = {"recipe": recipe.name, "run_dir": run_dir, "plan": states, "prediction": found}
    document |= {"tasks": tasks} if tasks is not None else {}
    render.output(document, json, render_plan.plan)
    if found is None and todo and tasks is None:
        model = recipe.model.path
        print(f"note: there is no prediction, as nothing of {model} is here; its config.json would "
              f"do: masquant doctor --model {model}", file=sys.stderr)  # fmt: skip
    problems = found["problems"] if found else []
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return not problems


def do(work: Callable[[Any], dict[str, Any]], shape: str, json: bool, quiet: bool) -> dict:
    """Run `work` with progress on stderr; print what it returns, JSON or a table, and return it."""
    from masquant_cli.cli import console, render

    if quiet or not sys.stderr.isatty():  # libraries' bars too are for terminals only
        os.environ.setdefault("TQDM_DISABLE", "1")
    with render.stdout_reserved(), console.progress(quiet) as progress:
        document = work(progress)
    if distributed.world().main:
        render.output(document, json, render.TABLES[shape])
    return document


def narrowed(recipe, tasks, samples: int | None):
    """The recipe with only the named tasks, and no more than `samples` rows for each.

    A name that is not a task's but a benchmark's adds that task.
    """
    from masquant_cli import benchmarks
    from masquant_cli.recipe import Task

    known = {task.name: task for task in recipe.evaluation.tasks}
    for name in tasks:
        if name not in known and name not in benchmarks.BENCHMARKS:
            choices = sorted({*known, *benchmarks.BENCHMARKS})
            close = difflib.get_close_matches(name, choices, n=1)
            near = f"did you mean {close[0]!r}? " if close else ""
            has = f"the recipe has {', '.join(known) or 'no tasks'}"
            there = f"{near}{has}; benchmarks: {', '.join(sorted(benchmarks.BENCHMARKS))}"
            raise RecipeError(
                f"the recipe has no task {name!r}, and no benchmark is called so",
                where=f"--task {name}", hint=there,
            )  # fmt: skip
        known.setdefault(name, None)
    added = tuple(Task(benchmark=name) for name, task in known.items() if task is None)
    change: dict[str, Any] = {"tasks": (*recipe.evaluation.tasks, *added)}
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=change)})
    kept = [task for task in recipe.evaluation.tasks if not tasks or task.name in tasks]
    change: dict[str, Any] = {}
    if samples:
        kept = [t.model_copy(update={"samples": min(samples, t.samples or samples)}) for t in kept]
        change["fidelity_samples"] = min(samples, recipe.evaluation.fidelity_samples)
    evaluation = recipe.evaluation.model_copy(update={**change, "tasks": tuple(kept)})
    return recipe.model_copy(update={"evaluation": evaluation})
