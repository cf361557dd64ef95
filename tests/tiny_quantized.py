"""Quantized tiny models with made-up scales and factors, in memory and on disk."""

import contextlib
import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from masquant_cli.models.modality import merge_video, token_ids_of
from masquant_cli.models.names import disk_names, new_disk_names
from masquant_cli.models.sites import find_sites
from masquant_cli.runtime.install import install
from masquant_cli.runtime.pack import export_tensors
from masquant_cli.runtime.scheme import KINDS, Scheme


def scheme_of(model, rank: int = 5, **fields) -> Scheme:
    known = token_ids_of(model.config)
    modalities = tuple(m for m in ("text", "vision", "audio") if m == "text" or m in known)
    return Scheme(
        modalities=modalities,
        token_ids=merge_video(known, modalities),
        ranks=dict.fromkeys(KINDS, rank) if rank and len(modalities) > 1 else {},
        **fields,
    )


def solved_site(site, scheme: Scheme, seed: int = 0):
    """(scale, low rank): scales within a factor 4 of each other, factors of visible size."""
    generator = torch.Generator().manual_seed(seed)
    scale = 4 ** torch.rand(len(scheme.modalities), site.in_features, generator=generator)
    rank, outs = scheme.rank(site.kind), sum(site.out_features)
    low_rank = {
        m: (
            0.1 * torch.randn(site.in_features, rank, generator=generator).half(),
            0.1 * torch.randn(rank, outs, generator=generator).half(),
        )
        for m in (scheme.modalities[1:] if rank else ())
    }
    return scale, low_rank


def site_tensors(model, scheme: Scheme) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in find_sites(model):
        for site in layer.sites:
            if site.kind in scheme.sites:
                weights = [model.get_submodule(name).weight for name in site.linears]
                solved = solved_site(site, scheme, seed=layer.layer)
                tensors |= export_tensors(site, weights, *solved, scheme)
    return tensors


def quantized(model, scheme: Scheme):
    """A quantized copy of a float model."""
    tensors = site_tensors(model, scheme)
    model = copy.deepcopy(model)
    install(model, scheme, tensors)
    return model


@contextlib.contextmanager
def by_definition(model, scheme: Scheme, ids: torch.Tensor):
    """While open, the model's linears compute equation 29, told the ids [B, T] from outside.

    For symmetric weights, one scale per channel, and the made-up solution of `solved_site`.
    """
    linears = []
    for layer in find_sites(model):
        for site in layer.sites:
            scale, low_rank = solved_site(site, scheme, seed=layer.layer)
            start = 0
            for name, out in zip(site.linears, site.out_features, strict=True):
                linears.append(model.get_submodule(name))
                _define(linears[-1], scale, low_rank, ids, start, scheme)
                start += out
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _define(linear, scale, low_rank, ids, start: int, scheme: Scheme) -> None:
    w = linear.weight * scale[0]
    step = w.abs().amax(1, keepdim=True) / (2 ** (scheme.weight_bits - 1) - 1)
    w = (w / step).round() * step
    factors = [low_rank[m] for m in scheme.modalities[1:] if low_rank]

    def forward(x):
        u = x * (1 / scale)[ids]
        rounded = u
        if scheme.activation_bits < 16:
            limit = 2 ** (scheme.activation_bits - 1) - 1
            step = (u.abs().amax(-1, keepdim=True) / limit).clamp_min(1e-30)  # padding may be zero
            rounded = (u / step).round() * step
        y = rounded @ w.T
        for m, (a, b) in enumerate(factors, 1):
            corrected = u @ a.float() @ b[:, start : start + linear.out_features].float()
            y = y + (ids == m)[..., None] * corrected
        return y if linear.bias is None else y + linear.bias

    linear.forward = forward  # an instance attribute hides the method


def export(model, scheme: Scheme, folder: Path, prefix: str = "", outer: dict | None = None):
    """Write an export of a float model. `prefix` and `outer` imitate a full Omni checkpoint."""
    model.save_pretrained(folder)
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    disk = {prefix + key: value for key, value in load_file(file).items()}
    known = disk_names(model, disk)
    tensors = site_tensors(model, scheme)
    new = new_disk_names(tensors, known)
    for key in tensors:
        if key.endswith(".weight_packed"):
            del disk[known[key.removesuffix("_packed")]]
    save_file(disk | {new[k]: v for k, v in tensors.items()}, file, metadata={"format": "pt"})
    config["quantization_config"] = scheme.to_dict()
    if outer is not None:  # loaded through the thinker's class, which sees only its own part
        config = {**outer, "thinker_config": config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
