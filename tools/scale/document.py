"""docs/scale.md's numbers, made of benchmarks/results/scale/*.json and of nothing else."""

import json
from pathlib import Path

from scale.machine import RESULTS, ROOT

TARGET = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- scale tables: make scale -->", "<!-- end of scale tables -->"


def write(results: Path = RESULTS, target: Path = TARGET) -> None:
    """Rewrite what stands between the markers; parts that were not measured are left out."""
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in results.glob("*.json")}
    parts = [make(found[name]) for name, make in TABLES.items() if name in found]
    text = target.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    between = "\n\n".join(parts) or "Nothing has been measured on this machine yet."
    target.write_text(f"{before}{BEGIN}\n\n{between}\n\n{END}{after}", encoding="utf-8")


def peers(found: dict) -> str:
    seconds, peaks = found["seconds"], found["peak_bytes"]
    rows = [
        [name, f"{seconds[name]:.1f}", f"{found['import_seconds'][name]:.1f}", gb(peaks[name])]
        for name in seconds
    ]
    shown = table(["", "seconds", "its imports, apart", "peak memory"], rows)
    calibrate = ", ".join(f"{k} {v:.1f} s" for k, v in found["calibrate_seconds"].items())
    return (
        f"## qwen2-100m, W8A8\n\n{about(found)}\n\n{shown}\n\nOf masquant's time, `calibrate` "
        f"{calibrate}.\n\n{ratios(found)}"
    )


def depth(found: dict) -> str:
    rows = [[name, gb(peak)] for name, peak in found["peak_bytes"].items()]
    return (
        f"## Depth\n\n{about(found)} {found['samples']} samples; VmHWM of each process.\n\n"
        f"{table(['', 'peak memory'], rows)}\n\n{ratios(found)}"
    )


def lowrank(found: dict) -> str:
    rows = []
    for shape, site in found["sites"].items():
        against = "speedup" in site
        rows.append(
            [
                shape,
                str(site["rank"]),
                f"{site['seconds']:.2f} s",
                literal(site) if against else "T has no inverse",
                f"**{site['speedup']:.1f}x**" if against else "",
                f"{site['error_over_optimum']:.5f}",
            ]
        )
    head = ["out x in", "rank", "masquant", "eq. 23-25 in fp64", "faster", "error / optimum"]
    return f"## The correction of one site\n\n{about(found)}\n\n{table(head, rows)}"


def literal(site: dict) -> str:
    part = site["literal_part"]
    note = "" if part == 1 else f", {part} cubed times that of sides of a {part}th"
    return f"{site['literal_seconds']:.1f} s{note}"


def vlm100m(found: dict) -> str:
    rows = []
    for rounding, one in found["runs"].items():
        plan = one["predicted"]
        expected = [f"{stage['seconds']:.1f}" for stage in plan["stages"].values()]
        measured = [f"{seconds:.1f}" for seconds in one["stages"].values()]
        rows.append([rounding, f"{one['seconds']:.1f}", *measured])
        rows.append([f"{rounding}, as `--dry-run` said", f"{plan['seconds']:.1f}", *expected])
    first = next(iter(found["runs"].values()))
    tokens = ", ".join(f"{n} {m}" for m, n in first["tokens"].items())
    head = ["rounding", "seconds", *first["stages"]]
    return (
        "## A vision-language model of that size, W4A8 with compensation at ratio 0.05\n\n"
        f"{about(found)} Tokens: {tokens}.\n\n{table(head, rows)}"
    )


def ranks(found: dict) -> str:
    rows = [
        [size, f"{seconds:.1f}", *(f"{s:.1f}" for s in found["stage_seconds"][size].values())]
        for size, seconds in found["seconds"].items()
    ]
    head = ["processes of one thread", "calibrate + solve", *found["stage_seconds"]["1"]]
    return (
        f"## Two processes\n\n{about(found)}\n\n{table(head, rows)}\n\n"
        f"**{found['speedup']:.2f}x** (asked: {found['at_least']}x); statistics differ by "
        f"{found['largest_relative_difference']:.1e} at most."
    )


def vl3b(found: dict) -> str:
    seconds, plan = dict(found["stage_seconds"]), found["predicted"]["stages"]
    starting = found["resumed_seconds"] - sum(seconds.values())
    seconds["calibrate"] += found["interrupted"]["wall_seconds"] - starting
    rows = [
        [
            stage,
            f"{taken:.0f}",
            f"{plan[stage]['seconds']:.0f}",
            gb(found["stage_peaks"][stage]),
            gb(plan[stage]["peak_bytes"]),
        ]
        for stage, taken in seconds.items()
    ]
    head = ["stage", "seconds", "predicted", "peak memory", "predicted"]
    tokens = ", ".join(f"{n} {m}" for m, n in found["tokens"].items())
    return (
        "## Qwen2.5-VL-3B's shape, W4A8 with compensation at ratio 0.05, `max_memory: 6GB`\n\n"
        f"{about(found)} {gb(found['checkpoint_bytes'])} on disk in 3 shards; tokens: {tokens}. "
        f"Interrupted after {found['interrupted']['wall_seconds']:.0f} s and resumed, "
        f"{found['resumed_seconds']:.0f} s; calibrate's seconds are those of both parts, its peak "
        f"that of the second.\n\n{table(head, rows)}\n\n"
        f"All processes together held {gb(found['tree_peak_bytes'])} at most; "
        f"{gb(found['exported_bytes'])} were exported."
    )


def predict(found: dict) -> str:
    rows = []
    for name, one in found["predictions"].items():
        if "refused" in one:
            rows.append([name, one["refused"], "", ""])
            continue
        stages = one["stages"].values()
        rows.append(
            [
                name,
                f"{one['seconds'] / 60:.1f} minutes",
                gb(max(s["peak_bytes"] for s in stages)),
                gb(max(s["peak_gpu_bytes"] or 0 for s in stages)),
            ]
        )
    return (
        "## Predictions for an H200 and for eight\n\nNot measured: what `masquant run -c "
        "qwen-vl-w4a8 --dry-run --on h200x8` says for the real shapes of Qwen2.5-VL.\n\n"
        f"{table(['', 'time', 'RAM', 'VRAM'], rows)}"
    )


TABLES = {
    "peers": peers,
    "depth": depth,
    "lowrank": lowrank,
    "vlm100m": vlm100m,
    "ranks": ranks,
    "vl3b": vl3b,
    "predict": predict,
}


def about(found: dict) -> str:
    facts = found["about"]
    machine, tools = facts["machine"], []
    for name, versions in facts["versions"].items():
        own = versions.get("llmcompressor", "")
        tools.append(f"{name} {own}".strip() + f" on torch {versions['torch']}")
    return (
        f"{machine['cpu']}, {machine['cpus']} cores, {machine['memory_gb']:.0f} GB; "
        f"{'; '.join(tools)}; {facts['date'][:10]}, `{facts['command'].partition(' --')[0]}`."
    )


def ratios(found: dict) -> str:
    rows = [
        [name, f"**{one['is']:.2f}**", f"{one['at_most']:g}"]
        for name, one in found["ratios"].items()
    ]
    return table(["ratio", "is", "asked: at most"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
