"""Which figures a set of runs allows, each with a caption, and sentences for those it does not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from masquant_cli.errors import MasquantError
from masquant_cli.progress import Progress
from masquant_cli.report import comparisons, data, figures, ranks
from masquant_cli.report.gather import Run
from masquant_cli.rundir import fingerprint


@dataclass(frozen=True)
class Drawing:
    """One figure: `draw(narrow=...)` makes it. Those with one `folded` title open together."""

    name: str  # of its files
    title: str
    caption: str
    draw: Callable[..., Figure]
    folded: str = ""


@dataclass(frozen=True)
class Absent:
    """A figure that cannot be drawn, and why."""

    title: str
    why: str


def sections(runs: Sequence[Run], sites: int, progress: Progress) -> list[Drawing | Absent]:
    """Every figure in the order in which it is read."""
    return [
        _trade_off(runs),
        _sqnr(runs),
        *_site_errors(runs),
        *_calibration(runs),
        _effective_rank(runs),
        *_ranks(runs, sites, progress),
    ]


def _trade_off(runs: Sequence[Run]) -> Drawing | Absent:
    title = "Rank, size and accuracy"
    points, units = data.points(runs)
    if not points:
        return Absent(title, "No run has both an export and an evaluation of it.")
    if len(points) == 1:
        return Absent(title, "One evaluated run is one point; name several runs to see the trade.")
    references = data.references(runs)
    shown = {*references, *(p.label for p in points)}
    left_out = [r.label for r in runs if r.label not in shown]
    caption = (
        "Scores of the exported models against the bits they take per weight of the quantized "
        "linears: integers, scales, smoothing and low-rank factors. Vertical lines are 95 % "
        "intervals; thin lines join runs that differ in rank alone. From each run's export and "
        f"eval/result.json{_samples(runs)}." + _left_out(left_out)
    )
    draw = partial(comparisons.trade_off, points, units, references)
    return Drawing("trade-off", title, caption, draw)


def _samples(runs: Sequence[Run]) -> str:
    tasks = [t for run in runs for t in data.comparison(run)["tasks"].values()]
    counts = sorted({t["n"] for t in tasks if t.get("n")})
    if not counts:
        return ""
    several = f"{counts[0]:,} to {counts[-1]:,}" if len(counts) > 1 else f"{counts[0]:,}"
    return f", {several} samples per task"


def _sqnr(runs: Sequence[Run]) -> Drawing | Absent:
    title = "SQNR per layer and modality"
    source = data.sqnr_source(runs)
    shown = [run for run in runs if data.site_sqnr(run, source)]
    if not shown:
        return Absent(title, "No run has finished smoothing, so no error is known yet.")
    series = {run.label: data.by_layer(data.site_sqnr(run, source)) for run in shown}
    modalities = _modalities(shown)
    caption = (
        "Signal to quantization noise of a layer's linears, mean in dB; higher is better. "
        + _source_sentence(source, runs)
        + _left_out([r.label for r in runs if r.stages and r not in shown])
    )
    draw = partial(comparisons.sqnr_per_layer, series, [r.method for r in shown], modalities)
    return Drawing("sqnr-per-layer", title, caption, draw)


def _source_sentence(source: str, runs: Sequence[Run]) -> str:
    if source == "measured":
        return (
            "Measured on evaluation samples by masquant eval (eval/result.json), each linear "
            "given the float model's input."
        )
    some = [run.label for run in runs if run.measured]
    mixed = " Some runs were also measured by masquant eval; the two are not mixed." if some else ""
    return (
        "Not measured: the expectation on calibration rows held out from smoothing, from the "
        f"notes of the smooth stage, the correction included.{mixed}"
    )


def _site_errors(runs: Sequence[Run]) -> list[Drawing | Absent]:
    title = "Errors by site"
    source = data.sqnr_source(runs)
    shown = [run for run in runs if data.site_sqnr(run, source)]
    if not shown:
        return [Absent(title, "No run has finished smoothing, so no error is known yet.")]
    values = [
        value
        for run in shown
        for site in data.site_sqnr(run, source).values()
        for value in site.values()
        if value is not None
    ]
    limits = min(values), max(values)
    others = f"{title}: {len(shown) - 1} more run{'s' if len(shown) > 2 else ''}"
    found: list[Drawing | Absent] = []
    for index, run in enumerate(shown):
        sites = data.site_sqnr(run, source)
        worst = data.worst_sites(sites, 5)
        named = "; ".join(f"{figures.site_name(s)} for {m} {v:.1f} dB" for s, m, v in worst)
        framed = [(site, modality) for site, modality, _ in worst]
        one = f"site-errors-{index + 1}" if len(shown) > 1 else "site-errors"
        caption = (
            f"{run.label}. Lowest (framed): {named}. "
            f"{'Measured by masquant eval.' if source == 'measured' else 'Held-out estimates.'}"
            + (" All runs share one colour scale." if len(shown) > 1 else "")
        )
        draw = partial(figures.site_errors, sites, _modalities([run]), framed, limits)
        head = f"{title}: {run.label}" if len(shown) > 1 else title
        found.append(Drawing(one, head, caption, draw, folded=others if index else ""))
    return found


def _calibration(runs: Sequence[Run]) -> list[Drawing | Absent]:
    titles = "Activation ranges by modality", "Who dominates smoothing"
    run = next((run for run in runs if "calibrate" in run.stages), None)
    if run is None:
        return [Absent(title, "No run has a calibration at hand.") for title in titles]
    stage = run.stages["calibrate"][1]
    tokens = stage.summary.get("tokens") or {}
    counted = ", ".join(f"{tokens[m]:,} {m}" for m in run.modalities if m in tokens)
    others = {
        fingerprint(r.stages["calibrate"][1].outputs) for r in runs if "calibrate" in r.stages
    }
    whose = f" Calibration of {run.label}" + (f" ({counted} tokens)." if counted else ".")
    if len(others) > 1:
        whose += " Other runs were calibrated differently and are not shown here."
    absmax = run.absmax
    main, modality, loss = data.most_misaligned(absmax)
    many = len(run.modalities) > 1
    first = (
        "Largest magnitude of every input channel over all calibration tokens of a modality, "
        "channels sorted by their widest range; line: median of neighbouring channels, band: "
        "the middle 80 % of them; the lowest 1 % may lie below the axis. "
    )
    if many:
        first += (
            f"{figures.site_name(main).capitalize()} is shown large because by eq. 20 one "
            f"smoothing for all costs {run.modalities[modality]} most there ({-loss:.1f} dB of "
            "its bound). "
        )
    ranges = partial(
        figures.activation_ranges, absmax, run.modalities, main, data.first_middle_last(absmax)
    )
    found: list[Drawing | Absent] = [
        Drawing("activation-ranges", titles[0], first.rstrip() + whose, ranges)
    ]
    if not many:
        return [*found, Absent(titles[1], "One modality alone dominates nothing.")]
    second = (
        "Left: share of channels whose widest range is a modality's; it alone sets the uniform "
        "smoothing factor there (eq. 11). Right: α, the widest range of a channel over the "
        "modality's own; 1 where it dominates. The further α is from one constant, the more "
        "uniform smoothing costs that modality (eq. 17)." + whose
    )
    drawn = partial(
        figures.dominance, data.shares_by_kind(absmax), data.ratios_by_kind(absmax), run.modalities
    )
    return [*found, Drawing("dominance", titles[1], second, drawn)]


def _effective_rank(runs: Sequence[Run]) -> Drawing | Absent:
    title = "Effective rank of the residual"
    for run in runs:
        before, after = (data.effective_ranks(run, which) for which in ("unwhitened", "whitened"))
        if before and after:
            caption = (
                "Effective rank (exponential of the spectrum's entropy) of what the base weight "
                "lacks for a modality, Sₘ W − Q(Sₜ W), before and after whitening with that "
                "modality's activations: lower means that a small correction repairs more. "
                f"Notes of the compensate stage of {run.label}."
            )
            draw = partial(figures.effective_rank, before, after, _modalities([run]))
            return Drawing("effective-rank", title, caption, draw)
    if any(run.corrected for run in runs):
        return Absent(title, "The corrections are too wide for their whole spectrum to be known.")
    return Absent(title, "No run has a low-rank correction.")


def _ranks(runs: Sequence[Run], count: int, progress: Progress) -> list[Drawing | Absent]:
    title = "SQNR against rank"
    run = ranks.focus(runs)
    if run is None or not count:
        why = (
            "It was not asked for (--sites 0)." if run else
            "It needs a calibrated and smoothed run with more than one modality."
        )  # fmt: skip
        return [Absent(title, why)]
    sites = data.spread([s for s in run.absmax if s not in run.of_experts], count)
    progress.stage("rank curves", len(sites), "sites")
    try:
        found = ranks.curves(run, sites, runs, progress)
    except MasquantError as error:
        return [Absent(title, f"The float weights cannot be read: {error.message}.")]
    own = ranks.own_scales(run)
    scales = "the run's scales" if own else "scales by eq. 12, as the run has none"
    caption = (
        f"Mean over {len(sites)} sites ({', '.join(map(figures.site_name, sites))}) of the SQNR of "
        f"eq. 29 on held-out calibration rows, {run.bits} as in {run.label}, base weight rounded "
        f"{'as there' if own else 'to nearest'}. CMC and plain SVD correct the shared weight "
        f"with {scales}; MAS quantizes a weight for every modality with the same scales and "
        "needs no rank; uniform smoothing "
        "takes eq. 11 for all."
    )
    if own and run.method == "masquant-joint":
        caption += " These scales were chosen for eq. 29 at the run's rank, not for eq. 21."
    lines, levels = ranks.averages(found)
    each = {site: (ranks.RATIOS, curves.lines(), curves.levels) for site, curves in found.items()}
    return [
        Drawing(
            "rank-curves", title, caption,
            partial(comparisons.rank_curves, ranks.RATIOS, lines, levels),
        ),
        Drawing(
            "rank-curves-by-site", f"{title}, site by site",
            "The sites behind the means above. From the calibration's rows and Grams and the "
            "float checkpoint.",
            partial(comparisons.rank_curves_by_site, each), folded=f"{title}, site by site",
        ),
    ]  # fmt: skip


def _modalities(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(m for run in runs for m in run.modalities))


def _left_out(labels: Sequence[str]) -> str:
    return f" Not shown for want of it: {', '.join(labels)}." if labels else ""
