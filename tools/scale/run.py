"""`make scale`: how long masquant takes and how much memory, as ratios.

    python tools/scale/run.py PART... [--work DIR] [--other PYTHON] [--rounds N] [--again]

PART: peers, depth, lowrank, ranks, vlm100m, predict, vl3b, or all. Each writes one JSON file,
benchmarks/results/scale/PART.json; `all` leaves out what this code has measured already.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from scale.machine import RESULTS, ROOT, about, code_fingerprint

sys.path[:0] = [str(ROOT / "src"), str(ROOT / "kernels")]
PARTS = ("lowrank", "peers", "depth", "vlm100m", "ranks", "predict", "vl3b")
COMPARED = ("peers", "depth")  # parts that need the other tool


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=(*PARTS, "all"), metavar="PART")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "scale", help="models, runs")
    parser.add_argument(
        "--other",
        default=os.environ.get("LLMCOMPRESSOR_PYTHON"),
        help="the Python of an environment with llm-compressor 0.14; default: "
        "$LLMCOMPRESSOR_PYTHON",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of peers")
    parser.add_argument("--again", action="store_true", help="also what is measured already")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    chosen = parser.parse_args(arguments)
    chosen.work.mkdir(parents=True, exist_ok=True)
    wanted = PARTS if "all" in chosen.parts else tuple(dict.fromkeys(chosen.parts))
    failed = []
    for part in wanted:
        target = chosen.out / f"{part}.json"
        if "all" in chosen.parts and not chosen.again and measured(target):
            say(f"{part}: measured already, {target}")
            continue
        if part in COMPARED and not chosen.other:
            say(f"{part}: left out, it needs llm-compressor: --other /path/to/its/python")
            failed.append(part)
            continue
        try:
            write(target, part, chosen)
        except Exception as error:  # the other parts are independent of it
            say(f"{part} FAILED: {type(error).__name__}: {error}")
            failed.append(part)
    if chosen.out == RESULTS:
        from scale.document import write as write_document

        write_document()
    return 1 if failed else 0


def measured(target: Path) -> bool:
    try:
        return json.loads(target.read_bytes())["about"]["code"] == code_fingerprint()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(target: Path, part: str, chosen: argparse.Namespace) -> None:
    say(f"== {part}")
    pythons = {"masquant": sys.executable}
    if part in COMPARED:
        pythons["llm-compressor"] = chosen.other
    facts, began = about(pythons), time.monotonic()
    found = measure(part, chosen, lambda text: say(f"   {text}"))
    facts["minutes"] = round((time.monotonic() - began) / 60, 2)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"part": part, "about": facts, **found}, indent=1) + "\n")
    print("\n".join(verdicts(found)))
    say(f"   {target}, {facts['minutes']:.1f} minutes")


def measure(part: str, chosen: argparse.Namespace, tell: Callable[[str], None]) -> dict:
    if part == "lowrank":
        from scale.lowrank import lowrank

        return lowrank(tell)
    if part == "peers":
        from scale.peers import peers

        return peers(chosen.work, chosen.other, chosen.rounds, tell)
    if part == "depth":
        from scale.depth import depth

        return depth(chosen.work, chosen.other, tell)
    if part == "ranks":
        from scale.ranks import ranks

        return ranks(chosen.work, tell)
    from scale import big

    return getattr(big, part)(chosen.work, tell)


def verdicts(found: dict) -> list[str]:
    """What was asked and what is, one line each."""
    lines = []
    for name, ratio in found.get("ratios", {}).items():
        held = "ok  " if ratio["is"] <= ratio["at_most"] else "MISS"
        lines.append(f"{held} {name}: {ratio['is']:.3f} (at most {ratio['at_most']})")
    for shape, site in found.get("sites", {}).items():
        good = site["error_over_optimum"] <= found["error_at_most"]
        said = f"error {site['error_over_optimum']:.6f} of the optimum"
        if "speedup" in site:
            good = good and site["speedup"] >= site["at_least"]
            said = f"{site['speedup']:.1f}x (at least {site['at_least']}), {said}"
        lines.append(f"{'ok  ' if good else 'MISS'} {shape}: {said}")
    if "speedup" in found:
        same = found["largest_relative_difference"] <= found["difference_at_most"]
        held = "ok  " if found["speedup"] >= found["at_least"] and same else "MISS"
        lines.append(
            f"{held} two processes: {found['speedup']:.2f}x (at least {found['at_least']}), "
            f"apart by {found['largest_relative_difference']:.1e}"
        )
    if "within" in found:
        held = "ok  " if found["within"] else "MISS"
        lines.append(f"{held} peak {found['tree_peak_bytes'] / 1e9:.2f} GB of 6 GB")
    return lines


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that jobs are ended with it
    sys.exit(main(sys.argv[1:]))
