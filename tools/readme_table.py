"""The README's tables, made of benchmarks/results/*.json and evidence/, and of nothing else.

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
QUALITY = (
    "<!-- quality table: make evidence, make readme-table -->",
    "<!-- end of quality table -->",
)
CHOICE = (
    "<!-- choice table: make evidence, make readme-table -->",
    "<!-- end of choice table -->",
)
METHODS = {  # what `make evidence` calls them -> what the README does
    "rtn": "round to nearest",
    "smoothquant": "SmoothQuant",
    "masquant": "masquant, as published",
    "masquant-joint": "**masquant-joint**",
}
TASKS = ("picture", "speech", "transcription", "sum", "text")
MODALITIES = ("text", "vision", "audio")
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


def quality(folder: Path, bits: tuple[str, ...] = ("W4A8", "W4A6")) -> str | None:
    """The embedded model's scores by method; None while a row is not measured."""
    found = {(b, m): _cell(folder, b, m) for b in bits for m in METHODS}
    if not all(found.values()):
        return None
    whole = _cell(folder, bits[0], "rtn")["float"]
    tasks = [task for task in TASKS if task in whole["tasks"]]
    heads = ["", "bits", *tasks, *(f"{m} dB" for m in MODALITIES), "linears"]
    rows = [["float", "", *_row(whole, tasks)]]
    rows += [[METHODS[m], b, *_row(d["row"], tasks)] for (b, m), d in found.items()]
    return _table(heads, rows)


def choice(folder: Path, bits: tuple[str, ...] = ("W8A8", "W4A8", "W4A6", "W4A4")) -> str | None:
    """SQNR of the paper's choice of scales and of ours; None while a row is not measured."""
    found = {m: [_cell(folder, b, m) for b in bits] for m in ("masquant", "masquant-joint")}
    if not all(all(cells) for cells in found.values()):
        return None
    said = {"masquant": "`masquant`, the paper's choice", "masquant-joint": "`masquant-joint`"}
    heads = ["SQNR in dB: text / vision / audio", *bits]
    return _table(heads, [[said[m], *map(_triple, cells)] for m, cells in found.items()])


def _cell(folder: Path, bits: str, method: str) -> dict | None:
    path = folder / "planted" / bits.lower() / f"{method}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _row(row: dict, tasks: list[str]) -> list[str]:
    scores = [f"{row['tasks'][task]['value']:.1f} %" for task in tasks]
    sqnr = row["sqnr_db"] or {}
    noise = [f"{sqnr[m]:.1f}" if m in sqnr else "" for m in MODALITIES]
    return [*scores, *noise, f"{row['bytes'] / 1e6:.2f} MB"]


def _triple(document: dict) -> str:
    return " / ".join(f"{document['row']['sqnr_db'][m]:.1f}" for m in MODALITIES)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def rewritten(text: str, table: str | None, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """README text with the table between its markers; what is there stays where there is none.
    ValueError without markers."""
    before, begin, rest = text.partition(markers[0])
    between, end, after = rest.partition(markers[1])
    if not begin or not end:
        raise ValueError(f"{README} lacks {markers[0]} ... {markers[1]}")
    made = between if table is None else f"\n{table}\n"
    return f"{before}{begin}{made}{end}{after}"


def wanted(text: str, folder: Path = RESULTS) -> str:
    """README text as the files in `folder` would have it."""
    text = rewritten(text, markdown(results(folder)))
    text = rewritten(text, quality(folder / "evidence"), QUALITY)
    return rewritten(text, choice(folder / "evidence"), CHOICE)


def main(arguments: list[str]) -> int:
    text = README.read_text(encoding="utf-8")
    new = wanted(text)
    if "--check" in arguments:
        if text != new:
            print("README.md's tables are not what benchmarks/results says", file=sys.stderr)
        return int(text != new)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
