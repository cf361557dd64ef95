"""The README's kernel tables, made of benchmarks/results/*.json and of nothing else.

python tools/readme_table.py            rewrite README.md between the markers
python tools/readme_table.py --check    exit code 1 when it is not what the files say
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN = "<!-- kernel table: make readme-table -->"
END = "<!-- end of kernel table -->"
NONE = (
    "No GPU number exists yet: nothing here has run on a GPU. `make gpu-check` measures one in "
    "under ten\nminutes and writes `benchmarks/results/<gpu>-<date>.json`, which this table is "
    "made of."
)
FORMS = ("W4A8", "W8A8", "W4A8 rank 0.05, vision 100%")


def results(folder: Path) -> list[dict]:
    """Result files by name: of `make gpu-check`, and of `masquant bench layers` on a CPU."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [d for d in found if d["machine"]["device"] == "cuda" or d.get("bench") == "layers"]


def markdown(documents: list[dict]) -> str:
    gpus = [d for d in documents if d["machine"]["device"] == "cuda"]
    cpus = [d for d in documents if d["machine"]["device"] == "cpu"]
    return "\n\n".join([*map(_machine, cpus), *(map(_machine, gpus) if gpus else [NONE])])


def _machine(document: dict) -> str:
    machine, versions = document["machine"], document["machine"]["versions"]
    sections = document.get("sections") or {"layers": {"status": "ok", "rows": document["rows"]}}
    where = f"triton {versions['triton']}"
    if machine["device"] == "cpu":
        where = ", ".join(filter(None, (f"{machine['threads']} threads", machine.get("kernels"))))
    wrong = [name for name, s in sections.items() if s["status"] in ("failed", "crashed", "hung")]
    lines = [
        f"**{machine['name']}**, {machine['date'][:10]}, torch {versions['torch']}, {where}: speed "
        "against dense float in its fastest dtype, quantization of the activations included.",
        "",
        f"| linear | tokens | dense | {' | '.join(FORMS)} |",
        f"|---|---|---|{'---|' * len(FORMS)}",
    ]
    tables: dict[tuple, dict] = {}
    for row in sections.get("layers", {}).get("rows", []):
        tables.setdefault((row["site"], row["shape"], row["tokens"]), {})[row["name"]] = row
    lines += [_line(place, rows) for place, rows in tables.items()]
    if wrong:
        lines += ["", f"Not in order in this run: {', '.join(wrong)}."]
    return "\n".join(lines)


def _line(place: tuple, rows: dict) -> str:
    site, shape, tokens = place
    against = next((row["against"] for row in rows.values() if "against" in row), None)
    dense = f"{_time(rows[against]['seconds'])} {against[6:]}" if against else "not timed"
    cells = []
    for name in FORMS:
        speed = rows.get(name, {}).get("speedup")
        failed = name in rows and not rows[name]["check"]["ok"]
        slower = " (slower)" if speed is not None and speed < 1 else ""
        cells.append("wrong" if failed else "" if speed is None else f"{speed:.2f}x{slower}")
    title = site if site == shape else f"{site} {shape}"
    return f"| {title} | {tokens} | {dense} | {' | '.join(cells)} |"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def rewritten(text: str, table: str) -> str:
    """README text with the table between its markers. ValueError without them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README} lacks {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: list[str]) -> int:
    text = README.read_text(encoding="utf-8")
    wanted = rewritten(text, markdown(results(RESULTS)))
    if "--check" in arguments:
        if text != wanted:
            print("README.md's kernel table is not what benchmarks/results says", file=sys.stderr)
        return int(text != wanted)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
