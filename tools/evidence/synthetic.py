"""Linear layers whose inputs are known in distribution: how far apart the modalities' channel
ranges are (alpha) and how well conditioned their covariances are is chosen, not found.

A token of modality m is x = range_m * (F_m z), z ~ N(0, 1): F_m has rows of length one, so
channel i has standard deviation range_m[i] exactly, and alpha_i = range_m[i] / range_text[i].
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from masquant_cli.algo.theory import misalignment_db

IN, OUT = 512, 768
MODALITIES = ("text", "vision", "audio")
# Alpha over text as (lowest, highest, share of channels): log-uniform over the share, 1 elsewhere,
# in an order of each modality's own. Vision dominates, audio is on both sides of text. Aligned:
# one constant, which Theorem 1 says costs uniform smoothing nothing.
ALPHAS: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "aligned": {"vision": (16, 16, 1), "audio": (1 / 4, 1 / 4, 1)},
    "mild": {"vision": (1, 4, 1), "audio": (1 / 2, 2, 1)},
    "outliers": {"vision": (32, 128, 1 / 32), "audio": (8, 8, 1 / 64)},
    "wide": {"vision": (1, 256, 1), "audio": (1 / 16, 16, 1)},
}
# Exponent of the power law that F F.T's spectrum follows, and tokens to calibrate on.
CONDITIONINGS: Mapping[str, tuple[float, Mapping[str, int]]] = {
    "well": (0.0, {"text": 4096, "vision": 4096, "audio": 4096}),
    "ill": (1.5, {"text": 4096, "vision": 4096, "audio": 192}),  # audio: fewer than channels
}
TEXT_SPREAD = 0.5  # standard deviation of the log of text's ranges
FRESH = 1024  # tokens per modality that no method sees


@dataclass(frozen=True)
class Layer:
    """weight [OUT, IN]; ranges, tokens and fresh by modality: [IN], [n, IN], [FRESH, IN]."""

    alpha: str
    conditioning: str
    weight: Tensor
    ranges: dict[str, Tensor]
    factors: dict[str, Tensor]
    tokens: dict[str, Tensor]
    fresh: dict[str, Tensor]

    @property
    def name(self) -> str:
        return f"{self.alpha}-{self.conditioning}"


def make(alpha: str, conditioning: str, seed: int = 0) -> Layer:
    """One layer; the same seed gives the same weight and directions in every cell."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator) / math.sqrt(IN)
    text = torch.exp(TEXT_SPREAD * torch.randn(IN, generator=generator))
    exponent, counts = CONDITIONINGS[conditioning]
    ranges, factors, tokens, fresh = {}, {}, {}, {}
    for name in MODALITIES:
        order = torch.randperm(IN, generator=generator)
        ranges[name] = text * ratios(*ALPHAS[alpha].get(name, (1, 1, 1)))[order]
        factors[name] = _factor(exponent, generator)
        for into, n in ((tokens, counts[name]), (fresh, FRESH)):
            z = torch.randn(n, IN, generator=generator)
            into[name] = z @ factors[name].T * ranges[name]
    return Layer(alpha, conditioning, weight, ranges, factors, tokens, fresh)


def ratios(low: float, high: float, share: float) -> Tensor:
    """[IN]: the first `share` from `low` to `high`, both included, evenly in log; the rest 1."""
    found = torch.ones(IN)
    count = round(share * IN)
    found[:count] = torch.exp(torch.linspace(math.log(low), math.log(high), count))
    return found


def _factor(exponent: float, generator: torch.Generator) -> Tensor:
    """F [IN, IN] with rows of length one, F F.T having eigenvalues of about k^-exponent."""
    if exponent == 0:
        return torch.eye(IN)
    q = torch.linalg.qr(torch.randn(IN, IN, generator=generator)).Q
    values = torch.arange(1, IN + 1).float() ** (-exponent / 2)
    factor = q * values
    return factor / factor.norm(dim=1, keepdim=True)


def theorem1_loss_db(alpha: Tensor) -> float:
    """What Theorem 1 says uniform smoothing costs the weaker modality: eq. 17's last term, in dB,
    at least 0, for alpha [IN] of the dominant over the weaker. Exact for equal |x| / range."""
    return 0.0 - misalignment_db(alpha)  # 0 and not -0 where nothing is lost
