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
from masquant_cli.models.capture import Batch, first_layer_inputs, run_layer
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.models.sites import LayerSites
from masquant_cli.stages.job import Job
from masquant_cli.stages.samples import CalibrationSet, batches, choose_samples


class Blocks:
    """Hands out the layers in order; nothing is computed before the first is asked for."""

    def __init__(self, job: Job):
        self.job = job
        self.current: LayerBlock | None = None

    def at(self, index: int, folder: Path) -> "LayerBlock":
        """Layer `index`; the layers before it are run with the scales saved in `folder`."""
        if self.current is None:
            self.current = self._block(self.job.layers[0])
        while self.current.layer.layer < index:
            self._advance(self.current, folder)
            self.current = self._block(self.job.layers[self.current.layer.layer + 1])
        return self.current

    def _advance(self, block: "LayerBlock", folder: Path) -> None:
        saved = shards.load(shards.layer_file(folder, block.layer.layer))
        scales = {s.kind: saved[f"{s.kind}.scale"].to(self._device) for s in block.layer.sites}
        for index, stream in enumerate(block.inputs):
            with torch.no_grad():
                stream.quantized = block.run(index, scales)[None]
            stream.hidden = block.targets[index][None]

    @property
    def _device(self) -> torch.device:
        return self.job.loaded.model.device

    @cached_property
    def _streams(self) -> list["_Stream"]:
        job = self.job
        chosen = choose_samples(job.recipe, job.loaded, job.progress)
        most = min(job.recipe.smoothing.samples, len(chosen.samples))
        some = CalibrationSet(chosen.samples[:most], chosen.lengths[:most], chosen.tokens, 0)
        recipe = job.recipe.model_copy(
            update={"calibration": job.recipe.calibration.model_copy(update={"batch_tokens": 1})}
        )
        tokens = token_ids_of(job.loaded.model.config)
        first = job.loaded.model.get_submodule(job.layers[0].module)
        job.progress.stage("embed", most, "samples")
        found = []
        for inputs in batches(recipe, some, job.loaded.processor):
            inputs = {k: v.to(self._device) for k, v in inputs.items()}
            ids = modality_ids(inputs["input_ids"], tokens, recipe.modalities)
            batch = first_layer_inputs(job.loaded.model, first, inputs, ids)
            found.append(_Stream(**vars(batch), quantized=batch.hidden))
            job.progress.advance(1)
        return found

    def _block(self, layer: LayerSites) -> "LayerBlock":
        module = self.job.loaded.model.get_submodule(layer.module)
        targets = []
        for stream in self._streams:
            forward = Batch(stream.hidden, stream.arguments, stream.ids, stream.real)
            run_layer(module, forward)
            targets.append(forward.hidden[0])
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
        batch = self.inputs[index]
        return self.targets[index], batch.ids[0].masked_fill(~batch.real[0], -1)

    def run(self, index: int, scales: Scales) -> Tensor:
        batch = self.inputs[index]
        ids = self.sample(index)[1]
        module = self.job.loaded.model.get_submodule(self.layer.module)
        with _quantized(self.job, self.layer, scales, ids):
            out = module(batch.quantized, **batch.arguments)
        return (out[0] if isinstance(out, tuple) else out)[0]


@contextlib.contextmanager
def _quantized(job: Job, layer: LayerSites, scales: Scales, ids: Tensor) -> Iterator[None]:
    """While open, the layer's linears run in the form of eq. 21 with gradients to `scales`."""
    options, bits = job.recipe.weights, job.recipe.activations.bits

    def quantize(weight: Tensor) -> Tensor:
        return fake_quant_weight_ste(weight, options.bits, options.group_size, options.symmetric)

    replaced = []
    try:
        for site in layer.sites:
            for name in site.linears:
                linear = job.loaded.model.get_submodule(name)

                def forward(x, linear=linear, scale=scales[site.kind]):
                    weight = linear.weight.detach().float()
                    y = modality_linear(x[0].float(), ids, weight, scale, quantize, bits)
                    y = y if linear.bias is None else y + linear.bias.detach().float()
                    return y[None].to(x.dtype)

                linear.forward = forward  # an instance attribute hides the method
                replaced.append(linear)
        yield
    finally:
        for linear in replaced:
            del linear.forward
