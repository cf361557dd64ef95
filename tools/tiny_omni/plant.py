"""Outlier channels that belong to one modality, put in before the language model is trained.

Large multimodal models grow channels that are large on vision tokens and small elsewhere; a
model this small grows none. Here they are built in and held fixed while everything else trains
around them. docs/tiny-omni.md states the strengths and what they do; Plant is all of them.

A planted residual channel of modality m is about `bias` on m's tokens and nearly zero on others,
in every layer (nothing in the decoder writes to it). The RMSNorm weights of the channel are set so
that the normalised value is `peak` on m's tokens. Channels come in pairs: the two weight columns
that read a pair are opposite up to `mismatch`, so the float model gets a fixed offset of moderate
size and the pair's difference, not the sum of two huge terms. Intermediate channels do the same
for down_proj.
"""

from dataclasses import dataclass

import torch
from spec import HIDDEN

NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Plant:
    """Counts are even; peaks are in units of an ordinary normalised channel's rms (one)."""

    vision_channels: int = 6
    vision_peak: float = 80.0
    audio_channels: int = 2
    audio_peak: float = 10.0
    bias: float = 6.0  # residual value on the own modality, in rms of its embedding
    spread: float = 0.03  # token-to-token standard deviation of the value, relative to it
    leak: float = 0.01  # residual value on the other modalities, in rms of their embedding
    column: float = 2.5  # size of the weights that read a planted channel, in fan-in std
    mismatch: float = 0.1  # how far a pair's columns are from cancelling, in fan-in std
    neurons: int = 4  # planted intermediate channels per layer
    neuron_peak: float = 60.0  # their value on vision tokens
    ramp: float = 0.2  # share of training over which the peaks grow from one
    seed: int = 7


@torch.no_grad()
def _pair_columns(weight, channels, plant, generator):
    """Opposite columns of random signs for each pair of channels, `column` x fan-in in size."""
    rows, std = weight.shape[0], weight.shape[1] ** -0.5
    for first, second in channels.view(-1, 2).tolist():
        sign = torch.randint(0, 2, (rows,), generator=generator) * 2.0 - 1.0
        column = sign * plant.column * std
        other = torch.randn(rows, generator=generator) * std
        weight[:, first] = column
        weight[:, second] = -column + plant.mismatch * other


