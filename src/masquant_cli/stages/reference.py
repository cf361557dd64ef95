"""The solved model in floats: eq. 29 by fake quantization, straight from the stages' artifacts.

It shares nothing with packing, file names or the runtime modules, so the export is checked
against it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from masquant_kernels.quantizers import quantize_weight

from masquant_cli.algo.linear import compensated_linear
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.models.sites import Site
from masquant_cli.stages.job import Job
from masquant_cli.stages.probes import Probes


@torch.no_grad()
def reference_logits(job: Job, probes: Probes) -> dict[str, torch.Tensor]:
    """Logits [B, T, vocabulary] f32 of the solved model for every encoded batch, by its kind."""
    model = job.loaded.model
    tokens = token_ids_of(model.config)
    logits = {}
    with _fake_quantized(job) as now:
        for kind, inputs in probes.items():
            inputs = {k: v.to(model.device) for k, v in inputs.items()}
            now.ids = modality_ids(inputs["input_ids"], tokens, job.recipe.modalities)
            logits[kind] = model(**inputs, use_cache=False).logits.float().cpu()
    return logits


@dataclass
class _Now:
    """The modalities of the batch that is running."""

    ids: torch.Tensor | None = None


@contextlib.contextmanager
def _fake_quantized(job: Job) -> Iterator[_Now]:
    now, handles = _Now(), []
    try:
        for layer in job.layers:
            scales = job.read("smooth", layer.layer)
            low_rank = job.read("compensate", layer.layer)
            for site in layer.sites:
                handles += _replace(job, site, scales, low_rank, now)
        yield now
    finally:
        for handle in handles:
            handle.remove()


def _replace(job: Job, site: Site, scales: dict, low_rank: dict, now: _Now) -> list:
    recipe, device = job.recipe, job.loaded.model.device
    scale = scales[f"{site.key}.scale"].to(device)
    options = recipe.weights
    pairs = {
        m: (low_rank[f"{site.key}.{name}.lr_a"], low_rank[f"{site.key}.{name}.lr_b"])
        for m, name in enumerate(recipe.modalities)
        if f"{site.key}.{name}.lr_a" in low_rank
    }
    handles, start = [], 0
    for name, out in zip(site.linears, site.out_features, strict=True):
        module = job.loaded.model.get_submodule(name)
        base = quantize_weight(
            module.weight.detach().float() * scale[0],
            options.bits,
            options.group_size,
            options.symmetric,
        )
        if f"{site.key}.weight" in low_rank:  # rounded by GPTQ, in the same scales
            q = low_rank[f"{site.key}.weight"][start : start + out].to(device)
            base = base._replace(q=q)
        mine = {
            m: (a.to(device), b[:, start : start + out].to(device)) for m, (a, b) in pairs.items()
        }
        start += out

        def hook(module, args, output, base=base, mine=mine):
            y = compensated_linear(
                args[0], now.ids, base, scale, recipe.activations.bits, mine, module.bias
            )
            return y.to(output.dtype)

        handles.append(module.register_forward_hook(hook))
    return handles
