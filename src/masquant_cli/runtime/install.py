"""Quantized modules in the place of a float model's: what loading a checkpoint starts with."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from masquant_cli.errors import ArtifactError, RecipeError
from masquant_cli.models.experts import unfuse
from masquant_cli.models.families import NORMS, family_of
from masquant_cli.models.sites import LayerSites, Site, find_sites, layers_path
from masquant_cli.runtime.blocks import GatedMLP, MasRMSNorm, is_gated_mlp, is_rms_norm
from masquant_cli.runtime.context import ModalityContext, attach
from masquant_cli.runtime.mas_linear import MasLinear, MasSite
from masquant_cli.runtime.pack import check_tensors
from masquant_cli.runtime.scheme import Scheme


@torch.no_grad()
def install(
    model: nn.Module, scheme: Scheme, tensors: Mapping[str, Tensor] | None = None
) -> ModalityContext:
    """Swap the linears of a supported model for quantized ones, in place.

    On a meta model the new modules are meta too and a loader fills them. On a real one `tensors`
    ({module key: tensor}, as `export_tensors` makes them for every site) is required, and biases
    are taken over. Norms and MLP blocks whose work a site can do are swapped too, under the same
    names (blocks.py). Raises RecipeError for an unsupported model, ArtifactError when a tensor is
    missing, left over, or of another shape or dtype; the model is then unchanged.
    """
    unfuse(model)
    layers = find_sites(model)
    sites = [s for layer in layers for s in layer.sites if s.kind in scheme.sites]
    for site in sites:
        if hasattr(model.get_submodule(site.module_prefix), site.kind):
            raise RecipeError("the model is quantized already", where=site.module)
    device = model.get_submodule(sites[0].linears[0]).weight.device
    if tensors is None and device.type != "meta":
        raise ValueError("a model with real weights needs the tensors of its quantized modules")
    new: dict[str, MasSite | MasLinear] = {}
    for site in sites:
        _build(model, site, scheme, new)
    if tensors is not None:
        _fill(model, new, tensors)
    context = ModalityContext(scheme.modalities, scheme.token_ids)
    for layer in layers:
        _swap_fronts(model, layer, scheme, context)
    for name, module in new.items():
        _put(model, name, module)
    for layer in layers:
        for site in layer.sites:
            if site.kind in scheme.sites:
                _connect(model, layer, site, context)
    attach(context, _receivers(model))
    fuse_sites(model)
    return context


def fuse_sites(model: nn.Module) -> None:
    """Join the weights of every site now, so that the first forward pass need not."""
    sites = {m.site: None for m in model.modules() if isinstance(m, MasLinear)}
    for site in sites:
        site.weights()


def _build(model: nn.Module, site: Site, scheme: Scheme, new: dict) -> None:
    rank, width = scheme.rank(site.kind), site.in_features
    linears = [model.get_submodule(name) for name in site.linears]
    new[site.module] = MasSite(width, rank, scheme, linears[0].weight.device)
    for name, linear, out in zip(site.linears, linears, site.out_features, strict=True):
        bias_dtype = None if linear.bias is None else linear.bias.dtype
        try:
            quantized = MasLinear(width, out, rank, scheme, bias_dtype, linear.weight.device)
        except ArtifactError as error:
            raise ArtifactError(error.message, where=name) from None
        quantized.train(linear.training)
        new[name] = quantized


def _fill(model: nn.Module, new: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    expected = {
        f"{name}.{key}": (tuple(value.shape), value.dtype)
        for name, module in new.items()
        for key, value in module.state_dict().items()
        if key != "bias"
    }
    check_tensors(expected, {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()})
    for name, module in new.items():
        for key in module.state_dict():
            if key == "bias":
                module.bias.copy_(model.get_submodule(name).bias.detach())
            else:
                getattr(module, key).copy_(tensors[f"{name}.{key}"])


def _swap_fronts(
    model: nn.Module, layer: LayerSites, scheme: Scheme, context: ModalityContext
) -> None:
    """The norms and the MLP block of a layer, where the quantized sites can do their work."""
    for site in layer.sites:
        name = _norm(model, layer, site)
        if name and site.kind in scheme.sites and is_rms_norm(found := model.get_submodule(name)):
            _put(model, name, MasRMSNorm(found, context))
    for site in layer.sites:
        name = site.module_prefix
        if site.kind != "mlp_out" or site.kind not in scheme.sites:
            continue
        if is_gated_mlp(found := model.get_submodule(name)):
            _put(model, name, GatedMLP(found))


def _norm(model: nn.Module, layer: LayerSites, site: Site) -> str | None:
    """Path of the norm whose output the site alone reads; None where the layer has none."""
    if site.experts:  # their router reads it too
        return None
    module = model.get_submodule(layer.module)
    names = (name for name in NORMS.get(site.kind, ()) if hasattr(module, name))
    return next((f"{layer.module}.{name}" for name in names), None)


def _connect(model: nn.Module, layer: LayerSites, site: Site, context: ModalityContext) -> None:
    """Tell a site who asks it, and the norm in front of it who reads its output."""
    norm_name = _norm(model, layer, site)
    norm = model.get_submodule(norm_name) if norm_name else None
    linears = [model.get_submodule(name) for name in site.linears]
    shared = model.get_submodule(site.module)
    shared.context = context
    if isinstance(norm, MasRMSNorm):
        norm.readers = (model.get_submodule(site.module_prefix), *linears)
        shared.bind(linears, norm)
    else:
        shared.bind(linears)
    if site.experts:
        model.get_submodule(site.experts).context = context
    if site.experts and site.expert is None:  # each expert's linears run on tokens of their own
        for start in range(0, len(linears), 2):
            shared.part(linears[start : start + 2])


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _receivers(model: nn.Module) -> list[nn.Module]:
    """Modules that a batch enters through, outermost first: the model and its inner models."""
    root = family_of(model.config).root
    path = layers_path(model).rpartition(".")[0]
    names = ["" if root == "" or not path.startswith(root) else root]
    for part in path.removeprefix(names[0]).strip(".").split("."):
        names.append(f"{names[-1]}.{part}".strip("."))
    return [model.get_submodule(name) for name in names]
