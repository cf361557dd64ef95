"""docs/evidence.md from the files in benchmarks/results/evidence/, and from nothing else."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from evidence import ordering
from evidence.plan import ABLATIONS, BITS, METHODS, MODELS, ROOT, Cell

RESULTS = ROOT / "benchmarks" / "results" / "evidence"
TARGET = ROOT / "docs" / "evidence.md"
BEGIN = "<!-- evidence: make evidence -->"
END = "<!-- end of evidence -->"
MODALITIES = ("text", "vision", "audio")
TASKS = {  # in the order of the tables -> their heads
    "picture": "picture",
    "speech": "speech",
    "transcription": "transcription WER",
    "sum": "sum",
    "text": "text",
}
TITLES = {"planted": "tiny-omni", "unplanted": "The unplanted twin"}


def write(cells: Sequence[Cell], results: Path = RESULTS, target: Path = TARGET) -> None:
    """Rewrite what is between the markers of `target`. ValueError without markers."""
    before, begin, rest = target.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{target} lacks {BEGIN} ... {END}")
    text = markdown(cells, load(cells, results))
    target.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def load(cells: Iterable[Cell], results: Path = RESULTS) -> dict[str, dict]:
    """Documents of the measured cells by id."""
    found = {}
    for cell in cells:
        path = results / f"{cell.id}.json"
        if path.is_file():
            found[cell.id] = json.loads(path.read_text(encoding="utf-8"))
    return found


def markdown(cells: Sequence[Cell], documents: Mapping[str, dict]) -> str:
    if not documents:
        return "Nothing is measured yet: run `make evidence`."
    there = [cell for cell in cells if cell.id in documents]
    seconds = sum(
        d["cpu_seconds"] for d in {d["fingerprint"]: d for d in documents.values()}.values()
    )
    dates = sorted(d["date"][:10] for d in documents.values())
    torch = sorted({d["versions"]["torch"] for d in documents.values()})
    parts = [
        f"{len(there)} of {len(cells)} cells measured, {dates[0]} to {dates[-1]}, torch "
        f"{', '.join(torch)}; {seconds / 60:.0f} minutes of one core.",
        "## What holds and what does not",
        statement(there, documents),
        "### Tasks whose score is worse than float's by more than both 95 % intervals",
        losses(there, documents),
    ]
    for model in MODELS:
        parts += _model(model, there, documents)
    parts += _layers(there, documents)
    parts += _ablations(there, documents)
    return "\n\n".join(parts)


def places(cells: Iterable[Cell], documents: Mapping[str, dict]) -> dict[str, ordering.Rows]:
    """Every place of the main tables and the layers: "planted W4A8" -> {label: SQNR}."""
    found: dict[str, dict] = {}
    for kind, words in (("model", "{0.where} {0.bits}"), ("layer", "layer {0.where} {0.bits}")):
        for cell in sorted(cells, key=lambda c: (_nth(MODELS, c.where), BITS.index(c.bits))):
            if cell.kind != kind or cell.table not in ("methods", "layers"):
                continue
            rows = found.setdefault(words.format(cell), {})
            if kind == "model":
                rows[cell.label] = documents[cell.id]["row"]["sqnr_db"]
            else:
                methods = documents[cell.id]["methods"]
                rows |= {label: one["sqnr_db"] for label, one in methods.items()}
                if "masquant" in methods:
                    rows[ordering.OWN] = methods["masquant"]["own_db"]
    return found


def statement(cells: Sequence[Cell], documents: Mapping[str, dict]) -> str:
    where = places(cells, documents)
    lines = [
        f"A claim holds in a place (a model or a synthetic layer, at some bits) if it does by at "
        f"least {ordering.MARGIN} dB; SQNR is the mean over the quantized linears."
    ]
    lines += [ordering.sentence(c, ordering.verdicts(c, where)) for c in ordering.CLAIMS]
    pairs: dict[str, dict] = {}
    for cell in cells:
        if cell.table == "whitening":
            method, how, rank = cell.label.split(", ")
            sqnr = documents[cell.id]["row"]["sqnr_db"]
            pairs.setdefault(f"{method}, {rank}", {})[how] = sqnr
    claim = ordering.WHITENING
    lines.append(ordering.sentence(claim, ordering.verdicts(claim, pairs)))
    return "\n".join(lines)


def losses(cells: Sequence[Cell], documents: Mapping[str, dict]) -> str:
    """Method by place: the tasks where its interval lies wholly on the bad side of float's."""
    floats = {_of(d): d["float"]["tasks"] for d in documents.values() if "float" in d}
    where = [(m, b) for m in floats for b in BITS]
    found: dict[tuple, dict] = {}
    for cell in cells:
        if cell.table == "methods" and cell.where in floats:
            scores = documents[cell.id]["row"]["tasks"]
            lost = [t for t in TASKS if t in scores and worse(scores[t], floats[cell.where][t])]
            found.setdefault((cell.where, cell.bits), {})[cell.label] = ", ".join(lost) or "none"
    where = [place for place in where if place in found]
    heads = ["method", *(f"{m} {b}" for m, b in where)]
    return table(heads, [[x, *(found[p].get(x, "") for p in where)] for x in METHODS])


