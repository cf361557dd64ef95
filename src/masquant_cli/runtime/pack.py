"""From a solved site to the tensors of its modules, and from tensors to modules in a model.

`export_tensors` is what the export stage writes; `install` is what loading does with it.
Both sides of docs/format.md meet here.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from masquant_kernels import pack_int4, quantize_weight
from torch import Tensor, nn

from masquant_cli.errors import ArtifactError, RecipeError
from masquant_cli.models.families import family_of
from masquant_cli.models.sites import Site, find_sites, layers_path
from masquant_cli.runtime.context import ModalityContext, attach
from masquant_cli.runtime.mas_linear import MasLinear, MasSite
from masquant_cli.runtime.scheme import Scheme

# Endings of every tensor that masquant adds to a checkpoint.
SUFFIXES = (
    ".smooth_inv",
    ".lr_a",
    ".lr_b",
    ".weight_packed",
    ".weight_scale",
    ".weight_zero_point",
)


@torch.no_grad()
def export_tensors(
    site: Site,
    weights: Sequence[Tensor],
    scale: Tensor,
    low_rank: Mapping[str, tuple[Tensor, Tensor]],
    scheme: Scheme,
) -> dict[str, Tensor]:
    """The tensors of one site, {module key: tensor}, contiguous and ready for safetensors.

    weights: float [out, in], one per linear in site order. scale: f32 [M, in], row m divides the
    activations of modality m, row 0 also multiplies the weight. low_rank: {modality name:
    (lr_a [in, r], lr_b [r, sum of outs])}; a modality left out is stored as zeros, fewer than
    `scheme.rank` columns are padded with zeros. Biases keep their name and are not included.

    Raises RecipeError on a group size that does not divide, on shapes that do not fit, and on
    values that are not finite (or overflow fp16 in a low-rank factor).
    """
    modalities, rank = scheme.modalities, scheme.rank(site.kind)
    _check(len(weights) == len(site.linears), site, f"{len(weights)} weights")
    for name, weight, out in zip(site.linears, weights, site.out_features, strict=True):
        expected = (out, site.in_features)
        _check(tuple(weight.shape) == expected, site, f"{name}: shape {tuple(weight.shape)}")
    _check(
        tuple(scale.shape) == (len(modalities), site.in_features),
        site,
        f"scale of shape {tuple(scale.shape)}",
    )
    scale = scale.float()
    _check(
        bool((torch.isfinite(scale) & (scale > 0)).all()), site, "scales not finite and positive"
    )
    _check(set(low_rank) <= set(modalities[1:]), site, f"low rank for {sorted(low_rank)}")
    _check(rank > 0 or not low_rank, site, "low-rank factors although the scheme's rank is 0")

    tensors = {f"{site.module}.smooth_inv": 1 / scale}
    if rank:
        lr_a = torch.zeros(len(modalities) - 1, site.in_features, rank, dtype=torch.float16)
        lr_b = torch.zeros(len(modalities) - 1, rank, sum(site.out_features), dtype=torch.float16)
        for modality, (a, b) in low_rank.items():
            m, r = modalities.index(modality) - 1, a.shape[1]
            fits = r <= rank and a.shape[0] == lr_a.shape[1]
            fits = fits and tuple(b.shape) == (r, lr_b.shape[2])
            _check(fits, site, f"{modality} factors of shapes {tuple(a.shape)}, {tuple(b.shape)}")
            lr_a[m, :, :r], lr_b[m, :r] = a.half(), b.half()
        finite = torch.isfinite(lr_a).all() and torch.isfinite(lr_b).all()
        _check(bool(finite), site, "low-rank factors that do not fit fp16")
        tensors[f"{site.module}.lr_a"] = lr_a
        for name, part in zip(site.linears, lr_b.split(site.out_features, 2), strict=True):
            tensors[f"{name}.lr_b"] = part
    for name, weight in zip(site.linears, weights, strict=True):
        try:
            quantized = quantize_weight(
                weight.float() * scale[0].to(weight.device),
                scheme.weight_bits,
                scheme.group_size,
                scheme.symmetric,
            )
        except ValueError as error:
            raise RecipeError(str(error), where=name) from None
        packed = pack_int4(quantized.q) if scheme.weight_bits == 4 else quantized.q
        tensors[f"{name}.weight_packed"] = packed
        tensors[f"{name}.weight_scale"] = quantized.scale
        if quantized.zero is not None:
            tensors[f"{name}.weight_zero_point"] = quantized.zero
    return {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}


@torch.no_grad()
def install(
    model: nn.Module, scheme: Scheme, tensors: Mapping[str, Tensor] | None = None
) -> ModalityContext:
    """Swap the linears of a supported model for quantized ones, in place.

    On a meta model the new modules are meta too and a loader fills them. On a real one `tensors`
    ({module key: tensor}, as `export_tensors` makes them for every site) is required, and biases
    are taken over. Raises RecipeError for an unsupported model, ArtifactError when a tensor is
    missing, left over, or of another shape or dtype; the model is then unchanged.
    """
    sites = [s for layer in find_sites(model) for s in layer.sites if s.kind in scheme.sites]
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
    context = ModalityContext(scheme.modalities, scheme.token_ids)
    for name, module in new.items():
        if isinstance(module, MasSite):
            module.context = context
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    attach(context, _receivers(model))
    return context


def _build(model: nn.Module, site: Site, scheme: Scheme, new: dict) -> None:
    rank, width = scheme.rank(site.kind), site.in_features
    linears = [model.get_submodule(name) for name in site.linears]
    shared = MasSite(width, len(linears), rank, scheme, linears[0].weight.device)
    new[site.module] = shared
    for name, linear, out in zip(site.linears, linears, site.out_features, strict=True):
        bias_dtype = None if linear.bias is None else linear.bias.dtype
        try:
            quantized = MasLinear(width, out, rank, scheme, bias_dtype, linear.weight.device)
        except ArtifactError as error:
            raise ArtifactError(error.message, where=name) from None
        quantized.bind(shared)
        quantized.train(linear.training)
        new[name] = quantized


def _receivers(model: nn.Module) -> list[nn.Module]:
    """Modules that a batch enters through, outermost first: the model and its inner models."""
    root = family_of(model.config).root
    path = layers_path(model).rpartition(".")[0]
    names = ["" if root == "" or not path.startswith(root) else root]
    for part in path.removeprefix(names[0]).strip(".").split("."):
        names.append(f"{names[-1]}.{part}".strip("."))
    return [model.get_submodule(name) for name in names]


def check_tensors(expected: Mapping, found: Mapping, where: str | None = None) -> None:
    """Compare {key: (shape, dtype)} of modules and of files; ArtifactError on any difference."""
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing:
        raise ArtifactError(f"{_some(missing)} missing from the checkpoint", where=where)
    if extra:
        raise ArtifactError(
            f"{_some(extra)} in the checkpoint, but not described by its quantization_config",
            where=where,
        )
    for key, want in expected.items():
        if found[key] != want:
            raise ArtifactError(
                f"{key} should be {want}, the checkpoint has {found[key]}", where=where
            )


def _some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    rest = f" and {len(keys) - 3} more tensors are" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + (rest or (" is" if len(keys) == 1 else " are"))


def _check(condition: bool, site: Site, found: str) -> None:
    if not condition:
        raise RecipeError(f"cannot export this site: {found}", where=site.name)
