"""`make evidence`: measure every cell that is not measured yet, then write docs/evidence.md.

    python tools/evidence/run.py [--quick] [--workers N] [--document] [--plan] [--only TEXT]

Stop it whenever you like: finished cells are files in benchmarks/results/evidence/ and are not
measured again until the code or the recipe changes.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from evidence import document, plan  # noqa: E402

KEPT = ("rtn", "smoothquant", "masquant", "masquant-joint")  # W4A8 runs that the report is of
RUNS = plan.ROOT / "runs" / "evidence"
REPORT = RUNS / "report"
LARGEST = 2_000_000  # bytes of an HTML page that is committed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one cell per method, one layer")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--document", action="store_true", help="only write the documents anew")
    parser.add_argument("--plan", action="store_true", help="only list what is to do")
    parser.add_argument("--only", default="", help="cells whose id holds this text")
    chosen = parser.parse_args(arguments)
    os.environ.update(THREADS)
    failed = 0
    if not chosen.document:
        wanted = [cell for cell in plan.cells(chosen.quick) if chosen.only in cell.id]
        missing = to_do(wanted)
        say(f"{len(wanted)} cells, {len(missing)} to measure")
        if chosen.plan:
            print("\n".join(cell.id for cell in missing))
            return 0
        failed = run(missing, chosen.workers)
        if not failed:
            report(publish=not chosen.quick)
    target = document.TARGET
    if chosen.quick:  # a few cells are no document
        target = RUNS / "evidence.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(document.TARGET.read_text(encoding="utf-8"), encoding="utf-8")
    document.write(plan.cells(), target=target)
    say(f"written: {target}")
    return 1 if failed else 0


def to_do(cells: list[plan.Cell]) -> list[plan.Cell]:
    from evidence.measure import finished

    return [cell for cell in cells if finished(cell) is None]


def kept(cell: plan.Cell) -> bool:
    """Whether the cell's run directory stays, for the report."""
    main = cell.table == "methods" and cell.where == "planted" and cell.bits == "W4A8"
    return main and cell.label in KEPT


def run(cells: list[plan.Cell], workers: int) -> int:
    """Measure `cells`; returns how many failed, whose files are absent."""
    if not cells:
        return 0
    from evidence.measure import cell_fingerprint

    groups: dict[str, list[plan.Cell]] = {}  # an ablation may be a row of the main table
    for cell in sorted(cells, key=lambda cell: cell.table != "methods"):
        groups.setdefault(cell_fingerprint(cell), []).append(cell)
    longest = sorted(groups.values(), key=lambda group: cells.index(group[0]))
    began, failed, count = time.monotonic(), 0, 0
    # Not a Pool, which would wait for ever for a worker that the system has killed.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start)
    try:
        models = sorted({cell.where for cell in cells if cell.kind == "model"})
        for model, seconds in pool.map(_calibrate, models):
            say(f"calibrated {model}: {seconds:.0f} s")
        for future in as_completed([pool.submit(_measure, group) for group in longest]):
            done, seconds, error = future.result()
            minutes, count = (time.monotonic() - began) / 60, count + len(done)
            said = error or f"{seconds:.1f} s of a core"
            say(f"[{count}/{len(cells)}, {minutes:.1f} min] {', '.join(done)}: {said}")
            failed += len(done) if error else 0
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def _start() -> None:
    from evidence.measure import quiet

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupted worker has nothing to say
    quiet()


def _calibrate(model: str) -> tuple[str, float]:
    from evidence.measure import calibrate

    return model, calibrate(model)


def _measure(group: list[plan.Cell]) -> tuple[list[str], float, str]:
    """Cells of one recipe. A failure does not stop the others; it ends in exit code 1."""
    from evidence.measure import measure

    names = [cell.id for cell in group]
    try:
        done = measure(group[0], also=group[1:], keep=kept(group[0]))
        return names, done["cpu_seconds"], ""
    except Exception:  # whatever it is
        return names, 0.0, traceback.format_exc()


def report(publish: bool) -> None:
    """The HTML report of the runs that were kept; `publish`: into docs/ if it is small enough."""
    from masquant_cli.report import report as write_report

    runs = [RUNS / cell.id for cell in plan.cells() if kept(cell)]
    runs = [run for run in runs if (run / "recipe.json").is_file()]
    if not runs:
        return
    write_report(runs, REPORT, reuse=[RUNS / "planted" / "calibration"])
    for page in sorted(REPORT.glob("*.html")):
        if publish and page.stat().st_size <= LARGEST:
            target = plan.ROOT / "docs" / "evidence-report.html"
            # Paths as from the repository: whose machine it was is nobody's business.
            target.write_bytes(page.read_bytes().replace(f"{plan.ROOT}/".encode(), b""))
            say(f"report: {target}")
        else:
            say(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB)")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        say("stopped; finished cells are kept, the same command goes on")
        sys.exit(130)
