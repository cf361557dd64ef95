"""What `make evidence` measures: cells, each a recipe on a model or a layer. Edit here.

A cell's id is also the name of its file in benchmarks/results/evidence/.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evidence import synthetic
from masquant_cli import recipe_yaml
from masquant_cli.recipe import Recipe

ROOT = Path(__file__).parents[2]
MODELS = {
    "planted": "builtin:tiny-omni",
    "unplanted": str(ROOT / "benchmarks/models/tiny-omni-unplanted"),
}
BITS = ("W8A8", "W4A8", "W4A6", "W4A4", "W4A16")
SAMPLES = 200  # per task; there are 500
FIDELITY = 64

# Label -> what it sets; in the order of the tables. `nearest` is the default of all but
# masquant-joint, whose default is gptq.
METHODS: Mapping[str, tuple[str, ...]] = {
    "rtn": ("method=rtn",),
    "smoothquant": ("method=smoothquant",),
    "smoothquant+gptq": ("method=smoothquant", "weights.rounding=gptq"),
    "awq": ("method=awq",),
    "mbq": ("method=mbq",),
    "omniquant-uniform": ("method=omniquant-uniform",),
    "text-scales": ("method=text-scales", "compensation.rank=0"),
    "text-scales+cmc": ("method=text-scales",),
    "masquant": ("method=masquant",),
    "masquant+gptq": ("method=masquant", "weights.rounding=gptq"),
    "masquant-reference": ("method=masquant-reference",),
    "masquant-joint+nearest": ("method=masquant-joint", "weights.rounding=nearest"),
    "masquant-joint": ("method=masquant-joint",),
}
NEEDS_A_MODEL = ("mbq", "masquant-reference")

# Table -> label -> what it sets beside W4A8; what a row leaves out is the shipped recipe's.
RANKS = (0.01, 0.02, 0.05, 0.1)
EPOCHS = (0, 1, 2, 5, 10)
ABLATIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "epochs": {
        f"{method}, {n} epochs": (f"method={method}", f"smoothing.epochs={n}")
        for method in ("masquant", "masquant-joint")
        for n in EPOCHS
    },
    "loss weights": {
        f"masquant-joint, text {text:g}, vision {vision:g}, audio {audio:g}": (
            "method=masquant-joint",
            "smoothing.loss_weights="
            + (
                "{}"
                if (text, vision, audio) == (1, 1, 1)
                else f"{{text: {text}, vision: {vision}, audio: {audio}}}"
            ),
        )
        for text, vision, audio in ((1, 1, 1), (1, 0.5, 0.5), (1, 0.1, 0.1), (0.5, 1, 1))
    },
    "objective": {
        f"{method}, {objective}": (f"method={method}", f"smoothing.objective={objective}")
        for method in ("omniquant-uniform", "masquant")
        for objective in ("linear", "block")
    },
    "whitening": {
        f"{method}, {'whitened' if whiten == 'true' else 'not whitened'}, rank ratio {rank:g}": (
            f"method={method}",
            f"compensation.whiten={whiten}",
            f"compensation.rank={rank}",
        )
        for method in ("masquant", "masquant-joint")
        for rank in RANKS
        for whiten in ("true", "false")
        # masquant-joint chooses its scales for a whitened correction.
        if method == "masquant" or whiten == "true"
    },
    "target": {
        f"{method}, {target} target": (f"method={method}", f"compensation.target={target}")
        for method in ("masquant", "masquant-joint")
        for target in ("float", "quantized")
    },
}


@dataclass(frozen=True)
class Cell:
    """`kind` model: one recipe run and evaluated. `kind` layer: all methods on one layer."""

    id: str
    kind: str
    where: str  # a key of MODELS, or "alpha-conditioning"
    bits: str
    label: str  # of METHODS or ABLATIONS; "" for a layer
    table: str  # methods | a key of ABLATIONS | layers
    sets: tuple[str, ...] = ()

    def recipe(self, label: str | None = None) -> Recipe:
        sets = self.sets if label is None else METHODS[label]
        return recipe_of(self.bits, self.where, sets)


def recipe_of(bits: str, where: str, sets: tuple[str, ...]) -> Recipe:
    path = MODELS.get(where, MODELS["planted"])
    tasks = range(5)
    return recipe_yaml.load(
        f"tiny-omni-{bits.lower()}",
        [
            f"model.path={path}",
            "export.verify=false",
            f"evaluation.fidelity_samples={FIDELITY}",
            *(f"evaluation.tasks.{i}.samples={SAMPLES}" for i in tasks),
            *sets,
        ],
    )


def cells(quick: bool = False) -> list[Cell]:
    """All cells, the longest first; `quick`: one per method and one layer."""
    models = ["planted"] if quick else list(MODELS)
    found = [
        Cell(_id(model, bits, label), "model", model, bits, label, "methods", sets)
        for model in models
        for bits in (("W4A8",) if quick else BITS)
        for label, sets in METHODS.items()
    ]
    if not quick:
        found += [
            Cell(_id("planted", "W4A8", table, label), "model", "planted", "W4A8", label, table, s)
            for table, rows in ABLATIONS.items()
            for label, s in rows.items()
        ]
    layers = [(a, c) for a in synthetic.ALPHAS for c in synthetic.CONDITIONINGS]
    found += [
        Cell(_id("layer", bits, f"{a}-{c}"), "layer", f"{a}-{c}", bits, "", "layers")
        for a, c in (layers[-1:] if quick else layers)
        for bits in (("W4A8",) if quick else BITS)
    ]
    return sorted(found, key=_cost, reverse=True)


def layer_methods() -> list[str]:
    return [label for label in METHODS if label not in NEEDS_A_MODEL]


def _cost(cell: Cell) -> int:
    """Rough seconds: the long cells must not be left for the end."""
    text = " ".join(cell.sets)
    if "reference" in text:
        return 75
    if "objective=block" in text:
        return 90
    if "joint" in text:
        return 70 if "epochs=10" in text else 40
    return {"layer": 12}.get(cell.kind, 20)


def _id(*parts: str) -> str:
    kept = "".join(c if c.isalnum() or c in "-.+/" else "-" for c in "/".join(parts).lower())
    while "--" in kept:
        kept = kept.replace("--", "-")
    return kept
