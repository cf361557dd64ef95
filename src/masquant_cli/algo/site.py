"""One site as a problem: what its smoothing depends on, and the error that a choice makes.

With R_m = Y_m - (X_m / s_m) Q(W s_0).T the correction of modality m is R_m V V.T, since
(X_m / s_m)(W s_m).T = Y_m; so neither the residual weight nor its factors are ever formed here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from masquant_cli.algo.linear import fake_quant_rows, fake_quant_weight, fake_quant_weight_ste
from masquant_cli.algo.low_rank import top_right_subspace
from masquant_cli.algo.smoothing import closed_form_scale

# A part of a site: so many weights, but no fewer outputs than these, nor than 8 for a column of
# the correction, which would repair too much of fewer.
PART = 2**20
FEWEST_OUTPUTS = 768
CHUNK = 2**20  # weights that are rounded at a time: they stay in a cache


@dataclass(frozen=True)
class SiteProblem:
    """All that the smoothing of one site depends on.

    weight [out, in] fp32 (the site's linears stacked), rows and heldout: per modality [n, in],
    absmax and mean_abs [M, in], tokens per modality over all of the calibration data; modality 0
    is the base. `rank` is that of the correction, 0 for none. A modality may have no rows.
    """

    weight: torch.Tensor
    rows: tuple[torch.Tensor, ...]
    heldout: tuple[torch.Tensor, ...]
    absmax: torch.Tensor
    mean_abs: torch.Tensor
    tokens: tuple[int, ...]
    weight_bits: int
    group_size: int | None
    symmetric: bool
    activation_bits: int
    rank: int
    loss_weights: tuple[float, ...]
    whole_absmax_w: torch.Tensor | None = None  # [in], where this is a part of a site

    @cached_property
    def absmax_w(self) -> torch.Tensor:
        """Largest |weight| [in] over the outputs: of the whole site."""
        if self.whole_absmax_w is not None:
            return self.whole_absmax_w
        return torch.maximum(self.weight.amax(0), -self.weight.amin(0))

    @cached_property
    def targets(self) -> "Outputs":
        """Float outputs [n, out] of `rows`: what every candidate is measured against."""
        return Outputs(self.weight, self.rows)

    @cached_property
    def heldout_targets(self) -> "Outputs":
        return Outputs(self.weight, self.heldout)

    @property
    def seen(self) -> tuple[int, ...]:
        """The modalities that have rows."""
        return tuple(m for m, x in enumerate(self.rows) if len(x))

    def some_outputs(self) -> torch.Tensor:
        """Outputs that stand for all, drawn at random, in order, i64 [k]; of small sites all."""
        n_out, n_in = self.weight.shape
        count = max(PART // n_in, FEWEST_OUTPUTS, 8 * self.rank)
        if 2 * count > n_out:
            return torch.arange(n_out, device=self.weight.device)
        drawn = torch.randperm(n_out, generator=torch.Generator().manual_seed(0))[:count]
        return drawn.sort().values.to(self.weight.device)

    def part(self) -> "SiteProblem":
        """The same problem for `some_outputs` alone: outputs share nothing but the scales, so a
        choice that is good for some is good for all, as with rows."""
        outputs = self.some_outputs()
        if self.whole_absmax_w is not None or len(outputs) == len(self.weight):
            return self
        return replace(self, weight=self.weight[outputs], whole_absmax_w=self.absmax_w)

    def quantize(self, weight: torch.Tensor, *, ste: bool = False) -> torch.Tensor:
        quant = fake_quant_weight_ste if ste else fake_quant_weight
        return quant(weight, self.weight_bits, self.group_size, self.symmetric)

    def smoothed(self, scale: torch.Tensor) -> torch.Tensor:
        """Q(W s) [out, in] for `scale [in]`, in no more memory than its own."""
        found = torch.empty_like(self.weight)
        size = max(1, CHUNK // self.weight.shape[1])
        for w, q in zip(self.weight.split(size), found.split(size), strict=True):
            q.copy_(self.quantize(w * scale))
        return found


class Outputs(Sequence):
    """x @ weight.T of each modality's rows x, made when it is first asked for."""

    def __init__(self, weight: torch.Tensor, rows: tuple[torch.Tensor, ...]):
        self.weight, self.rows = weight, rows
        self.made: dict[int, torch.Tensor] = {}

    def __getitem__(self, m: int) -> torch.Tensor:
        if m not in self.made:
            self.made[m] = self.rows[m] @ self.weight.T
        return self.made[m]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Learned:
    """scale [M, in]; error: held-out noise power over signal power, per modality; its origin."""

    scale: torch.Tensor
    error: tuple[float | None, ...]
    origin: str


def eq12(problem: SiteProblem, beta: float = 0.5) -> torch.Tensor:
    """Each modality's own closed form, eq. 12: [M, in]."""
    return torch.stack([closed_form_scale(a, problem.absmax_w, beta) for a in problem.absmax])


def heldout_error(problem: SiteProblem, scale: torch.Tensor) -> tuple[float, ...]:
    """Noise over signal of eq. 29 on held-out rows, the correction found on the other rows."""
    base = problem.smoothed(scale[0])
    return tuple(modality_error(problem, m, base, s)[0] for m, s in enumerate(scale))


def base_error(problem: SiteProblem, base: torch.Tensor, scale: torch.Tensor) -> float:
    """Weighted sum of the modalities' held-out errors with `base [out, in]` as their weight."""
    errors = (modality_error(problem, m, base, s)[0] for m, s in enumerate(scale))
    return sum(w * e for w, e in zip(problem.loss_weights, errors, strict=True))


def judged(problem: SiteProblem, scale: torch.Tensor, origin: str) -> Learned:
    """A method's answer with its held-out error; `scale [in]` is one for every modality."""
    scale = scale.expand_as(problem.absmax).contiguous()
    return Learned(scale, heldout_error(problem, scale), origin)


def modality_error(
    problem: SiteProblem,
    m: int,
    base: torch.Tensor,
    scale: torch.Tensor,
    start: torch.Tensor | None = None,
) -> tuple[float, torch.Tensor | None]:
    """Held-out relative noise power of modality m, and the subspace V [out, r] it used.

    0 and None for a modality without rows.
    """
    if not len(problem.heldout[m]):
        return 0.0, None
    y = problem.heldout_targets[m]
    smoothed = problem.heldout[m] / scale
    error = y - fake_quant_rows(smoothed, problem.activation_bits) @ base.T
    v = None
    if m > 0 and problem.rank > 0:
        residual = problem.targets[m] - (problem.rows[m] / scale) @ base.T
        v = top_right_subspace(residual, problem.rank, start)
        error = error - (y - smoothed @ base.T) @ v @ v.T
    return float(error.square().sum() / y.square().sum().clamp_min(1e-30)), v