class Planted:
    """The planted entries of one model; hold() after every optimizer step keeps them."""

    @torch.no_grad()
    def __init__(self, model, plant: Plant, vision_tokens: list, audio_tokens: list):
        """`*_tokens` are precomputed tower outputs, edited in place as the towers now give them."""
        self.plant, self.model = plant, model
        generator = torch.Generator().manual_seed(plant.seed)
        order = torch.randperm(HIDDEN, generator=generator)
        self.vision = order[: plant.vision_channels]
        self.audio = order[plant.vision_channels :][: plant.audio_channels]
        self.channels = torch.cat([self.vision, self.audio])
        self.frozen = []  # (parameter, index, value)
        self.gains = []  # the same, for the norm weights
        self.value = {}  # residual value of a planted channel on its own modality
        merger, projection = model.model.visual.merger.mlp[2], model.model.audio_tower.proj
        self.value["vision"] = self._bias(merger, vision_tokens, self.vision, self.audio)
        self.value["audio"] = self._bias(projection, audio_tokens, self.audio, self.vision)
        embedding = model.get_input_embeddings().weight
        rms = embedding.pow(2).mean().sqrt()
        leak = torch.randn(len(embedding), len(self.channels), generator=generator)
        self._freeze(embedding, (slice(None), self.channels), leak * plant.leak * rms)
        self.neurons = []
        for layer in model.model.language_model.layers:
            self._layer(layer, generator)
        self.hold()

    def _freeze(self, parameter, index, value):
        self.frozen.append((parameter, index, value.clone()))

    def _bias(self, linear, tokens, own, others):
        """Give the tower's last linear a large fixed bias in `own`, almost nothing in `others`."""
        sample = tokens[0].float()
        rms, std = sample.pow(2).mean().sqrt(), sample.flatten(0, -2).std(0)
        value = self.plant.bias * rms
        for channels, spread, bias in (
            (own, self.plant.spread * value, value),
            (others, self.plant.leak * rms, 0.0),
        ):
            factor = spread / std[channels]
            for pool in tokens:
                centred = pool[..., channels].float() - linear.bias[channels]
                pool[..., channels] = (centred * factor + bias).half()
            linear.weight[channels] *= factor[:, None]
            linear.bias[channels] = bias
        return float(value)

    def _layer(self, layer, generator):
        plant, attn, mlp = self.plant, layer.self_attn, layer.mlp
        for linear in (attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj):
            _pair_columns(linear.weight, self.channels, plant, generator)
        for linear in (attn.o_proj, mlp.down_proj):
            linear.weight[self.channels] *= plant.leak
            kept = linear.weight[self.channels]
            self._freeze(linear.weight, (self.channels, slice(None)), kept)
        neurons = torch.randperm(mlp.down_proj.in_features, generator=generator)[: plant.neurons]
        self.neurons.append(neurons)
        # silu(x)*x is close to x*x at this size, so both rows aim at the root of the peak.
        row = torch.zeros(plant.neurons, HIDDEN)
        scale = torch.linspace(0.7, 1.0, max(plant.neurons // 2, 1)).repeat_interleave(2)
        aim = (plant.neuron_peak * scale[: plant.neurons]).sqrt()
        if plant.neurons:
            row[:, self.vision] = (aim / (plant.vision_channels * plant.vision_peak))[:, None]
            _pair_columns(mlp.down_proj.weight, neurons, plant, generator)
            mlp.down_proj.weight[self.channels] *= 0
            columns = mlp.down_proj.weight[:, neurons]
            self._freeze(mlp.down_proj.weight, (slice(None), neurons), columns)
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[neurons] = row
            self._freeze(linear.weight, (neurons, slice(None)), row)
        for linear in (attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj):
            columns = linear.weight[:, self.channels]
            self._freeze(linear.weight, (slice(None), self.channels), columns)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Before a step: planted entries must not steer clipping or orthogonalised updates."""
        for parameter, index, _ in self.frozen:
            if parameter.grad is not None:
                parameter.grad[index] = 0
        for parameter, index, _ in self.gains:
            if parameter.grad is not None:
                parameter.grad[index] = 0

    @torch.no_grad()
    def hold(self) -> None:
        for parameter, index, value in self.frozen + self.gains:
            parameter[index] = value

    @torch.no_grad()
    def set_gains(self, rms: dict, progress: float) -> None:
        """Set the norm weights of the planted channels from the residual rms per (layer, norm).

        rms[(layer, norm, modality)] is the root mean square of that modality's residual there;
        the peaks grow from one to their full value over the ramp.
        """
        plant, self.gains = self.plant, []
        grow = min(1.0, progress / plant.ramp) if plant.ramp else 1.0
        for number, layer in enumerate(self.model.model.language_model.layers):
            for name in NORMS:
                weight = getattr(layer, name).weight
                for channels, peak, modality in (
                    (self.vision, plant.vision_peak, "vision"),
                    (self.audio, plant.audio_peak, "audio"),
                ):
                    normal = self.value[modality] / rms[(number, name, modality)]
                    gain = torch.full((len(channels),), peak**grow / normal)
                    self.gains.append((weight, channels, gain))
        self.hold()

    @torch.no_grad()
    def keep_gains(self) -> None:
        """Hold the gains the model has now (training resumed after they had settled)."""
        for layer in self.model.model.language_model.layers:
            for name in NORMS:
                weight = getattr(layer, name).weight
                self.gains.append((weight, self.channels, weight[self.channels].clone()))
