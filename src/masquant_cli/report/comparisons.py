"""Figures that put methods or runs side by side: data in, matplotlib Figure out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from masquant_cli.report import style
from masquant_cli.report.figures import Site, site_name

CURVES = {  # what rank curves compare, and its line
    "CMC": style.SOLID,
    "unwhitened SVD": style.DASHED,
    "MAS, own weight per modality (eq. 21)": (0, (10, 3)),
    "MBQ": style.DASHDOT,
    "uniform smoothing (eq. 11)": style.DOTTED,
}


@dataclass(frozen=True)
class Point:
    """One run in the trade-off: `values` {what: (value, low, high)}; low, high may be None.

    Points of one `family` differ in rank alone."""

    label: str
    method: str
    family: str
    bits_per_weight: float
    values: Mapping[str, tuple[float, float | None, float | None]]


def sqnr_per_layer(
    series: Mapping[str, Mapping[str, Mapping[int, float]]],
    methods: Sequence[str],
    modalities: Sequence[str],
    *,
    narrow: bool,
) -> Figure:
    """Mean SQNR of a layer's linears, {run: {modality: {layer: dB}}}; a panel per modality."""
    columns = 1 if narrow else len(modalities)
    rows = -(-len(modalities) // columns)
    key = 0.2 * (len(series) if narrow else -(-len(series) // 3)) + 0.15
    figure, axes = style.panels(rows, columns, narrow=narrow, height=2.7, legend=key, sharey=True)
    styles = style.run_styles(list(methods))
    for panel, modality in zip(axes, modalities, strict=True):
        for (_, by_modality), look in zip(series.items(), styles, strict=True):
            found = sorted(by_modality.get(modality, {}).items())
            if found:
                x, y = zip(*found, strict=True)
                every = max(1, len(x) // 14)
                panel.plot(x, y, color=style.MODALITY[modality], markevery=every, **look)
        style.title(panel, modality, modality)
        style.layer_axis(panel, label=panel in axes[-columns:])
    for first in axes[::columns]:
        first.set_ylabel("SQNR (dB)")
    style.method_key(figure, list(series), styles, narrow)
    return figure


def rank_curves(
    ratios: Sequence[float],
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    levels: Mapping[str, Mapping[str, float]],
    *,
    narrow: bool,
) -> Figure:
    """SQNR against rank ratio, means over sites: curves {modality: {what: [dB]}} over `ratios`,
    levels {modality: {what: dB}} that no rank changes."""
    columns = 1 if narrow else len(curves)
    rows = -(-len(curves) // columns)
    kinds = [k for k in CURVES if any(k in c or k in levels[m] for m, c in curves.items())]
    key = 0.2 * len(kinds) / (1 if narrow else 2) + 0.2
    figure, axes = style.panels(rows, columns, narrow=narrow, height=2.9, legend=key, sharey=True)
    for panel, modality in zip(axes, curves, strict=True):
        _curves(panel, modality, ratios, curves[modality], levels[modality])
        style.title(panel, modality, modality)
        if panel in axes[-columns:]:
            panel.set_xlabel("rank / min(inputs, outputs)")
    for first in axes[::columns]:
        first.set_ylabel("SQNR (dB)")
    _curve_key(figure, kinds, narrow)
    return figure


def rank_curves_by_site(
    sites: Mapping[Site, tuple[Sequence[float], Mapping, Mapping]], *, narrow: bool
) -> Figure:
    """The same for every site alone: {site: (ratios, curves, levels)}, modalities by colour."""
    columns = min(2 if narrow else 3, len(sites))
    rows = -(-len(sites) // columns)
    modalities = list(dict.fromkeys(m for _, curves, _ in sites.values() for m in curves))
    kinds = [
        k for k in CURVES
        if any(k in c[m] or k in lv[m] for _, c, lv in sites.values() for m in c)
    ]  # fmt: skip
    key = 0.2 * (len(kinds) / (1 if narrow else 2) + 1) + 0.3
    figure, axes = style.panels(rows, columns, narrow=narrow, height=2.1, legend=key)
    for spare in axes[len(sites) :]:
        spare.set_visible(False)
    for panel, (site, (ratios, curves, levels)) in zip(axes, sites.items(), strict=False):
        for modality in curves:
            _curves(panel, modality, ratios, curves[modality], levels[modality], small=True)
        style.title(panel, site_name(site))
    for panel in axes[max(0, len(sites) - columns) : len(sites)]:
        panel.set_xlabel("rank ratio")
    for first in axes[::columns]:
        first.set_ylabel("SQNR (dB)")
    colours = [Line2D([], [], color=style.MODALITY[m], label=m, linewidth=3) for m in modalities]
    _curve_key(figure, kinds, narrow, colours)
    return figure


def _curves(panel, modality: str, ratios, curves, levels, small: bool = False) -> None:
    colour = style.MODALITY[modality]
    width = 1.1 if small else 1.6
    for what, values in curves.items():
        marker = {"CMC": "o", "unwhitened SVD": "s"}[what]
        face = colour if what == "CMC" else style.SURFACE
        panel.plot(
            ratios[: len(values)], values, color=colour, linestyle=CURVES[what], linewidth=width,
            marker=marker, markersize=2.8 if small else 4, markerfacecolor=face,
        )  # fmt: skip
    for what, value in levels.items():
        panel.axhline(value, color=colour, linestyle=CURVES[what], linewidth=width)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def _curve_key(figure: Figure, kinds: Sequence[str], narrow: bool, first: Sequence = ()) -> None:
    markers = {"CMC": {"marker": "o"}, "unwhitened SVD": {"marker": "s", "mfc": style.SURFACE}}
    handles = list(first) + [
        Line2D([], [], color=style.INK, linestyle=CURVES[k], label=k, ms=4, **markers.get(k, {}))
        for k in kinds
    ]
    columns = 1 if narrow else 3
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=4)


def trade_off(
    points: Sequence[Point],
    units: Mapping[str, str],
    references: Mapping[str, Mapping[str, float]],
    *,
    narrow: bool,
) -> Figure:
    """Scores against bits per weight, a panel per score: units {what: label of its axis}.

    references {label: {what: value}} have no such size and are lines across.
    """
    columns = min(2 if narrow else 3, len(units))
    rows = -(-len(units) // columns)
    named = len(points) + len(references)
    key = 0.2 * (named if narrow else -(-named // 3)) + 0.2
    figure, axes = style.panels(rows, columns, narrow=narrow, height=2.2, legend=key)
    for spare in axes[len(units) :]:
        spare.set_visible(False)
    styles = style.run_styles([p.method for p in points])
    for panel, (what, unit) in zip(axes, units.items(), strict=False):
        for point, look in zip(points, styles, strict=True):
            if what not in point.values:
                continue
            value, low, high = point.values[what]
            if low is not None and high is not None:
                x = [point.bits_per_weight] * 2
                panel.plot(x, [low, high], color=style.MUTED, linewidth=0.9, alpha=0.6)
            mark = {**look, "linestyle": "none"}
            panel.plot(point.bits_per_weight, value, color=style.INK, **mark)
        _ladders(panel, points, what)
        for values in references.values():
            if what in values:
                panel.axhline(values[what], color=style.INK, linestyle=style.DASHED, linewidth=1)
        style.title(panel, what, what.removeprefix("SQNR ") if what.startswith("SQNR ") else None)
        panel.set_ylabel(unit)
        panel.margins(x=0.12, y=0.15)
    for panel in axes[max(0, len(units) - columns) : len(units)]:
        panel.set_xlabel("bits per weight")
    keyed = [{**s, "linestyle": "none"} for s in styles]
    keyed += [{"linestyle": style.DASHED, "linewidth": 1} for _ in references]
    style.method_key(figure, [*(p.label for p in points), *references], keyed, narrow)
    return figure


def _ladders(panel, points: Sequence[Point], what: str) -> None:
    """Runs that differ in rank alone are joined: size bought with rank."""
    for family in dict.fromkeys(p.family for p in points):
        mine = [p for p in points if p.family == family and what in p.values]
        steps = sorted((p.bits_per_weight, p.values[what][0]) for p in mine)
        if len(steps) > 1:
            panel.plot(*zip(*steps, strict=True), color=style.MUTED, linewidth=0.9, zorder=1)