def worse(task: Mapping, whole: Mapping) -> bool:
    """Whether a score's interval lies wholly on the bad side of the float model's."""
    if task["metric"] == "wer":
        return task["ci"][0] > whole["ci"][1]
    return task["ci"][1] < whole["ci"][0]


def _model(model: str, cells: Sequence[Cell], documents: Mapping[str, dict]) -> list[str]:
    parts = [f"## {TITLES[model]}"]
    floats = [d["float"] for d in documents.values() if "float" in d and _of(d) == model]
    for bits in BITS:
        rows = {
            cell.label: documents[cell.id]["row"]
            for cell in cells
            if (cell.table, cell.where, cell.bits) == ("methods", model, bits)
        }
        if rows:
            ordered = {label: rows[label] for label in METHODS if label in rows}
            whole = {"float": floats[0], **ordered} if floats else ordered
            parts += [f"### {TITLES[model]} {bits}", rows_table(whole)]
    return parts if len(parts) > 1 else []


def _of(document: dict) -> str:
    return document["cell"]["where"]


def rows_table(rows: Mapping[str, dict]) -> str:
    """Scores with 95 % intervals, SQNR in dB, the worst KL and flip rate, size and time."""
    measured = next(iter(rows.values()))["tasks"]
    tasks = [task for task in TASKS if task in measured]
    heads = [
        "method", *(TASKS[task] for task in tasks), *(f"{m} dB" for m in MODALITIES),
        "worst KL", "worst flips", "bits/weight", "seconds",
    ]  # fmt: skip
    body = []
    for label, row in rows.items():
        body.append(
            [
                label,
                *(score(row["tasks"][task]) for task in tasks),
                *(number((row["sqnr_db"] or {}).get(m), ".1f") for m in MODALITIES),
                number(_worst(row["kl"]), ".4f"),
                number(_worst(row["flip_rate"]), ".2%"),
                number(row["bits_per_weight"], ".2f"),
                number(row["seconds"], ".1f"),
            ]
        )
    return table(heads, body)


def _layers(cells: Sequence[Cell], documents: Mapping[str, dict]) -> list[str]:
    mine = [cell for cell in cells if cell.kind == "layer"]
    parts = ["## Synthetic layers"] if mine else []
    for bits in BITS:
        chosen = {c.where: documents[c.id] for c in mine if c.bits == bits}
        if not chosen:
            continue
        labels = [m for m in METHODS if all(m in d["methods"] for d in chosen.values())]
        body = [
            [label, *(triple(d["methods"][label]["sqnr_db"]) for d in chosen.values())]
            for label in labels
        ]
        if "masquant" in labels:
            own = [triple(d["methods"]["masquant"]["own_db"]) for d in chosen.values()]
            body.append([f"masquant, {ordering.OWN} (not deployable)", *own])
        theory = [
            "{text:.1f} / 0 / {audio:.1f}".format(**d["theorem1_loss_db"]) for d in chosen.values()
        ]
        body.append(["Theorem 1: loss under vision's scales", *theory])
        parts += [f"### Layers {bits}: text / vision / audio dB", table(["", *chosen], body)]
    return parts


def _ablations(cells: Sequence[Cell], documents: Mapping[str, dict]) -> list[str]:
    parts = []
    for name, rows in ABLATIONS.items():
        found = {c.label: documents[c.id]["row"] for c in cells if c.table == name}
        ordered = {label: found[label] for label in rows if label in found}
        if ordered:
            parts += [f"### {name.capitalize()} (tiny-omni, W4A8)", rows_table(ordered)]
    return ["## Switches", *parts] if parts else []


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def score(task: Mapping) -> str:
    """`98.0 (96.4-98.9)`: percent and its 95 % interval."""
    low, high = task["ci"]
    return f"{task['value']:.1f} ({low:.1f}-{high:.1f})"


def triple(sqnr: Mapping[str, float]) -> str:
    return " / ".join(f"{sqnr[m]:.1f}" for m in MODALITIES)


def number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _worst(by_modality: Mapping[str, float | None] | None) -> float | None:
    values = [v for v in (by_modality or {}).values() if v is not None]
    return max(values) if values else None


def _nth(order: Iterable[str], name: str) -> int:
    listed = list(order)
    return listed.index(name) if name in listed else len(listed)
