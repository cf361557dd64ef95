"""MASQuant as its authors' released code learns it: the error of the whole decoder layer, divided
by all tokens, with vision at half weight; AdamW on the scales themselves, two epochs of one
sample a step, no held-out choice; down_proj neither smoothed nor corrected; rank at least 32.

Reads smoothing.samples (theirs: 128). Not repeated: scales in bf16, and a scale per linear, which
the checkpoint has no place for: linears that read one input share theirs.
"""

import torch

from masquant_cli.algo.block import layer_error
from masquant_cli.algo.site import Learned, eq12, judged
from masquant_cli.methods.method import Layer, Method

VISION, OTHERS = 0.5, 1.0  # lambda
EPOCHS, LEARNING_RATE = 2, 0.05
SMALLEST = 1e-2  # magnitude of a scale
PLAIN = "mlp_out"


def solve(layer: Layer) -> dict[str, Learned]:
    scales = {kind: eq12(site) for kind, site in layer.sites.items()}
    plain = {k: torch.ones_like(scales.pop(k)) for k in list(scales) if k.startswith(PLAIN)}
    weights = [VISION if name in ("vision", "video") else OTHERS for name in layer.modalities]
    block = layer.block()
    learned = {kind: scale.clone().requires_grad_(True) for kind, scale in scales.items()}
    optimizer = torch.optim.AdamW(learned.values(), lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(EPOCHS):
        for index in range(len(block)):
            with torch.no_grad():
                for scale in learned.values():
                    sign = torch.where(scale < 0, -1.0, 1.0)
                    scale.copy_(sign * scale.abs().clamp_min(SMALLEST))
            optimizer.zero_grad()
            layer_error(block, index, {**learned, **plain}, weights, pooled=True).backward()
            optimizer.step()
    found = {kind: scale.detach().abs().clamp_min(SMALLEST) for kind, scale in learned.items()}
    return {
        kind: judged(site, {**found, **plain}[kind], "1" if kind in plain else "layer MAE")
        for kind, site in layer.sites.items()
    }


METHOD = Method(
    solve,
    reads=("samples",),
    needs=("block",),
    corrects=("attn_in", "attn_out", "mlp_in"),
    least_rank=32,
)
