"""`masquant sweep`: many recipes, here or over a fleet."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from masquant_cli.cli.common import DryRun, Json, Quiet, Reuse, Set
from masquant_cli.errors import RecipeError

SUMS = ("seconds", "disk_bytes", "written_bytes")  # of a dry run's rows


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
    """Many recipes, here or over a fleet; finished runs are skipped.

    A run that fails does not stop the others; the same command tries it again.
    """
    from masquant_cli import sweep as sweeps
    from masquant_cli.cli import console, render

    options = dict(_option(text) for text in launcher_set or ())
    with render.stdout_reserved():
        chosen = sweeps.members(recipes, run_dir, set_ or ())
    if dry_run:
        here = launcher == "local"
        return _dry_run(chosen, run_dir, reuse or (), here, processes, json)
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


def _dry_run(chosen, run_root: Path, reuse, here: bool, processes: int, json: bool) -> None:
    """Every run's state and, where there is something to do, what it would take."""
    from masquant_cli import sweep as sweeps
    from masquant_cli.cli import render
    from masquant_cli.errors import EXIT_ENVIRONMENT
    from masquant_cli.plan.machine import disk_near

    rows, makers = [], {}  # calibration -> the first run that makes it, for all
    with render.stdout_reserved():
        for member, steps in zip(chosen, sweeps.steps(chosen, reuse, here=here), strict=True):
            rows.append(_planned(member, steps, makers, processes, here))
    problems = [f"{row['recipe']}: {text}" for row in rows for text in row["problems"]]
    sums = {key: sum(row[key] or 0 for row in rows) for key in SUMS}
    if not here:
        sums["seconds"] = None
    needed, (near, free) = sums["disk_bytes"], disk_near(run_root)
    if needed - sums["written_bytes"] > free:
        problems.append(
            f"the runs together write {needed / 1e9:.1f} GB, {near} has {free / 1e9:.1f} GB left"
        )
    render.output({"plan": rows, **sums, "problems": problems}, json, plan_table)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        raise typer.Exit(next((r["exit_code"] for r in rows if r["exit_code"]), EXIT_ENVIRONMENT))


def _planned(member, steps, makers: dict[str, str], processes: int, here: bool) -> dict[str, Any]:
    """One run's row. Notes in `makers` whose calibration is the one that others will share.

    Of a run that is not `here` only its bytes on disk are told: the machine is not known.
    """
    from masquant_cli import plan
    from masquant_cli.errors import EXIT_ARTIFACT, EXIT_ENVIRONMENT, MasquantError

    row = {"recipe": member.recipe.name, "file": member.file, "run_dir": member.run_dir,
           "seconds": None, "peak_bytes": None, "disk_bytes": None, "written_bytes": None,
           "problems": [], "exit_code": 0}  # fmt: skip
    if isinstance(steps, str):
        return {**row, "state": "damaged", "why": steps, "problems": [steps],
                "exit_code": EXIT_ARTIFACT}  # fmt: skip
    todo = [step.stage for step in steps if step.state != "cached"]
    if not todo:
        return {**row, "state": "cached", "why": ""}
    shared = ""
    if todo[0] == "calibrate":
        maker = makers.setdefault(member.calibration, member.recipe.name)
        if maker != member.recipe.name:
            todo, shared = todo[1:], f", calibrated by {maker}"
    row |= {"state": "todo", "why": f"from {todo[0]} on{shared}"}
    try:
        elsewhere = {} if here else {"on": "h200"}  # any will do: its numbers are not shown
        found = plan.predict(member.recipe, member.run_dir, todo, processes=processes, **elsewhere)
    except MasquantError as error:  # of this run alone: the others are planned all the same
        why = " ".join(str(error).split())
        return {**row, "state": "refused", "why": why, "problems": [why],
                "exit_code": error.exit_code}  # fmt: skip
    if not found:
        return row
    stages = found["stages"].values()
    row["disk_bytes"] = sum(stage["disk_bytes"] for stage in stages)
    row["written_bytes"] = found["written_bytes"]
    if not here:
        return row
    return {
        **row,
        "exit_code": EXIT_ENVIRONMENT if found["problems"] else 0,
        "seconds": found["seconds"],
        "peak_bytes": max(stage["peak_bytes"] for stage in stages),
        "problems": found["problems"],
    }


def _option(text: str) -> tuple[str, Any]:
    from masquant_cli.yaml_marks import parse_value

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"{text!r} is not of the form key=value", where=f"--launcher-set {text}",
            hint="write for example --launcher-set partition=gpu",
        )  # fmt: skip
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
        (
            run["recipe"],
            run["state"],
            render.clock_face(run["seconds"]) if run["seconds"] is not None else "",
            render.size(run["peak_bytes"]) if run["peak_bytes"] else "",
            render.size(run["disk_bytes"]) if run["disk_bytes"] else "",
            run["why"],
        )
        for run in document["plan"]
    ]
    heads = ("recipe", "state", "time", "memory", "disk", "why")
    render.draw_table(heads, rows, right=(2, 3, 4))
    seconds, disk = document["seconds"], document["disk_bytes"]
    time = "" if seconds is None else f"one after the other: {render.clock_face(seconds)}, "
    print(f"{time}{render.size(disk)} of disk")
