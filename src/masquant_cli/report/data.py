"""From runs to what figures and tables show. Pure functions of `Run`; nothing is drawn here."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, cat

from masquant_cli import metrics
from masquant_cli.algo.curves import dominance, range_ratios
from masquant_cli.algo.theory import misalignment_db
from masquant_cli.recipe import SITE_KINDS
from masquant_cli.report.comparisons import Point
from masquant_cli.report.gather import Run, Site
from masquant_cli.rows import row
from masquant_cli.rundir import fingerprint


def comparison(run: Run) -> dict:
    """One row of the comparison: what the run scores and what it costs, None where unknown."""
    who = {
        "name": run.label,
        "method": run.method,
        "bits": run.bits,
        "recipe": run.recipe.get("name"),
        "run_dir": str(run.path),
    }
    return row(who, run.evaluation, {stage: found[1] for stage, found in run.stages.items()})


def sqnr_source(runs: Sequence[Run]) -> str:
    """ "measured" where every smoothed run was evaluated, else "held-out": never a mix."""
    smoothed = [run for run in runs if run.heldout or run.measured]
    return "measured" if smoothed and all(run.measured for run in smoothed) else "held-out"


def site_sqnr(run: Run, source: str) -> Mapping[Site, Mapping[str, float]]:
    return run.measured if source == "measured" else run.heldout


def by_layer(sites: Mapping[Site, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """Mean dB over the sites of a layer: {modality: {layer: dB}}."""
    found: dict[str, dict[int, list[float]]] = {}
    for (layer, _), values in sites.items():
        for modality, value in values.items():
            if value is not None:
                found.setdefault(modality, {}).setdefault(layer, []).append(value)
    return {
        modality: {layer: sum(v) / len(v) for layer, v in layers.items()}
        for modality, layers in found.items()
    }


def worst_sites(
    sites: Mapping[Site, Mapping[str, float]], count: int
) -> list[tuple[Site, str, float]]:
    """The `count` lowest (site, modality, dB), lowest first."""
    every = [
        (site, modality, value)
        for site, values in sites.items()
        for modality, value in values.items()
        if value is not None
    ]
    return sorted(every, key=lambda e: (e[2], e[0], e[1]))[:count]


def kinds_of(sites: Iterable[Site]) -> list[str]:
    seen = {kind for _, kind in sites}
    return [kind for kind in SITE_KINDS if kind in seen]


def spread(sites: Iterable[Site], count: int) -> list[Site]:
    """`count` sites from the first layer to the last, the kinds in turn; fewer if there are."""
    every = set(sites)
    layers, kinds = sorted({layer for layer, _ in every}), kinds_of(every)
    chosen = []
    for i in range(count):
        share = i / (count - 1) if count > 1 else 0.5
        chosen.append((layers[round(share * (len(layers) - 1))], kinds[i % len(kinds)]))
    if missing := count - len(set(chosen)):  # few layers: whatever is left, in order
        chosen += sorted(every - set(chosen))[:missing]
    return [site for site in dict.fromkeys(chosen) if site in every]


def first_middle_last(sites: Iterable[Site]) -> list[Site]:
    """Every kind of the first, the middle and the last layer."""
    every = list(sites)
    layers = sorted({layer for layer, _ in every})
    shown = dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1]))
    return [(layer, kind) for layer in shown for kind in kinds_of(every) if (layer, kind) in every]


def most_misaligned(absmax: Mapping[Site, Tensor]) -> tuple[Site, int, float]:
    """The (site, modality index, dB) that uniform smoothing costs most by eq. 20: 0 dB where the
    modality never fired."""
    losses = [
        (misalignment_db(ratios) if len(ratios) else 0.0, site, m)
        for site, ranges in absmax.items()
        for m, ratios in enumerate(range_ratios(ranges))
    ]
    loss, site, m = min(losses)
    return site, m, loss


def shares_by_kind(absmax: Mapping[Site, Tensor]) -> dict[str, list[float]]:
    """{site kind: share of channels won by each modality}, over all layers."""
    return {
        kind: dominance(cat([r for (_, k), r in absmax.items() if k == kind], 1)).tolist()
        for kind in kinds_of(absmax)
    }


def ratios_by_kind(absmax: Mapping[Site, Tensor]) -> dict[str, list[Tensor]]:
    return {
        kind: range_ratios(cat([r for (_, k), r in absmax.items() if k == kind], 1))
        for kind in kinds_of(absmax)
    }


def effective_ranks(run: Run, which: str) -> dict[str, dict[str, dict[int, float]]]:
    """{site kind: {modality: {layer: effective rank}}} from the notes; which: un|whitened."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for (layer, kind), notes in run.corrections.items():
        for modality, note in notes.items():
            if (value := note.get(f"effective_rank_{which}")) is not None:
                found.setdefault(kind, {}).setdefault(modality, {})[layer] = value
    return {kind: found[kind] for kind in SITE_KINDS if kind in found}


def references(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Scores of evaluations without a quantized model (float): {label: {task: value}}."""
    known = [comparison(run) for run in runs if run.evaluation and not run.stages]
    return {
        one["name"]: {k: t["value"] for k, t in one["tasks"].items() if t["value"] is not None}
        for one in known
    }


def points(runs: Sequence[Run]) -> tuple[list[Point], dict[str, str]]:
    """The trade-off: a point per exported and evaluated run, and the axis label of each score."""
    found, units = [], {}
    for run in runs:
        known = comparison(run)
        if known["bits_per_weight"] is None or not (known["tasks"] or known["sqnr_db"]):
            continue
        values = {}
        for task, score in known["tasks"].items():
            if score["value"] is None:  # not finite, which JSON cannot say
                continue
            low, high = score.get("ci") or (None, None)
            values[task] = (score["value"], low, high)
            units[task] = metrics.of(score["metric"]).label
        for modality, value in (known["sqnr_db"] or {}).items():
            if value is not None:
                values[f"SQNR {modality}"] = (value, None, None)
        found.append(Point(run.label, run.method, _family(run), known["bits_per_weight"], values))
    for point in found:
        units |= {what: "dB" for what in point.values if what.startswith("SQNR ")}
    return found, units


def _family(run: Run) -> str:
    """The same for runs whose recipes differ in rank alone (and in what they evaluate)."""
    made = {k: v for k, v in run.recipe.items() if k not in ("name", "evaluation", "bench")}
    rest = {k: v for k, v in (made.get("compensation") or {}).items() if k != "rank"}
    return fingerprint({**made, "compensation": rest})
