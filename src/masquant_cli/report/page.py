"""The HTML page: what the template is given, and how numbers are written."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from masquant_cli import __version__, metrics
from masquant_cli.recipe import Recipe
from masquant_cli.report import data, style
from masquant_cli.report.gather import Run
from masquant_cli.report.sections import Absent, Drawing
from masquant_cli.rows import in_order

FIGURE_NAMES = re.compile(
    r"trade-off|sqnr-per-layer|site-errors(-\d+)?|activation-ranges|dominance|effective-rank|"
    r"rank-curves(-by-site)?"
)
NONE = "–"


class Column(NamedTuple):
    group: str
    head: str
    values: Sequence[float | None]
    form: str
    higher: bool | None  # is better; None: neither is


COSTS = (
    ("bits_per_weight", "bits per weight", ".2f", False),
    ("bytes", "linears", "bytes", False),
    ("seconds", "time after calibration", "seconds", None),
    ("peak_bytes", "peak memory", "bytes", None),
    ("peak_gpu_bytes", "peak GPU", "bytes", None),
)
DISTANCES = (
    ("sqnr_db", "SQNR per linear, dB", ".1f", True),
    ("sqnr_end_db", "SQNR end to end, dB", ".1f", True),
    ("kl", "KL to float, 10⁻³ nats", "milli", False),
    ("flip_rate", "flips", ".1%", False),
)


def embedded(drawing: Drawing, wide: str, narrow: str) -> dict[str, str]:
    """The figure as inline SVG, for wide and for narrow screens, from SVG documents."""
    return {
        which: style.inline(document, f"{drawing.name}-{which}", drawing.title)
        for which, document in (("wide", wide), ("narrow", narrow))
    }


def rows(runs: Sequence[Run]) -> list[dict]:
    return [data.comparison(run) for run in runs]


def render(
    runs: Sequence[Run],
    parts: Sequence[Drawing | Absent],
    inline: Mapping[str, Mapping[str, str]],
) -> str:
    """The whole page as one string."""
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    template = (Path(__file__).parent / "page.html.j2").read_text(encoding="utf-8")
    models = list(dict.fromkeys(_model(run) for run in runs))
    return environment.from_string(template).render(
        version=__version__,
        title=f"{len(runs)} runs of {', '.join(models)}" if len(runs) > 1 else runs[0].label,
        subtitle="" if len(runs) > 1 else f"{models[0]}, {runs[0].path}",
        light=_variables(style.VARIABLE),
        tables=tables(rows(runs)),
        summary=summary(runs),
        blocks=_blocks([part for part in parts if isinstance(part, Drawing)], inline),
        absent=[part for part in parts if isinstance(part, Absent)],
        runs=[_about(run, next((r for r in runs if r.stages), run)) for run in runs],
    )


def _blocks(drawings: Sequence[Drawing], inline: Mapping[str, Mapping[str, str]]) -> list[dict]:
    """What stands on the page one under the other: a figure, or a fold of several."""
    return [
        {
            "folded": folded,
            "figures": [
                {"drawing": d, **{which: Markup(svg) for which, svg in inline[d.name].items()}}
                for d in group
            ],
        }
        for folded, group in itertools.groupby(drawings, key=lambda d: d.folded)
    ]


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for colour, name in colours.items())


def _model(run: Run) -> str:
    return (run.recipe.get("model") or {}).get("path") or run.recipe.get("name") or run.path.name


def tables(found: Sequence[dict]) -> list[dict]:
    """Scores with costs, then distances from float: {"groups": [(name, columns)], "heads",
    "rows": [{"name", "cells": [(text, best)]}]}. A column that no run can fill is left out."""
    tasks = list(dict.fromkeys(t for row in found for t in row["tasks"]))
    modalities = list(dict.fromkeys(m for row in found for m in row["sqnr_db"] or {}))
    scores: list[Column] = []
    for task in tasks:
        metric = next(row["tasks"][task]["metric"] for row in found if task in row["tasks"])
        values = [(row["tasks"].get(task) or {}).get("value") for row in found]
        known = metrics.of(metric)
        head = f"{metrics.head(task, metric)} {known.unit}".rstrip()
        scores.append(Column("Tasks", head, values, ".1f", known.higher))
    for key, head, form, higher in COSTS:
        scores.append(Column("Cost", head, [row[key] or None for row in found], form, higher))
    distances = [
        Column(group, modality, [(row[key] or {}).get(modality) for row in found], form, higher)
        for key, group, form, higher in DISTANCES
        for modality in modalities
    ]
    return [table for columns in (scores, distances) if (table := _table(found, columns))]


def _table(found: Sequence[dict], columns: Sequence[Column]) -> dict | None:
    columns = [c for c in columns if any(value is not None for value in c.values)]
    quantized = [row["method"] != "" for row in found]  # float is a reference, not a rival
    cells = [_cells(c, quantized) for c in columns]
    groups = {c.group: sum(d.group == c.group for d in columns) for c in columns}
    rows = [{"name": r["name"], "cells": [c[i] for c in cells]} for i, r in enumerate(found)]
    heads = [c.head for c in columns]
    return {"groups": list(groups.items()), "heads": heads, "rows": rows} if columns else None


def _cells(column: Column, rivals: Sequence[bool]) -> list[tuple[str, bool]]:
    texts = [number(value, column.form) for value in column.values]
    pairs = zip(column.values, rivals, strict=True)
    known = [value for value, rival in pairs if rival and value is not None]
    best = None
    if column.higher is not None and len(known) > 1:  # ties are equal as they are written
        best = number(max(known) if column.higher else min(known), column.form)
        if 2 * sum(number(value, column.form) == best for value in known) > len(known):
            best = None  # what most reach sets no one apart
    return [(text, rival and text == best) for text, rival in zip(texts, rivals, strict=True)]


def number(value: float | None, form: str) -> str:
    """A number for people: a format specification, "bytes" or "seconds"."""
    if value is None:
        return NONE
    if form == "bytes":
        for unit in ("B", "kB", "MB", "GB"):
            if value < 1000:
                return f"{value:.3g} {unit}"
            value /= 1000
        return f"{value:.3g} TB"
    if form == "milli":
        value *= 1000
        return format(value, ".3f" if value < 1 else ".2f" if value < 10 else ".0f")
    if form == "seconds":
        minutes, rest = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        if hours:
            return f"{hours} h {minutes:02d} min"
        return f"{minutes} min {rest:02d} s" if minutes else f"{value:.1f} s"
    return format(value, form)


def summary(runs: Sequence[Run]) -> list[str]:
    """What the page shows, in sentences with numbers."""
    said = []
    scored = [(min(v for v in s.values()), run, s) for run in runs if (s := _modal_sqnr(run))]
    if scored:
        floor, run, by_modality = max(scored, key=lambda entry: entry[0])
        worst = min(by_modality, key=by_modality.get)
        values = ", ".join(f"{m} {v:.1f} dB" for m, v in by_modality.items())
        if len(scored) > 1:
            said.append(
                f"{run.label} treats its worst modality best: {worst} at {floor:.1f} dB "
                f"of measured SQNR (all: {values})."
            )
        else:
            said.append(f"Measured SQNR of {run.label}: {values}.")
    calibrated = next((r for r in runs if "calibrate" in r.stages), None)
    if calibrated and len(calibrated.modalities) > 1:
        shares = data.dominance(data.cat(list(calibrated.absmax.values()), 1)).tolist()
        parts = [f"{m} {100 * s:.0f} %" for m, s in zip(calibrated.modalities, shares, strict=True)]
        said.append(f"Channels whose uniform smoothing factor a modality sets: {', '.join(parts)}.")
    source = data.sqnr_source(runs)
    run = max(scored, key=lambda entry: entry[0])[1] if scored else runs[0]
    for (layer, kind), modality, value in data.worst_sites(data.site_sqnr(run, source), 1):
        how = "measured" if source == "measured" else "held-out"
        said.append(
            f"Lowest {how} SQNR in {run.label}: layer {layer} {kind} for {modality}, "
            f"{value:.1f} dB."
        )
    return said


def _modal_sqnr(run: Run) -> dict[str, float]:
    found = in_order((run.evaluation or {}).get("sqnr_db")) or {}
    return {modality: value for modality, value in found.items() if value is not None}


def _about(run: Run, first: Run) -> dict:
    """A run's recipe, provenance and gaps; what its recipe has unlike the first run's."""
    stages = []
    for name, (folder, manifest) in run.stages.items():
        stages.append(
            {
                "name": name,
                "seconds": number(manifest.seconds, "seconds"),
                "memory": number(manifest.peak_bytes or None, "bytes"),
                "gpu": number(manifest.peak_gpu_bytes or None, "bytes"),
                "seed": manifest.seed,
                "fingerprint": manifest.fingerprint[:12],
                "folder": "" if folder.parent == run.path else str(folder),
            }
        )
    facts: dict[str, str] = {"directory": str(run.path)}
    manifests = [manifest for _, manifest in run.stages.values()]
    if manifests:
        facts["versions"] = ", ".join(f"{k} {v}" for k, v in manifests[-1].versions.items())
    if "calibrate" in run.stages:
        manifest = run.stages["calibrate"][1]
        files = str(manifest.reads.get("the model's files", ""))[:12]
        sources = [str(f)[:12] for f in manifest.reads.get("the data files") or ()]
        tokens = manifest.summary.get("tokens") or {}
        facts |= {
            "device": str(manifest.reads.get("device", NONE)),
            "model files": files,
            "data files": ", ".join(sources),
            "calibration": f"{manifest.summary.get('samples', NONE)} samples; "
            + ", ".join(f"{n:,} {m} tokens" for m, n in tokens.items()),
        }
    if "export" in run.stages:
        weights = [
            f"{name} {digest[:12]}"
            for name, digest in run.stages["export"][1].outputs.items()
            if name.endswith(".safetensors")
        ]
        facts["exported weights"] = ", ".join(weights[:4]) + (" …" if len(weights) > 4 else "")
    differs = {} if run is first else _differences(_recipe(run), _recipe(first))
    return {
        "label": run.label,
        "missing": run.missing,
        "facts": facts,
        "stages": stages,
        "yaml": _yaml(_recipe(run)) if run.stages else "",
        "like": "" if run is first or not run.stages else first.label,
        "differs": _yaml(differs) if differs else "",
    }


def _recipe(run: Run) -> dict:
    """As docs/recipes.md orders its keys, where this masquant knows them all."""
    try:
        whole = Recipe.model_validate(run.recipe).model_dump(mode="json")
    except ValueError:
        whole = run.recipe
    return _set(whole)


def _yaml(content: object) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=96)


def _differences(mine: object, other: object) -> dict | None:
    """What `mine` has that `other` has not or has otherwise; null stands for what it lacks."""
    if mine == other:
        return None
    if not (isinstance(mine, Mapping) and isinstance(other, Mapping)):
        return mine
    keys = [key for key in {**other, **mine} if mine.get(key) != other.get(key)]
    return {key: _differences(mine.get(key), other.get(key)) for key in keys}


def _set(recipe: object) -> object:
    """Without values that are not set; they are the defaults and hide the rest."""
    if isinstance(recipe, Mapping):
        return {k: _set(v) for k, v in recipe.items() if v is not None and v != {} and v != []}
    if isinstance(recipe, list):
        return [_set(item) for item in recipe]
    return recipe
