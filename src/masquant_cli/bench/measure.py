"""One comparison: candidates that do the same work are checked, timed interleaved, and judged.

The baseline is the fastest of the candidates marked so (dense float in every dtype of the
device). Speed-ups are baseline time over candidate time: below 1 is SLOWER, and is said so.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from masquant_cli.bench.gate import Check
from masquant_cli.bench.roofline import Roof
from masquant_cli.bench.timing import Clock, Run

HOPELESS = 4.0  # a dense dtype this much slower than another is named and not timed further


@dataclass(frozen=True)
class Candidate:
    """One implementation. `labels` go into its row as they are."""

    name: str
    run: Run
    check: Callable[[], Check]
    flops: float
    moved: float  # bytes that must be read and written
    kind: str  # operand type of its products, for the roofline
    baseline: bool = False
    part: bool = False  # only part of what the baseline does: no speed-up is stated
    labels: Mapping = field(default_factory=dict)


def compare(candidates: Iterable[Candidate], clock: Clock, roof: Roof) -> list[dict]:
    """A row per candidate, in order: its check, and its time if the check was passed."""
    rows: dict[str, dict] = {}
    fit: dict[str, Candidate] = {}
    for candidate in candidates:
        try:
            check = candidate.check()
        except Exception as error:  # a peer that cannot do this shape, a kernel that will not build
            check = Check(False, float("inf"), float("inf"), f"{type(error).__name__}: {error}")
        rows[candidate.name] = {
            "name": candidate.name, **candidate.labels, "check": check.as_dict()
        }  # fmt: skip
        if check.ok:
            fit[candidate.name] = candidate
    for name, seconds in _hopeless(fit, clock).items():
        rows[name]["skipped"] = f"one call took {seconds:.2g} s, {HOPELESS:g}x another dtype's"
        del fit[name]
    times = clock.times({name: c.run for name, c in fit.items()})
    dense = {name: times[name].seconds for name, c in fit.items() if c.baseline}
    best = min(dense, key=dense.get) if dense else None
    for name, timed in times.items():
        c = fit[name]
        floor = roof.floor(c.flops, c.moved, c.kind)
        rows[name] |= {
            "seconds": timed.seconds,
            "spread": timed.spread,
            "timed_by": timed.how,
            "floor_seconds": floor,
            "roofline": floor / timed.seconds,
        }
        if best and not c.part:
            rows[name] |= {"against": best, "speedup": dense[best] / timed.seconds}
    return list(rows.values())


def _hopeless(fit: Mapping[str, Candidate], clock: Clock) -> dict[str, float]:
    probes = {name: clock.probe(c.run) for name, c in fit.items() if c.baseline}
    return {n: s for n, s in probes.items() if s > HOPELESS * min(probes.values())}


def failures(rows: Iterable[Mapping]) -> list[str]:
    return [
        f"{row['name']}{_at(row)}: {row['check'].get('what', 'failed')}"
        for row in rows
        if not row["check"]["ok"] and not row.get("peer")
    ]


def _at(row: Mapping) -> str:
    return f" {row['shape']} T={row['tokens']}" if "shape" in row else ""


def verdicts(rows: Iterable[Mapping]) -> list[str]:
    """Per implementation and shape, at which token counts it beats dense float, in words."""
    found: dict[tuple, dict[int, float]] = {}
    for row in rows:
        if "speedup" in row and not row["name"].startswith("dense"):
            found.setdefault((row["shape"], row["name"]), {})[row["tokens"]] = row["speedup"]
    return [f"{shape} {name}: {_break_even(found[shape, name])}" for shape, name in found]


def _break_even(speedups: Mapping[int, float]) -> str:
    counts = sorted(speedups)
    faster = [t for t in counts if speedups[t] >= 1]
    slower = [t for t in counts if speedups[t] < 1]
    said = []
    if faster:
        values = ", ".join(f"{speedups[t]:.2f}x" for t in faster)
        said.append(f"faster than dense float at T = {', '.join(map(str, faster))} ({values})")
    if slower:
        values = ", ".join(f"{1 / speedups[t]:.2f}x the time" for t in slower)
        said.append(f"SLOWER at T = {', '.join(map(str, slower))} ({values})")
    for a, b in pairwise(counts):
        if (speedups[a] >= 1) != (speedups[b] >= 1):
            said.append(f"breaks even between T = {a} and {b}")
    return "; ".join(said)
