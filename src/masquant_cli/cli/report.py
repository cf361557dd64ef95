"""`masquant report`: the runs it is about, and where the page goes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from masquant_cli.cli.common import Json, Quiet, do


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where it goes [default: report/ in the first RUN]."),
    ] = None,
    figures: Annotated[
        str, typer.Option(metavar="KIND", help="Files per figure: both, png, svg or none.")
    ] = "both",
    sites: Annotated[
        int, typer.Option(min=0, help="Sites whose SQNR is computed at every rank; 0: none.")
    ] = 6,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A run whose calibration RUN took over; repeatable."),
    ] = None,
    json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """One HTML page about runs: errors, ranges, ranks, comparison, provenance."""

    def work(progress) -> dict[str, Any]:
        from masquant_cli.report import report as write

        return write(
            runs, out or runs[0] / "report",
            formats=figures, sites=sites, reuse=reuse or (), progress=progress,
        )  # fmt: skip

    do(work, "report", json, quiet)
