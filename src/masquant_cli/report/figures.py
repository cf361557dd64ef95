"""Figures of what one calibration saw, and of one run's errors: data in, matplotlib Figure out.

Every function takes `narrow`: the same figure for a phone. Colours and markers: style.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter
from torch import Tensor

from masquant_cli.report import style

Site = tuple[int, str]
TINY = 1e-12  # a channel that never fired has no place on a logarithmic axis


def site_name(site: Site) -> str:
    return f"layer {site[0]} {site[1]}"


def activation_ranges(
    absmax: Mapping[Site, Tensor],
    modalities: Sequence[str],
    main: Site,
    others: Sequence[Site],
    *,
    narrow: bool,
) -> Figure:
    """Range max_t |x_t,i| of every channel, absmax {site: [M, in]}; `main` large, others small."""
    columns = 2 if narrow else 4
    rows = -(-len(others) // columns)
    figure = Figure(
        figsize=(style.NARROW if narrow else style.WIDE, 2.9 + 1.55 * rows), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.06, hspace=0.04, wspace=0.03)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1.7] + [1] * rows)
    _ranges(large := figure.add_subplot(grid[0, :]), absmax[main], modalities, bins=192)
    style.title(large, f"{site_name(main)}: {absmax[main].shape[1]} channels")
    large.set_ylabel("range  max |x|")
    large.set_xlabel("channels, widest first")
    for index, site in enumerate(others):
        small = figure.add_subplot(grid[1 + index // columns, index % columns])
        _ranges(small, absmax[site], modalities, bins=48)
        style.title(small, site_name(site))
        small.tick_params(labelsize=7)
    style.modality_key(figure, modalities, narrow)
    return figure


def _ranges(axes, absmax: Tensor, modalities: Sequence[str], bins: int) -> None:
    """Median (line) and middle 80 % (band) of neighbouring channels, sorted by the widest range."""
    order = absmax.amax(0).argsort(descending=True, stable=True)
    parts = absmax[:, order].clamp_min(TINY).tensor_split(min(bins, absmax.shape[1]), dim=1)
    at = [100 * (i + 0.5) / len(parts) for i in range(len(parts))]
    for m, modality in enumerate(modalities):
        colour = style.MODALITY[modality]
        bands = [p[m].quantile(torch.tensor([0.1, 0.5, 0.9])).tolist() for p in parts]
        low, middle, high = zip(*bands, strict=True)
        axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(at, middle, color=colour, linewidth=1.2)
    _readable_log(axes.yaxis, axes.set_yscale)
    lowest = float(quantiles(absmax.flatten(), torch.tensor([0.01])))
    axes.set_ylim(bottom=max(lowest / 2, float(absmax.max()) * 1e-5, TINY))
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))


def _readable_log(axis, set_scale: Callable[[str], None], form: str = "{:g}") -> None:
    """A logarithmic axis with plain numbers as ticks: powers of ten, on a short one 2 and 5 too."""
    set_scale("log")
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 else 9.0
    steps = (1.0,) if decades > 2.2 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda x, _: form.format(x)))
    axis.set_minor_formatter(NullFormatter())


def dominance(
    shares: Mapping[str, Sequence[float]],
    ratios: Mapping[str, Sequence[Tensor]],
    modalities: Sequence[str],
    *,
    narrow: bool,
) -> Figure:
    """Who sets the uniform factor, shares {site kind: [M]}; and alpha, {site kind: M x [n]}."""
    kinds = list(shares)
    shape = (2, 1) if narrow else (1, 2)
    figure, (left, right) = style.panels(*shape, narrow=narrow, height=2.5, legend=0.3)
    for row, kind in enumerate(kinds):
        start = 0.0
        for modality, share in zip(modalities, shares[kind], strict=True):
            left.barh(row, 100 * share, 0.66, left=start, color=style.MODALITY[modality])
            if share >= 0.09:
                words = {"ha": "center", "va": "center", "color": style.SURFACE, "fontsize": 8}
                left.text(start + 50 * share, row, f"{100 * share:.0f}%", **words)
            start += 100 * share
    style.title(left, "Who sets the uniform factor")
    left.set_xlabel("share of channels")
    left.set_xlim(0, 100)
    left.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    left.grid(axis="y", visible=False)
    step = 0.72 / len(modalities)
    points = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    for row, kind in enumerate(kinds):
        for m, modality in enumerate(modalities):
            if not len(ratios[kind][m]):
                continue
            colour = style.MODALITY[modality]
            y = row + (m - (len(modalities) - 1) / 2) * step
            q = quantiles(ratios[kind][m], points).tolist()
            right.plot([q[0], q[4]], [y, y], color=colour, linewidth=1.2)
            right.plot([q[1], q[3]], [y, y], color=colour, linewidth=5, solid_capstyle="butt")
            right.plot(q[2], y, "o", color=style.SURFACE, markeredgecolor=colour, markersize=4.5)
    _readable_log(right.xaxis, right.set_xscale, "{:g}×")
    style.title(right, "α: how much wider the uniform range is than a modality's own")
    if narrow:
        style.title(right, "α: uniform range over own range")
    right.set_xlabel("α per channel: median, middle half, middle 90 %")
    right.grid(axis="y", visible=False)
    for axes in (left, right):
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
    style.modality_key(figure, modalities, narrow)
    return figure


def quantiles(values: Tensor, points: Tensor) -> Tensor:
    """torch.quantile without its limit on the number of values (nearest order statistic)."""
    ordered = values.double().sort().values
    return ordered[(points * (len(ordered) - 1)).round().long()]


def effective_rank(
    before: Mapping[str, Mapping[str, Mapping[int, float]]],
    after: Mapping[str, Mapping[str, Mapping[int, float]]],
    modalities: Sequence[str],
    *,
    narrow: bool,
) -> Figure:
    """Effective rank of the residual, {site kind: {modality: {layer: rank}}}."""
    kinds = list(before)
    columns = min(2 if narrow else 4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, axes = style.panels(rows, columns, narrow=narrow, height=2.3, legend=0.4)
    for spare in axes[len(kinds) :]:
        spare.set_visible(False)
    for panel, kind in zip(axes, kinds, strict=False):
        for modality in modalities:
            colour = style.MODALITY[modality]
            for data, line, face in (
                (before, style.DASHED, style.SURFACE),
                (after, style.SOLID, colour),
            ):
                found = sorted(data[kind].get(modality, {}).items())
                if found:
                    x, y = zip(*found, strict=True)
                    panel.plot(x, y, marker="o", color=colour, linestyle=line, mfc=face, ms=4)
        style.title(panel, kind)
        panel.set_ylim(bottom=0)
        style.layer_axis(panel)
    for first in axes[::columns]:
        first.set_ylabel("effective rank")
    words = {"color": style.INK, "marker": "o", "markersize": 4}
    style.modality_key(
        figure,
        [m for m in modalities if any(m in by for by in before.values())],
        narrow,
        [
            Line2D([], [], ls=style.DASHED, mfc=style.SURFACE, label="before whitening", **words),
            Line2D([], [], ls=style.SOLID, label="after", **words),
        ],
    )
    return figure


def site_errors(
    sqnr: Mapping[Site, Mapping[str, float]],
    modalities: Sequence[str],
    worst: Sequence[tuple[Site, str]],
    limits: tuple[float, float],
    *,
    narrow: bool,
) -> Figure:
    """SQNR of every site, {site: {modality: dB}}; the worst (site, modality) are framed."""
    layers = sorted({layer for layer, _ in sqnr})
    kinds = list(dict.fromkeys(kind for _, kind in sqnr))
    figure, axes = style.panels(
        len(modalities), 1, narrow=narrow, height=0.32 * len(kinds) + 0.62, legend=0.1
    )
    label = len(layers) <= (7 if narrow else 18)
    for panel, modality in zip(axes, modalities, strict=True):
        values = [[sqnr.get((n, k), {}).get(modality) for n in layers] for k in kinds]
        numbers = [[float("nan") if v is None else v for v in row] for row in values]
        mesh = panel.pcolormesh(
            numbers, cmap="cividis", vmin=limits[0], vmax=limits[1],
            edgecolors=style.SURFACE, linewidth=0.8,
        )  # fmt: skip
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if label and value is not None:
                    share = (value - limits[0]) / max(limits[1] - limits[0], 1e-9)
                    colour = style.CELL_DARK if share > 0.55 else style.CELL_LIGHT
                    panel.text(
                        x + 0.5, y + 0.5, f"{value:.1f}", color=colour, fontsize=7.5,
                        ha="center", va="center",
                    )  # fmt: skip
        for (layer, kind), which in worst:
            if which == modality:
                panel.add_patch(
                    Rectangle(
                        (layers.index(layer), kinds.index(kind)), 1, 1, fill=False,
                        edgecolor=style.FRAME, linewidth=2, clip_on=False, zorder=3,
                    )
                )  # fmt: skip
        panel.set_yticks([y + 0.5 for y in range(len(kinds))], kinds)
        every = max(1, -(-len(layers) // (8 if narrow else 20)))
        shown = list(range(0, len(layers), every))
        panel.set_xticks([x + 0.5 for x in shown], [str(layers[x]) for x in shown])
        panel.invert_yaxis()
        panel.grid(visible=False)
        panel.tick_params(length=0)
        for side in ("left", "bottom"):
            panel.spines[side].set_visible(False)
        style.title(panel, modality, modality)
    axes[-1].set_xlabel("decoder layer")
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.06 if narrow else 0.03, aspect=24)
    bar.set_label("SQNR (dB); dark is worse")
    bar.outline.set_visible(False)
    return figure
