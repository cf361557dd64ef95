"""`masquant compare`: recipes and runs side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer

from masquant_cli.cli.common import Json, Quiet, Set, do, narrowed


def compare(
    rows: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|RUN...",
            help="A recipe, RECIPE@key=value,key=value, or a finished run directory.",
        ),
    ],
    run_root: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the recipes' runs live.")
    ] = Path("runs"),
    methods: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Run every recipe with each of these methods."),
    ] = None,
    set_: Set = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this task, or a benchmark; repeatable."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="At most this many per task.")] = None,
    float_: Annotated[bool, typer.Option("--float", help="A row for the float model.")] = False,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Score rows that were calibrated on, too.")
    ] = False,
    json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Several recipes or runs on the same samples: scores, damage and cost."""

    def work(progress) -> dict[str, Any]:
        from masquant_cli.compare import compare
        from masquant_cli.entries import entries

        names = [name.strip() for name in (methods or "").split(",") if name.strip()]
        chosen = entries(rows, run_root=run_root, methods=names, overrides=set_ or ())
        return compare(
            chosen,
            evaluation=narrowed(chosen[0].recipe, task or (), samples).evaluation,
            with_float=float_,
            run_root=run_root,
            allow_overlap=allow_overlap,
            progress=progress,
        )

    do(work, "comparison", json, quiet)
