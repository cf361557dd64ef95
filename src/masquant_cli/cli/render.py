"""What a command returns, on stdout: one JSON document, or a table for people."""

import contextlib
import json as json_module
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from masquant_cli import metrics
from masquant_cli.cli.console import clock_face


@contextlib.contextmanager
def stdout_reserved() -> Iterator[None]:
    """Whatever a library prints while working goes to stderr, so that stdout stays data."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def output(document: dict[str, Any], json: bool, table: Callable[[dict[str, Any]], None]) -> None:
    try:
        if json:
            unicode = (sys.stdout.encoding or "").lower().startswith("utf")
            print(json_module.dumps(plain(document), indent=2, ensure_ascii=not unicode))
        else:
            table(document)
        sys.stdout.flush()
    except BrokenPipeError:
        raise SystemExit(reader_gone()) from None


def reader_gone() -> int:
    """The reader of a pipe left (`masquant recipes | head -1`): end as quietly as cat does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains once more at exit
    return 128 + 13


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: paths as strings, no NaN or infinity (null instead)."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if hasattr(value, "__fspath__"):
        return str(value)
    number = float(value)  # also numpy's and torch's scalars
    return number if math.isfinite(number) else None


def recipe_list(document: dict[str, Any]) -> None:
    rows = [
        (name, r["model"], f"W{r['weights']}A{r['activations']}", ", ".join(r["modalities"]))
        for name, r in document["recipes"].items()
    ]
    draw_table(("recipe", "model", "bits", "modalities"), rows)


def stages(document: dict[str, Any]) -> None:
    rows = [
        (
            name,
            stage.get("state", ""),
            clock_face(stage["seconds"]) if stage.get("seconds") is not None else "",
            size(stage["peak_bytes"]) if stage.get("peak_bytes") else "",
        )
        for name, stage in document["stages"].items()
    ]
    draw_table(("stage", "state", "time", "peak memory"), rows, right=(2, 3))
    if experts := document["stages"].get("calibrate", {}).get("experts"):
        reached = [
            (name, f"{n['min']:,}", f"{n['median']:,.1f}".removesuffix(".0"), f"{n['without']:,}")
            for name, n in experts.items()
        ]
        print()
        heads = ("calibration tokens of an expert", "fewest", "median", "experts without any")
        draw_table(heads, reached, right=(1, 2, 3))
    if document.get("export_dir"):
        print("checkpoint:", document["export_dir"])


def evaluation(document: dict[str, Any]) -> None:
    tasks = [
        (name, t["metric"], score(t["metric"], t["value"]), interval(t), str(t["n"]))
        for name, t in document.get("tasks", {}).items()
    ]
    if tasks:
        draw_table(("task", "metric", "value", "95 % interval", "samples"), tasks, right=(2, 3, 4))
    sqnr = document.get("sqnr_db") or {}
    rows = [
        (
            modality,
            number(sqnr[modality], ".1f"),
            number((document.get("kl") or {}).get(modality), ".4f"),
            number((document.get("flip_rate") or {}).get(modality), ".2%"),
        )
        for modality in sqnr
    ]
    if rows:
        draw_table(("modality", "SQNR dB", "KL nats", "flips"), rows, right=(1, 2, 3))
    if document.get("model"):
        print("model:", document["model"])


def benchmark(document: dict[str, Any]) -> None:
    """Every measurement is a row, with float beside quantized; the conditions follow."""
    rows = []
    for name in ("prefill", "decode"):
        if name in document:
            timed = document[name]
            speed = [
                f"{number(timed[which]['tokens_per_second'], ',.0f')} tokens/s"
                for which in ("float", "quantized")
            ]
            rows.append((name, *speed, f"{number(timed['speedup'], '.2f')}x as fast"))
    if "weight_bytes" in document:
        took = document["weight_bytes"]
        sizes = [size(took[which]) for which in ("float", "quantized")]
        ratios = [number(took[key], ".3f") for key in ("ratio", "ratio_bf16")]
        said = f"{ratios[0]}x the bytes of {took['float_dtype']}, {ratios[1]}x of bf16"
        rows.append(("quantized linears", *sizes, said))
    draw_table(("", "float", "quantized", ""), rows, right=(1, 2, 3))
    for key, value in document.items():
        if not isinstance(value, Mapping | list):
            print(f"{key.replace('_', ' ')}: {_cell(value)}")
    for line in document.get("verdict", ()):
        print(line)


