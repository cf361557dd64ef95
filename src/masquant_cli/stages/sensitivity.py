"""How much the model's own loss feels an error in each modality's tokens, layer by layer (MBQ).

One backward pass per sample over the float model; only the activations' gradients are taken. The
whole model is in memory for it: a gradient crosses all layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from masquant_cli.data.inputs import encode_scored, model_inputs
from masquant_cli.distributed import deal
from masquant_cli.errors import EnvironmentProblem, RecipeError
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.models.sites import LayerSites
from masquant_cli.stages.job import Job
from masquant_cli.stages.memory import budget, resident
from masquant_cli.stages.samples import same_samples

# The output that stands for a site: of the attention block, and of the MLP.
STANDS_FOR = {"attn_in": "attn_out", "mlp_in": "mlp_out"}


class Sensitivity:
    """Mean |d loss / d output| of each modality relative to text's, at least the layers' median.

    The loss is the model's own, next-token cross entropy over a sample's answer (or over its text
    if it has none); text counts at those tokens. A modality that no sample holds gets 1.
    """

    def __init__(self, job: Job):
        self.job = job

    def prepare(self) -> None:
        """Run the model backwards, unless that was done."""
        _ = self._ratios

    def of(self, layer: int) -> dict[str, Tensor]:
        """By site key, f32 [M]; the base is 1."""
        found = {}
        for site in self.job.layers[layer].sites:
            felt = self._ratios[STANDS_FOR.get(site.kind, site.kind)]
            least = torch.stack([one for one in felt if one is not None]).median(0).values
            found[site.key] = torch.maximum(felt[layer], least)
        return found

    @cached_property
    def _ratios(self) -> dict[str, list[Tensor | None]]:
        job = self.job
        names = job.recipe.modalities
        chosen = same_samples(job)
        samples = chosen.samples[: job.recipe.smoothing.samples]
        owners = deal(chosen.lengths[: len(samples)], job.world.size)
        samples = [s for s, r in zip(samples, owners, strict=True) if r == job.world.rank]
        watched = sorted(set(STANDS_FOR.values()))
        shape = len(job.layers), len(names), 2  # in fp64 their order hardly matters
        sums = {kind: torch.zeros(shape, dtype=torch.float64) for kind in watched}
        skeleton, tokens = job.float, token_ids_of(job.float.config)
        job.progress.stage("gradients", len(samples), "samples")
        with _whole(job):
            for sample in samples:
                batch, scored = encode_scored(skeleton.processor, [sample])
                ids = modality_ids(batch["input_ids"], tokens, names)
                ids[(ids == 0) & ~scored] = -1  # text counts where the loss is taken
                ids[~batch["attention_mask"].bool()] = -1
                with _gradients(job, sums, ids.to(skeleton.device)):
                    _loss(skeleton.model, batch, scored).backward()
                job.progress.advance(1, tokens=batch["input_ids"].numel())
        parts = job.world.all_gather(sums)
        sums = {kind: sum(part[kind] for part in parts) for kind in watched}
        return {
            kind: [
                _relative(kind, one) if _has(layer, kind) else None
                for layer, one in zip(job.layers, found, strict=True)
            ]
            for kind, found in sums.items()
        }


@contextmanager
def _whole(job: Job) -> Iterator[None]:
    """While open, all weights are in memory."""
    needed, limit = job.float.nbytes(""), budget(job)
    free = max(0, limit - resident())
    if needed > free and job.float.device.type == "cpu":
        raise EnvironmentProblem(
            f"method {job.recipe.method} takes gradients through the whole model: "
            f"{needed / 1e9:.1f} GB of weights, and {free / 1e9:.1f} GB are free",
            where="method",
            hint="use a machine with more memory, or a method without gradients (masquant-joint)",
        )
    with job.float.materialised(""):
        yield


def _relative(kind: str, sums: Tensor) -> Tensor:
    """[M, 2] of summed |gradients| and counts -> [M] means over the base's mean."""
    mean = sums[:, 0] / sums[:, 1].clamp_min(1)
    if not bool(torch.isfinite(mean).all()) or float(mean[0]) <= 0:
        raise RecipeError(
            f"the loss has no usable gradient at {kind}",
            where="method mbq",
            hint="give calibration samples an assistant's answer, and check the float model",
        )
    return torch.where(sums[:, 1] > 0, mean / mean[0], torch.ones_like(mean)).float()


def _loss(model: nn.Module, batch: dict[str, Tensor], scored: Tensor) -> Tensor:
    inputs = model_inputs(model, batch)
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    at = scored[:, 1:].to(logits.device)
    return nn.functional.cross_entropy(logits[at].float(), inputs["input_ids"][:, 1:][at])


def _has(layer: LayerSites, kind: str) -> bool:
    """Whether the layer has such a site; one of linear attention has none of attention's."""
    return any(site.kind == kind for site in layer.sites)


def _block_output(layer: LayerSites, kind: str) -> str:
    """The module whose output is that of the site's block; of experts, of all of them."""
    site = next(site for site in layer.sites if site.kind == kind)
    name = site.linears[0]
    return name if site.expert is None else name.rsplit(".", 2)[0]


@contextmanager
def _gradients(job: Job, sums: dict[str, Tensor], ids: Tensor) -> Iterator[None]:
    """While open, backward passes add |gradient| means per token to `sums[kind][layer]`."""
    model, handles = job.float.model, []

    def start(_module, args, kwargs):  # the graph begins at the first decoder layer
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden.detach().requires_grad_(True)
        return (
            ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        )

    def watch(kind: str, layer: int):
        def add(gradient: Tensor) -> None:
            felt = gradient.float().abs().mean(-1).view_as(ids)
            for m in range(sums[kind].shape[1]):
                here = felt[ids == m]
                sums[kind][layer, m] += torch.tensor([float(here.sum()), here.numel()])

        return lambda _module, _args, output: output.register_hook(add) and None

    try:
        first = model.get_submodule(job.layers[0].module)
        handles.append(first.register_forward_pre_hook(start, with_kwargs=True))
        for layer in job.layers:
            for kind in (kind for kind in sums if _has(layer, kind)):
                module = model.get_submodule(_block_output(layer, kind))
                handles.append(module.register_forward_hook(watch(kind, layer.layer)))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
