"""From a solved site to the tensors of its modules, as docs/format.md says.

`export_tensors` is what the export stage writes; install.py is the other side.
"""

from collections.abc import Iterable, Mapping

import torch
from masquant_kernels import pack_int4, packed_columns, quantize_weight
from torch import Tensor

from masquant_cli.errors import ArtifactError, RecipeError
from masquant_cli.models.sites import Site
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
# Weights that are quantized at a time: a few, so that what is in between stays in the cache.
CHUNK = 1 << 20


def export_shapes(site: Site, scheme: Scheme) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What `export_tensors` will return for a site, {module key: (dtype, shape)}.

    Raises ArtifactError when the group size does not divide the site's inputs.
    """
    modalities, rank, width = len(scheme.modalities), scheme.rank(site.kind), site.in_features
    shapes = {f"{site.module}.smooth_inv": (torch.float32, (modalities, width))}
    if rank:
        shapes[f"{site.module}.lr_a"] = torch.float16, (modalities - 1, width, rank)
    columns = packed_columns(width) if scheme.weight_bits == 4 else width
    groups = scheme.groups(width)
    for name, out in zip(site.linears, site.out_features, strict=True):
        shapes[f"{name}.weight_packed"] = torch.int8, (out, columns)
        shapes[f"{name}.weight_scale"] = torch.float32, (out, groups)
        if not scheme.symmetric:
            shapes[f"{name}.weight_zero_point"] = torch.int8, (out, groups)
        if rank:
            shapes[f"{name}.lr_b"] = torch.float16, (modalities - 1, rank, out)
    return shapes


@torch.no_grad()
def export_tensors(
    site: Site,
    weights: Iterable[Tensor],
    scale: Tensor,
    low_rank: Mapping[str, tuple[Tensor, Tensor]],
    scheme: Scheme,
    integers: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors of one site, {module key: tensor}, contiguous and ready for safetensors.

    weights: float [out, in], one per linear in site order, each taken when it is its turn. scale:
    f32 [M, in], row m divides the activations of modality m, row 0 also multiplies the weight.
    low_rank: {modality name: (lr_a [in, r], lr_b [r, sum of outs])}; a modality left out is stored
    as zeros, fewer than `scheme.rank` columns are padded with zeros. integers: i8 [sum of outs,
    in] in place of those that rounding to nearest gives, in its scales. Biases keep their name
    and are not included.

    Raises RecipeError on a group size that does not divide, on shapes that do not fit, and on
    values that are not finite (or overflow fp16 in a low-rank factor).
    """
    modalities, rank = scheme.modalities, scheme.rank(site.kind)
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
    chosen = integers.split(site.out_features) if integers is not None else ()
    given = 0
    for given, weight in enumerate(weights, 1):
        if given > len(site.linears):
            break
        name, out = site.linears[given - 1], site.out_features[given - 1]
        fits = tuple(weight.shape) == (out, site.in_features)
        _check(fits, site, f"{name}: shape {tuple(weight.shape)}")
        q = chosen[given - 1] if chosen else None
        try:
            tensors |= _linear(name, weight, scale[0].to(weight.device), scheme, q)
        except ValueError as error:
            raise RecipeError(str(error), where=name) from None
    _check(given == len(site.linears), site, f"{given} weights")
    return {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}


def _linear(
    name: str, weight: Tensor, scale: Tensor, scheme: Scheme, integers: Tensor | None
) -> dict[str, Tensor]:
    """Rows are independent, so a large weight is quantized some rows at a time."""
    parts: dict[str, list[Tensor]] = {}
    rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), rows):
        these = weight[start : start + rows].float() * scale
        quantized = quantize_weight(these, scheme.weight_bits, scheme.group_size, scheme.symmetric)
        q = quantized.q if integers is None else integers[start : start + rows]
        found = {
            "weight_packed": pack_int4(q) if scheme.weight_bits == 4 else q,
            "weight_scale": quantized.scale,
            "weight_zero_point": quantized.zero,
        }
        for key, part in found.items():
            if part is not None:
                parts.setdefault(f"{name}.{key}", []).append(part)
    return {key: torch.cat(some) for key, some in parts.items()}


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
