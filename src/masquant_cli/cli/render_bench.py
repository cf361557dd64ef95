"""Tables of `masquant bench kernels | layers | model | --tune`."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from masquant_cli.cli.render import draw_table, number, size


def timings(document: dict[str, Any]) -> None:
    """A table per shape and token count: time, speed-up over dense float, and the roofline."""
    _machine(document)
    roof = document["roofline"]
    peaks = ", ".join(f"{kind} {peak / 1e12:.3g} Top/s" for kind, peak in roof["peaks"].items())
    print(f"measured: {size(roof['bandwidth'])}/s, {peaks}")
    for (site, shape, tokens), rows in groupby(document["rows"], _place):
        title = shape if site == shape else f"{site} {shape}"
        columns = (f"{title}, T = {tokens}", "time", "speed-up", "floor", "of it", "error", "")
        print()
        draw_table(columns, [_timing(row) for row in rows], right=(1, 2, 3, 4, 5))
    print()
    missing = [name for name, found in document["peers"].items() if found == "not installed"]
    if missing:
        print("not installed, so not compared with:", ", ".join(missing))
    _said(document)


def _place(row: Mapping) -> tuple:
    return row["site"], row["shape"], row["tokens"]


def _timing(row: Mapping) -> tuple:
    check = row["check"]
    if "seconds" not in row:
        why = row.get("skipped") or f"not timed: {check.get('what', 'wrong')}"
        return row["name"], "", "", "", "", "", why
    notes = [row.get("backend", "")]
    if "low_rank_overhead" in row:
        notes.append(f"low rank {row['low_rank_overhead']:+.1%}")
    if "weight_ratio_float32" in row:
        notes.append(f"{row['weight_ratio_float32']:.3f}x the bytes of float32")
    speedup = row.get("speedup")
    slower = " SLOWER" if speedup is not None and speedup < 1 else ""
    return (
        row["name"],
        duration(row["seconds"]),
        f"{number(speedup, '.2f')}x{slower}" if speedup is not None else "",
        duration(row["floor_seconds"]),
        f"{row['roofline']:.0%}",
        f"{check['relative_error']:.0e}",
        ", ".join(filter(None, notes)),
    )


def models(document: dict[str, Any]) -> None:
    """The paper's Table 7: latency, speed-up, memory, saving; decode beside prefill."""
    _machine(document)
    settings = document["settings"]
    print(f"{settings['model']}, {settings['layers']} layers, {settings['sequence']} tokens")
    columns = (
        "batch", "vision", "method", "rank", "prefill", "speed-up", "memory", "saving",
        "decode step", "speed-up", "",
    )  # fmt: skip
    draw_table(columns, [_model(row) for row in document["rows"]], right=tuple(range(3, 10)))
    _said(document)


def _model(row: Mapping) -> tuple:
    ratio = row.get("rank_ratio")
    start = (str(row["batch"]), f"{row['vision']:.0%}", row["name"], number(ratio, "g"))
    if "prefill_seconds" not in row:
        return *start, "", "", "", "", "", "", f"not timed: {row['check'].get('what', 'wrong')}"
    return (
        *start,
        duration(row["prefill_seconds"]),
        f"{row['prefill_speedup']:.2f}x",
        size(row["memory_bytes"]),
        f"{row['memory_saving']:.2f}x",
        duration(row["decode_seconds"]),
        f"{row['decode_speedup']:.2f}x",
        "",
    )


def tiles(document: dict[str, Any]) -> None:
    """The fastest tile per op and shape, beside the one of the table in use."""
    _machine(document)
    rows = [
        (
            row["op"],
            row["shape"],
            str(row["tokens"]),
            duration(row["seconds"]),
            f"{number(row['speedup'], '.2f')}x",
            ", ".join(f"{key} {value}" for key, value in row["tile"].items()),
        )
        for row in document["rows"]
    ]
    columns = ("op", "shape", "T", "time", "over the table's", "tile")
    draw_table(columns, rows, right=(2, 3, 4))
    print("table:", document["table"])


def _machine(document: Mapping) -> None:
    machine = document["machine"]
    versions = machine["versions"]
    known = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    print(f"{machine['name']}{threads}; {known}")


def _said(document: Mapping) -> None:
    for line in document["verdict"]:
        print(line)
    for failure in document["failed"]:
        print("WRONG, not timed:", failure)


def duration(seconds: float) -> str:
    """0.81 us, 12.3 us, 4.56 ms, 1.23 s."""
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 1000:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"
