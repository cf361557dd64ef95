"""How every figure looks: one colour per modality, one marker and line per method.

Figures are drawn in the light palette; in a page each of its colours becomes a CSS variable, so
that figures follow light and dark. No pyplot, hence no global state.
"""

import io
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID, SURFACE = "#1b2430", "#56616d", "#dbe0e6", "#ffffff"
# Okabe and Ito's hues, darkened until they can be read as text on white.
MODALITY = {"text": "#0067a3", "vision": "#bd4b00", "audio": "#007f61", "video": "#a2437f"}
VARIABLE = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface"} | {
    colour: name for name, colour in MODALITY.items()
}
# On heat maps, whose colours no theme changes.
CELL_DARK, CELL_LIGHT, FRAME = "#0f1216", "#fafafa", "#ff4f7b"
SOLID, DASHED, DOTTED, DASHDOT = "-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2))
METHOD = {  # marker, line
    "rtn": ("x", DOTTED),
    "smoothquant": ("s", DASHED),
    "awq": ("^", DASHDOT),
    "mbq": ("v", (0, (3, 1, 1, 1))),
    "omniquant-uniform": ("P", (0, (3, 1, 1, 1, 1, 1))),
    "text-scales": ("<", (0, (2, 1))),
    "masquant": ("o", SOLID),
    "masquant-reference": ("D", (0, (8, 2))),
    "masquant-joint": ("*", SOLID),
}
FILLS = ("full", "none", "left", "top", "right", "bottom")  # several runs of one method
WIDE, NARROW = 10.6, 4.3  # inches
RC = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.facecolor": SURFACE,
    "axes.facecolor": SURFACE,
    "savefig.facecolor": SURFACE,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a folder's name is no formula
    "svg.hashsalt": "masquant",
    "path.simplify_threshold": 0.3,
}


def look():
    """Open while a figure is drawn and written."""
    return matplotlib.rc_context(RC)


def panels(
    rows: int, columns: int, *, narrow: bool, height: float, legend: float = 0.0, **shared
) -> tuple[Figure, list]:
    """A figure with rows x columns axes, `height` inches per row, as a flat list."""
    size = (NARROW if narrow else WIDE, rows * height + legend)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, hspace=0.04, wspace=0.03)
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    return figure, list(axes.flat)


def title(axes, text: str, modality: str | None = None) -> None:
    axes.set_title(text, color=MODALITY.get(modality, INK))


def layer_axis(axes, label: bool = True) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    if label:
        axes.set_xlabel("decoder layer")


def run_styles(methods: Sequence[str]) -> list[dict]:
    """Marker, line and fill of each run: the method's, with a fill for the k-th run of it."""
    styles = []
    for index, method in enumerate(methods):
        marker, line = METHOD.get(method, ("h", SOLID))
        fill = FILLS[methods[:index].count(method) % len(FILLS)]
        size = {"*": 8, "x": 5.5, "P": 6}.get(marker, 5)
        styles.append(
            {"marker": marker, "linestyle": line, "fillstyle": fill, "markersize": size}
            | {"markerfacecoloralt": SURFACE, "markeredgewidth": 1.2}
        )
    return styles


def method_key(figure: Figure, labels: Sequence[str], styles: Sequence[dict], narrow: bool):
    """The legend that says which marker is which run, in no modality's colour."""
    handles = [
        # Legends leave out what begins with an underscore.
        Line2D([], [], color=INK, label=f" {x}" if x.startswith("_") else x, **s)
        for x, s in zip(labels, styles, strict=True)
    ]
    columns = 1 if narrow else min(3, len(labels))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=4)


def modality_key(
    figure: Figure, modalities: Sequence[str], narrow: bool, more: Sequence[Line2D] = ()
):
    """The legend of modalities' colours, then of lines in no modality's colour."""
    handles = [Line2D([], [], color=MODALITY[m], label=m, linewidth=3) for m in modalities]
    handles += list(more)
    columns = min(len(handles), 4 if not more or not narrow else 2)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=2.6)


def settled(figure: Figure) -> Figure:
    """The figure with its layout found for good: most of the work of writing it."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine(None)
    return figure


def svg(figure: Figure) -> str:
    """The figure as an SVG document, the same for the same figure."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def png(figure: Figure, dpi: int = 160) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi, metadata={"Software": None})
    return data.getvalue()


def inline(document: str, prefix: str, description: str) -> str:
    """An SVG document as an element of a page: themed, with ids of its own and a description."""
    element = document[document.index("<svg") :].strip()
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.S)
    for colour, name in VARIABLE.items():
        element = element.replace(colour, f"var(--{name})")
    # Attributes of presentation cannot hold variables, declarations of a style can.
    element = re.sub(r'\b(fill|stroke)="(var\(--\w+\))"', r'style="\1: \2"', element)
    element = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', element)
    element = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", element)
    element = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', element)
    element = re.sub(r"'DejaVu Sans'(, sans-serif)?", "var(--font)", element)
    opening = re.match(r"<svg[^>]*>", element)[0]
    box = re.search(r'viewBox="[^"]+"', opening)[0]
    said = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    mine = f'<svg {box} role="img" aria-label="{said}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return mine + element[len(opening) :]
