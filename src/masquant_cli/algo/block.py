"""Learning the scales of a whole decoder layer at once, from the error of the layer's output.

Every linear runs in the form of eq. 21: each modality with its own scales and its own quantized
weight. A scale of one row [1, in] is shared by all modalities.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from masquant_cli.algo.linear import fake_quant_rows_ste

Scales = dict[str, torch.Tensor]  # by site key: [M or 1, in]


class Block(Protocol):
    """A decoder layer of the float model with the inputs that calibration samples give it."""

    def __len__(self) -> int:
        """How many samples there are."""

    def sample(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(float output [T, H], ids [T]: each token's modality, -1 for padding)."""

    def run(self, index: int, scales: Scales) -> torch.Tensor:
        """Output [T, H] with every site in `scales` quantized, differentiable in them."""


def modality_linear(
    x: torch.Tensor,
    ids: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    quantize: Callable[[torch.Tensor], torch.Tensor],
    activation_bits: int,
) -> torch.Tensor:
    """Eq. 21, differentiable in `scale`: x [T, in], ids [T], weight [out, in], scale [M or 1, in]
    -> [T, out]. `quantize` is a weight's round trip with a straight-through gradient.
    """
    if len(scale) == 1:
        return fake_quant_rows_ste(x / scale[0], activation_bits) @ quantize(weight * scale[0]).T
    y = x.new_zeros(*x.shape[:-1], weight.shape[0])
    for m, s in enumerate(scale):
        here = ids == m
        if m == 0:
            here = here | (ids < 0)  # padding has to go somewhere
        if bool(here.any()):
            y[here] = fake_quant_rows_ste(x[here] / s, activation_bits) @ quantize(weight * s).T
    return y


def layer_error(
    block: Block, index: int, scales: Scales, weights: Sequence[float], *, pooled: bool
) -> torch.Tensor:
    """Weighted MAE of one sample's output over its modalities.

    `pooled` divides the sum by all tokens, so a modality counts by its length; otherwise each
    modality is a mean of its own, relative to its mean output (eq. 13).
    """
    target, ids = block.sample(index)
    error = (block.run(index, scales) - target).float().abs().mean(-1)
    total = error.new_zeros(())
    for m, weight in enumerate(weights):
        here = ids == m
        if weight and bool(here.any()):
            share = error[here].sum() / (ids >= 0).sum() if pooled else error[here].mean()
            scale = 1.0 if pooled else target[here].float().abs().mean().clamp_min(1e-12)
            total = total + weight * share / scale
    return total


def learn_block(
    block: Block,
    start: Scales,
    weights: Sequence[float],
    *,
    epochs: int,
    learning_rate: float,
    heldout: float,
    seed: int,
) -> Scales:
    """Adam with a cosine rate on log-scales, one sample a step; the best epoch on held-out
    samples, which may be the start."""
    judged, learned = _split(block, heldout)
    logs = {kind: scale.log().clone().requires_grad_(True) for kind, scale in start.items()}
    optimizer = torch.optim.Adam(logs.values(), lr=learning_rate, betas=(0.9, 0.95))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * len(learned), eta_min=0.05 * learning_rate
    )
    generator = torch.Generator().manual_seed(seed)

    def judge() -> tuple[float, Scales]:
        with torch.no_grad():
            now = {kind: log.exp() for kind, log in logs.items()}
            errors = (layer_error(block, i, now, weights, pooled=False) for i in judged)
            return float(sum(errors)), now

    best, found = judge()
    for _ in range(epochs):
        for at in torch.randperm(len(learned), generator=generator).tolist():
            now = {kind: log.exp() for kind, log in logs.items()}
            error = layer_error(block, learned[at], now, weights, pooled=False)
            if error.requires_grad:  # no modality of this sample counts otherwise
                optimizer.zero_grad()
                error.backward()
                optimizer.step()
                cosine.step()
        value, now = judge()
        if value < best:
            best, found = value, now
    return found


def _split(block: Block, heldout: float) -> tuple[list[int], list[int]]:
    """(samples that judge, samples that teach): of each mix of modalities a share judges."""
    mixes: dict[frozenset[int], list[int]] = {}
    for index in range(len(block)):
        ids = block.sample(index)[1]
        mixes.setdefault(frozenset(ids[ids >= 0].tolist()), []).append(index)
    judged = [i for mix in mixes.values() for i in mix[: max(1, int(heldout * len(mix)))]]
    learned = [i for i in range(len(block)) if i not in set(judged)]
    return judged, learned or judged
