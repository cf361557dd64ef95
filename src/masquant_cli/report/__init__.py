"""`masquant report`: one self-contained HTML page about runs, and its figures as files.

gather.py reads the artifacts, data.py shapes them, sections.py decides what can be drawn,
figures.py and comparisons.py draw, page.py writes. Needs the extra `report`.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from masquant_cli.errors import EnvironmentProblem, RecipeError
from masquant_cli.progress import NullProgress, Progress
from masquant_cli.rundir import replace_atomic

FORMATS = {"both": ("png", "svg"), "png": ("png",), "svg": ("svg",), "none": ()}
PACKAGES = ("matplotlib", "jinja2")


def report(
    runs: Sequence[Path],
    out: Path,
    *,
    formats: str = "both",
    sites: int = 6,
    reuse: Sequence[Path] = (),
    progress: Progress | None = None,
) -> dict:
    """Write `out`/report.html and `out`/figures/*; the same inputs give the same bytes.

    `sites` is how many sites rank curves are computed for, 0 for none; `reuse` names runs whose
    calibration others took over. Returns {"html", "figures": [{name, title, caption, files}],
    "missing": [{title, why}], "runs": rows of the comparison}. Raises EnvironmentProblem without
    the extra, RecipeError for what is no run directory or has no finished stage, ArtifactError
    for damaged files.
    """
    require()
    if formats not in FORMATS:
        raise RecipeError(
            f"no such figure format: {formats}", where="--figures",
            hint=f"one of {', '.join(FORMATS)}",
        )  # fmt: skip
    from masquant_cli.report import page, style
    from masquant_cli.report.gather import gather
    from masquant_cli.report.sections import Drawing, sections

    progress, out, wanted = progress or NullProgress(), Path(out), FORMATS[formats]
    found = gather([Path(run) for run in runs], reuse)
    if not any(run.stages or run.evaluation for run in found):
        raise RecipeError(
            "there is nothing to report: no stage finished here",
            where=str(found[0].path) if len(found) == 1 else "masquant report",
            hint=f"first: masquant run --config RECIPE --run-dir {found[0].path}",
        )
    with style.look():
        parts = sections(found, sites, progress)
        drawings = [part for part in parts if isinstance(part, Drawing)]
        progress.stage("draw", len(drawings), "figures")
        listed, inline = [], {}
        for drawing in drawings:
            wide = style.settled(drawing.draw(narrow=False))
            vector = style.svg(wide)
            narrow = style.svg(style.settled(drawing.draw(narrow=True)))
            inline[drawing.name] = page.embedded(drawing, vector, narrow)
            made = {"svg": vector.encode()} | ({"png": style.png(wide)} if "png" in wanted else {})
            files = [_write(out / "figures" / f"{drawing.name}.{e}", made[e]) for e in wanted]
            said = {"name": drawing.name, "title": drawing.title, "caption": drawing.caption}
            listed.append({**said, "files": files})
            progress.advance(1)
    _drop_old(out / "figures", {Path(f).name for figure in listed for f in figure["files"]})
    html = out / "report.html"
    _write(html, page.render(found, parts, inline).encode())
    return {
        "html": str(html),
        "figures": listed,
        "missing": [vars(part) for part in parts if not isinstance(part, Drawing)],
        "runs": page.rows(found),
    }


def require() -> None:
    """Raise EnvironmentProblem unless the packages that draw and write are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"reports need {' and '.join(missing)}",
            where="masquant report",
            hint="pip install 'masquant[report]'",
        )


def _write(path: Path, content: bytes) -> str:
    with replace_atomic(path) as temporary:
        temporary.write_bytes(content)
    return str(path)


def _drop_old(folder: Path, kept: set[str]) -> None:
    """Figures of an earlier report that this one does not have would pass for its own."""
    from masquant_cli.report.page import FIGURE_NAMES

    for path in folder.glob("*.*") if folder.is_dir() else ():
        ours = path.suffix in (".png", ".svg") and FIGURE_NAMES.fullmatch(path.stem)
        if ours and path.name not in kept:
            path.unlink()