def comparison(document: dict[str, Any]) -> None:
    """Scores with their intervals, then, row by row again, distance from float and costs."""
    rows, metric = document["rows"], document.get("metrics", {})
    tasks = list(dict.fromkeys(t for row in rows for t in row.get("tasks", {})))
    modalities = list(dict.fromkeys(m for row in rows for m in row.get("sqnr_db") or {}))
    heads = [metrics.head(t, metric[t]) if t in metric else t for t in tasks]
    named = {(row["method"], row.get("bits", "")) for row in rows}
    who = [
        (row["method"], row.get("bits", "")) if len(named) == len(rows) else (row["name"],)
        for row in rows
    ]
    columns = ("method", "bits") if len(named) == len(rows) else ("run",)
    scores = [[_scored(row.get("tasks", {}).get(t)) for t in tasks] for row in rows]
    draw_table((*columns, *heads), [(*w, *s) for w, s in zip(who, scores, strict=True)])
    print()
    cells = [
        (
            *w,
            *(number((row.get("sqnr_db") or {}).get(m), ".1f") for m in modalities),
            " / ".join(number((row.get("kl") or {}).get(m), ".3f") for m in modalities).strip(" /"),
            " / ".join(
                number((row.get("flip_rate") or {}).get(m), ".1%") for m in modalities
            ).strip(" /"),
            number(row.get("bits_per_weight"), ".2f"),
            size(row["bytes"]) if row.get("bytes") else "",
            clock_face(row["seconds"]) if row.get("seconds") is not None else "",
            size(row["peak_bytes"]) if row.get("peak_bytes") else "",
        )
        for w, row in zip(who, rows, strict=True)
    ]
    columns = (
        *columns, *(f"{m} dB" for m in modalities), "KL nats", "flips", "bits/weight", "linears",
        "time", "peak memory",
    )  # fmt: skip
    draw_table(columns, cells, right=tuple(range(len(who[0]), len(columns))))
    for folder, seconds in (document.get("calibrations") or {}).items():
        print(f"calibrated once: {clock_face(seconds)} ({folder})")
    for key, title in (("export_dir", "checkpoint"), ("load", "load it with")):
        if document.get(key):
            print(f"{title}: {document[key]}")


def _scored(task: Mapping[str, Any] | None) -> str:
    """A task's value and 95 % interval in one cell."""
    if not task:
        return ""
    low_high = interval(task).replace("%", "").replace(" - ", "-")
    return f"{score(task['metric'], task['value'])} ({low_high})"


def report(document: dict[str, Any]) -> None:
    for part in document["missing"]:
        print(f"not shown: {part['title']}. {part['why']}")
    print("page:", document["html"])


def doctor(document: dict[str, Any]) -> None:
    draw_table(("", ""), list(document["facts"].items()), heads=False)
    for warning in document["warnings"]:
        print("warning:", warning)
    for problem in document["problems"]:
        print("problem:", problem)
    print("not ready" if document["problems"] else "ready")


def _later(name: str) -> Callable[[dict[str, Any]], None]:
    """A table of render_bench.py, which imports this module."""

    def table(document: dict[str, Any]) -> None:
        from masquant_cli.cli import render_bench

        getattr(render_bench, name)(document)

    return table


def _lmms(document: dict[str, Any]) -> None:
    from masquant_cli.cli import lmms  # it imports what imports this module

    lmms.table(document)


TABLES: dict[str, Callable[[dict[str, Any]], None]] = {
    "stages": stages,
    "evaluation": evaluation,
    "benchmark": benchmark,
    "lmms-eval": _lmms,
    "comparison": comparison,
    "report": report,
    "bench kernels": _later("timings"),
    "bench layers": _later("timings"),
    "bench model": _later("models"),
    "bench tune": _later("tiles"),
}


def score(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}%" if metrics.of(metric).unit == "%" else f"{value:.3f}"


def interval(task: Mapping[str, Any]) -> str:
    return " - ".join(score(task["metric"], bound) for bound in task.get("ci") or ())


def number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def draw_table(columns, rows, right: tuple[int, ...] = (), heads: bool = True) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD if heads else None, show_header=heads, pad_edge=False, show_edge=False
    )
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(file=sys.stdout, markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no width to fold at
    with console.capture() as drawn:  # Rich on its own would turn a closed pipe into exit 1
        console.print(table)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))
