"""The solved model in floats: eq. 29 by fake quantization, straight from the stages' artifacts.

It shares nothing with packing, file names or the runtime modules, so the export is checked
against it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from masquant_kernels.quantizers import QWeight, quantize_weight
from torch import Tensor, nn

from masquant_cli.algo.linear import compensated_linear
from masquant_cli.models.capture import Batch, run_layer
from masquant_cli.models.experts import routed
from masquant_cli.models.sites import Site
from masquant_cli.models.skeleton import Skeleton
from masquant_cli.recipe import Weights
from masquant_cli.stages.job import Job
from masquant_cli.stages.walk import Probes, instead_of, walk

CHUNK = 1 << 20  # weights that are rounded at a time: what is in between stays in the cache


def reference_logits(
    job: Job, skeleton: Skeleton, probes: Probes, ids: Mapping[str, Tensor],
    positions: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """Logits f32 [k, vocabulary] of the solved model at `positions` of every probe, by its kind.

    `skeleton` is the float model in fp32; ids and positions as in `walk`. One decoder layer is in
    memory at a time.
    """

    def run(index: int, work: list[Batch]) -> None:
        layer = job.layers[index]
        scales, low_rank = job.read("smooth", index), job.read("compensate", index)
        with skeleton.materialised(layer.module), contextlib.ExitStack() as stack:
            now = _Now()
            for site in layer.sites:
                for module, forward in _forwards(job, skeleton, site, scales, low_rank, now):
                    stack.enter_context(instead_of(module, forward))
            for batch in work:
                now.ids = batch.ids.to(skeleton.device)
                run_layer(skeleton, index, batch)
        job.progress.advance(1)

    return walk(skeleton, probes, ids, positions, run)


@dataclass
class _Now:
    """The modalities of the batch that is running: int64 [B, T]."""

    ids: Tensor | None = None


def _forwards(
    job: Job, skeleton: Skeleton, site: Site, scales: dict, low_rank: dict, now: _Now
) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """The site's linears, and eq. 29 in the place of what they compute."""
    recipe, device = job.recipe, skeleton.device
    scale = scales[f"{site.key}.scale"].to(device)
    options = recipe.weights
    pairs = {
        m: (low_rank[f"{site.key}.{name}.lr_a"], low_rank[f"{site.key}.{name}.lr_b"])
        for m, name in enumerate(recipe.modalities)
        if f"{site.key}.{name}.lr_a" in low_rank
    }
    start = 0
    for name, out in zip(site.linears, site.out_features, strict=True):
        module = skeleton.module(name)
        base = _rounded(module.weight.detach(), scale[0], options)
        if f"{site.key}.weight" in low_rank:  # rounded by GPTQ, in the same scales
            q = low_rank[f"{site.key}.weight"][start : start + out].to(device)
            base = base._replace(q=q)
        mine = {
            m: (a.to(device), b[:, start : start + out].to(device)) for m, (a, b) in pairs.items()
        }
        start += out

        def forward(x, module=module, name=name, base=base, mine=mine):
            here = routed(skeleton.model, name, now.ids)
            y = compensated_linear(x, here, base, scale, recipe.activations.bits, mine, module.bias)
            return y.to(x.dtype)

        yield module, forward


def _rounded(weight: Tensor, scale: Tensor, options: Weights) -> QWeight:
    """The base weight [out, in] rounded to nearest, some rows at a time: they are independent."""
    rows = max(1, CHUNK // weight.shape[1])
    parts = [
        quantize_weight(some.float() * scale, options.bits, options.group_size, options.symmetric)
        for some in weight.split(rows)
    ]
    return QWeight(
        *(None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
    )
