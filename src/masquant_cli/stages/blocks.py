"""Whole decoder layers for methods that learn from a layer's output.

Two streams of hidden states are kept per sample: the float model's, and that of the layers solved
so far in the form of eq. 21. A layer maps the second onto the first one's output.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from masquant_cli import shards
from masquant_cli.algo.block import Scales, modality_linear
from masquant_cli.algo.linear import fake_quant_weight_ste
from masquant_cli.data.inputs import encode, model_inputs
from masquant_cli.distributed import World
from masquant_cli.models.capture import Batch, embed, layer_output
from masquant_cli.models.experts import routed
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.models.sites import LayerSites
from masquant_cli.stages.job import Job
from masquant_cli.stages.memory import embeds_at_once
from masquant_cli.stages.samples import same_samples
from masquant_cli.stages.walk import before_layers


class Blocks:
    """Hands out the layers in order; `solved` is where smooth saves the scales of each.

    A layer's weights are in memory until the next one is asked for, or `close` is called.
    """

    def __init__(self, job: Job, solved: Path):
        self.job, self.solved = job, solved
        self.current: LayerBlock | None = None
        self._weights = contextlib.ExitStack()

    def prepare(self) -> None:
        """Embed the samples, unless that was done."""
        if self.current is None:
            _ = self._streams
            self.current = self._block(self.job.layers[0])

    def at(self, index: int) -> "LayerBlock":
        """Layer `index`, its quantized inputs from the layers before it with their scales."""
        self.prepare()
        while self.current.layer.layer < index:
            self._advance(self.current)
            self.current = self._block(self.job.layers[self.current.layer.layer + 1])
        return self.current

    def close(self) -> None:
        """Free the weights of the layer that is in memory."""
        self._weights.close()

    def _advance(self, block: "LayerBlock") -> None:
        saved = shards.load(shards.layer_file(self.solved, block.layer.layer))
        scales = {s.key: saved[f"{s.key}.scale"].to(self._device) for s in block.layer.sites}
        for index, stream in enumerate(block.inputs):
            with torch.no_grad():
                stream.quantized = block.run(index, scales)[None].to("cpu")
            stream.hidden = block.targets[index][None]

    @property
    def _device(self) -> torch.device:
        return self.job.float.device

    @cached_property
    def _streams(self) -> list["_Stream"]:
        """One sample at a time, in the order in which calibrate chose them: sources in turn. Of
        several ranks one works with blocks, so the others are not there to share the choosing."""
        job, skeleton = self.job, self.job.float
        samples = same_samples(job, World()).samples[: job.recipe.smoothing.samples]
        tokens = token_ids_of(skeleton.config)
        job.progress.stage("embed", len(samples), "samples")
        found = []
        with before_layers(skeleton, at_once=embeds_at_once(job)):
            for sample in samples:
                inputs = encode(skeleton.processor, [sample], for_generation=False)
                ids = modality_ids(inputs["input_ids"], tokens, job.recipe.modalities)
                batch = embed(skeleton, model_inputs(skeleton.model, inputs), ids)
                found.append(_Stream(**vars(batch), quantized=batch.hidden))
                job.progress.advance(1)
        return found

    def _block(self, layer: LayerSites) -> "LayerBlock":
        self._weights.close()
        self._weights.enter_context(self.job.float.materialised(layer.module))
        with torch.no_grad():
            targets = [
                layer_output(self.job.float, layer.layer, s.hidden.to(self._device), s)[0].cpu()
                for s in self._streams
            ]
        return LayerBlock(self.job, layer, self._streams, targets)


@dataclass
class _Stream(Batch):
    """One sample: `hidden` is the float model's, `quantized` that of the solved layers."""

    quantized: Tensor


@dataclass(frozen=True)
class LayerBlock:
    """One decoder layer and what enters it; an algo.block.Block."""

    job: Job
    layer: LayerSites
    inputs: list[_Stream]
    targets: list[Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        device = self.job.float.device
        return self.targets[index].to(device), self.inputs[index].marks[0].to(device)

    def run(self, index: int, scales: Scales) -> Tensor:
        batch = self.inputs[index]
        ids = self.sample(index)[1]
        hidden = batch.quantized.to(ids.device)
        with _quantized(self.job, self.layer, scales, ids):
            return layer_output(self.job.float, self.layer.layer, hidden, batch)[0]


@contextlib.contextmanager
def _quantized(job: Job, layer: LayerSites, scales: Scales, ids: Tensor) -> Iterator[None]:
    """While open, the layer's linears run in the form of eq. 21 with gradients to `scales`."""
    form, bits = job.recipe.weights.form, job.recipe.activations.bits

    def quantize(weight: Tensor) -> Tensor:
        return fake_quant_weight_ste(weight, *form)

    replaced = []
    try:
        for site in (site for site in layer.sites if site.key in scales):
            for name in site.linears:
                linear = job.float.module(name)

                def forward(x, linear=linear, name=name, scale=scales[site.key]):
                    weight, rows = linear.weight.detach().float(), x.flatten(0, -2).float()
                    here = routed(job.float.model, name, ids)
                    y = modality_linear(rows, here, weight, scale, quantize, bits)
                    y = y if linear.bias is None else y + linear.bias.detach().float()
                    return y.view(*x.shape[:-1], -1).to(x.dtype)

                linear.forward = forward  # an instance attribute hides the method
                replaced.append(linear)
        yield
    finally:
        for linear in replaced:
            del linear.forward
