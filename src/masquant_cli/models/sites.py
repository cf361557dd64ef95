"""Sites: groups of linears that read one input, hence share smoothing, quantized input and L1.

Works on real models, on meta skeletons and on models whose linears are quantized already.
"""

from dataclasses import dataclass, replace

from torch import nn

from masquant_cli.errors import RecipeError
from masquant_cli.models.experts import LINEARS, Experts
from masquant_cli.models.families import EXPERTS, SITES, Family, family_of


@dataclass(frozen=True)
class Site:
    """One group of linears. All names are full module paths inside the model."""

    kind: str  # attn_in | attn_out | mlp_in | mlp_out
    layer: int
    module_prefix: str  # the block that holds the linears: "model.layers.0.self_attn"
    linears: tuple[str, ...]  # "model.layers.0.self_attn.q_proj", ... in site order
    in_features: int
    out_features: tuple[int, ...]  # one per linear
    experts: str | None = None  # the module of the layer's experts, if the linears are theirs
    expert: int | None = None  # which one's, where every expert has a site of its own

    @property
    def source(self) -> str:
        """The module whose first argument is the site's input."""
        shared = self.experts if self.expert is None else None
        return shared or self.linears[0]

    @property
    def key(self) -> str:
        """What artifacts of the layer call it: the kind, or "mlp_out.17" for expert 17."""
        return self.kind if self.expert is None else f"{self.kind}.{self.expert}"

    @property
    def module(self) -> str:
        """Path of the exported site module, beside its linears: ".../self_attn.attn_in"."""
        return f"{self.module_prefix}.{self.kind}"

    @property
    def name(self) -> str:
        """What reports and errors call it: "layer 3 attn_in"."""
        return f"layer {self.layer} {self.key}"


@dataclass(frozen=True)
class LayerSites:
    """One decoder layer and its sites, in the order in which the layer runs them."""

    layer: int
    module: str  # "model.language_model.layers.0"
    sites: tuple[Site, ...]

    def __getitem__(self, key: str) -> Site:
        for site in self.sites:
            if site.key == key:
                return site
        raise KeyError(f"layer {self.layer} has no site {key!r}")


def layers_path(model: nn.Module, family: Family | None = None) -> str:
    """Module path of the decoder layer list, or RecipeError when it is nowhere expected."""
    family = family or family_of(model.config)
    outer = getattr(model, family.root, model) if family.root else model
    decoder = outer.get_decoder()
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList) and len(layers):
        for name, module in model.named_modules():
            if module is layers:
                return name
    raise RecipeError(
        f"{type(model).__name__} has no decoder layers in its {type(decoder).__name__}",
        hint="this Transformers release lays the family out differently; "
        "masquant supports transformers >= 5.17",
    )


def find_sites(model: nn.Module) -> list[LayerSites]:
    """All sites of a supported model, layer by layer.

    Raises RecipeError when the family is not supported, when an expected linear is missing or
    is not a linear, and when the members of a site do not read inputs of one width.
    """
    family = family_of(model.config)
    path = layers_path(model, family)
    found = []
    for index, layer in enumerate(model.get_submodule(path)):
        prefix = f"{path}.{index}"
        absent = any(hasattr(layer, block) for block in family.floats)
        experts = _experts(layer)
        sites = [
            _site(layer, prefix, index, kind, _names(layer, kind))
            for kind in SITES
            if not (absent and kind.startswith("attn")) and not (experts and kind.startswith("mlp"))
        ]
        if experts:
            sites += _expert_sites(layer, prefix, index, experts)
        found.append(LayerSites(index, prefix, tuple(sites)))
    return found


def _experts(layer: nn.Module) -> Experts | None:
    """The layer's experts; None where it has none, or where they are not unfused."""
    try:
        found = layer.get_submodule(EXPERTS)
    except AttributeError:
        return None
    return found if isinstance(found, Experts) else None


def _expert_sites(layer: nn.Module, prefix: str, index: int, experts: Experts) -> list[Site]:
    """One site for what all experts read, and one per expert for what it alone does."""
    of = [[f"{EXPERTS}.{i}.{name}" for name in LINEARS] for i in range(experts.count)]
    path = f"{prefix}.{EXPERTS}"
    entering = tuple(name for names in of for name in names[:2])
    shared = _site(layer, prefix, index, "mlp_in", entering)
    found = [replace(shared, module_prefix=path, experts=path)]
    for i, names in enumerate(of):
        leaving = _site(layer, prefix, index, "mlp_out", tuple(names[2:]))
        found.append(replace(leaving, experts=path, expert=i))
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear, quantized already or not."""
    # By name: the quantized linear lives in runtime, which imports this module.
    return isinstance(module, nn.Linear) or type(module).__name__ == "MasLinear"


def _names(layer: nn.Module, kind: str) -> tuple[str, ...]:
    """How this layer names the linears of a site kind: the first way in which it has any."""

    def has(name: str) -> bool:
        block, _, last = name.rpartition(".")
        return hasattr(getattr(layer, block, None), last)

    return next((way for way in SITES[kind] if any(map(has, way))), SITES[kind][0])


def _site(layer: nn.Module, prefix: str, index: int, kind: str, names: tuple[str, ...]) -> Site:
    linears = []
    for name in names:
        try:
            module = layer.get_submodule(name)
        except AttributeError:
            found = [n for n, child in layer.named_modules() if is_linear(child)]
            raise RecipeError(
                f"expected a linear {name!r}; the linears found are {', '.join(found) or 'none'}",
                where=f"{prefix} ({type(layer).__name__})",
                hint="this variant of the family is not supported yet",
            ) from None
        if not is_linear(module):
            raise RecipeError(
                f"expected {name!r} to be a linear, found {type(module).__name__}",
                where=prefix,
                hint="quantize the original float model, not one that another tool converted",
            )
        linears.append(module)
    widths = {module.in_features for module in linears}
    if len(widths) != 1:
        raise RecipeError(
            f"{', '.join(names)} should share one input, their widths are {sorted(widths)}",
            where=prefix,
        )
    block = names[0].rpartition(".")[0]
    return Site(
        kind=kind,
        layer=index,
        module_prefix=f"{prefix}.{block}" if block else prefix,
        linears=tuple(f"{prefix}.{name}" for name in names),
        in_features=widths.pop(),
        out_features=tuple(module.out_features for module in linears),
    )
