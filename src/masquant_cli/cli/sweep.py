"""`masquant sweep`: many recipes, here or over a fleet."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from masquant_cli.cli.common import DryRun, Json, Quiet, Reuse, Set
from masquant_cli.errors import RecipeError


def sweep(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Recipe files or shipped recipes.")
    ],
    run_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Each recipe runs in DIR/<its name>.")
    ] = Path("runs"),
    launcher: Annotated[
        Literal["local", "submitit", "ray"],
        typer.Option(help="One after the other here, as Slurm jobs, or on a Ray cluster."),
    ] = "local",
    launcher_set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the launcher; repeatable."),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes for each run, under torchrun.")
    ] = 1,
    set_: Set = None, reuse: Reuse = None,
    json: Json = False, dry_run: DryRun = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Run many recipes: what is finished is skipped, what fails does not stop the rest."""
    from masquant_cli import sweep as sweeps
    from masquant_cli.cli import console, render

    options = dict(_option(text) for text in launcher_set or ())
    with render.stdout_reserved():
        chosen = sweeps.members(recipes, run_dir, set_ or ())
    if dry_run:
        return _dry_run(chosen, reuse or (), json)
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # Plain lines: the bar on this terminal is the run's.
    with render.stdout_reserved(), console.PlainProgress(sys.stderr, quiet=quiet) as progress:
        document = sweeps.sweep(
            chosen, launcher=launcher, options=options, overrides=set_ or (), reuse=reuse or (),
            processes=processes, quiet=quiet, progress=progress,
        )  # fmt: skip
    render.output(document, json, table)
    if document["exit_code"]:
        raise typer.Exit(document["exit_code"])


def _dry_run(chosen, reuse, json: bool) -> None:
    from masquant_cli import sweep as sweeps
    from masquant_cli.cli import render

    with render.stdout_reserved():
        states = sweeps.finished(chosen, reuse)
    said = {None: "todo", "": "cached"}
    rows = [
        {"recipe": m.recipe.name, "file": m.file, "run_dir": m.run_dir,
         "state": said.get(state, "stale"), "error": state or None}
        for m, state in zip(chosen, states, strict=True)
    ]  # fmt: skip
    render.output({"plan": rows}, json, plan_table)


def _option(text: str) -> tuple[str, Any]:
    from masquant_cli.yaml_marks import parse_value

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"{text!r} is not of the form key=value", where=f"--launcher-set {text}")
    return key.strip(), parse_value(value)


def table(document: dict[str, Any]) -> None:
    from masquant_cli.cli import render

    rows = [
        (
            run["recipe"],
            run["state"],
            render.clock_face(run["seconds"]) if run["state"] != "cached" else "",
            run["error"] or "",
        )
        for run in document["runs"]
    ]
    render.draw_table(("recipe", "state", "time", "error"), rows, right=(2,))
    failed = sum(run["state"] == "failed" for run in document["runs"])
    if failed:
        print(f"{failed} of {len(rows)} failed; the same command tries those again")


def plan_table(document: dict[str, Any]) -> None:
    from masquant_cli.cli import render

    rows = [
        (r["recipe"], r["state"], str(r["run_dir"]), r["error"] or "") for r in document["plan"]
    ]
    render.draw_table(("recipe", "state", "run directory", "error"), rows)
