"""Learning the smoothing scales of one site: the paper's way and a better one.

`learn_mas` is eq. 13-14: every modality is smoothed for a weight of its own. `learn_joint`
minimises the error of eq. 29 itself, which is what runs: one shared base weight, activation
quantization and the rank-r correction in the loop. Both optimise log-scales in fp32, so scales
stay positive, round with a straight-through gradient, normalise each modality by its own output,
and return the best point seen on held-out rows.

With R_m = Y_m - (X_m / s_m) Q(W s_0).T the correction of modality m is R_m V V.T, since
(X_m / s_m)(W s_m).T = Y_m; so neither the residual weight nor its factors are ever formed here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from masquant_cli.algo.linear import (
    fake_quant_rows,
    fake_quant_rows_ste,
    fake_quant_weight,
    fake_quant_weight_ste,
)
from masquant_cli.algo.low_rank import top_right_subspace
from masquant_cli.algo.smoothing import align, closed_form_scale, uniform_absmax

OUTPUTS_PER_STEP = 512


@dataclass(frozen=True)
class SiteProblem:
    """All that the smoothing of one site depends on.

    weight [out, in] fp32 (the site's linears stacked), rows and heldout: per modality [n, in],
    absmax [M, in]; modality 0 is the base. `rank` is that of the correction, 0 for none.
    """

    weight: torch.Tensor
    rows: tuple[torch.Tensor, ...]
    heldout: tuple[torch.Tensor, ...]
    absmax: torch.Tensor
    weight_bits: int
    group_size: int | None
    symmetric: bool
    activation_bits: int
    rank: int
    loss_weights: tuple[float, ...]

    @cached_property
    def absmax_w(self) -> torch.Tensor:
        return self.weight.abs().amax(0)

    @cached_property
    def targets(self) -> tuple[torch.Tensor, ...]:
        """Float outputs [n, out] of `rows`: what every candidate is measured against."""
        return tuple(x @ self.weight.T for x in self.rows)

    @cached_property
    def heldout_targets(self) -> tuple[torch.Tensor, ...]:
        return tuple(x @ self.weight.T for x in self.heldout)

    def quantize(self, weight: torch.Tensor, *, ste: bool = False) -> torch.Tensor:
        quant = fake_quant_weight_ste if ste else fake_quant_weight
        return quant(weight, self.weight_bits, self.group_size, self.symmetric)


@dataclass(frozen=True)
class Schedule:
    epochs: int
    learning_rate: float
    batch_rows: int
    seed: int


@dataclass(frozen=True)
class Learned:
    """scale [M, in]; error: held-out noise power over signal power, per modality; its origin."""

    scale: torch.Tensor
    error: tuple[float, ...]
    origin: str


def eq12(problem: SiteProblem, beta: float = 0.5) -> torch.Tensor:
    """Each modality's own closed form, eq. 12: [M, in]."""
    return torch.stack([closed_form_scale(a, problem.absmax_w, beta) for a in problem.absmax])


def heldout_error(problem: SiteProblem, scale: torch.Tensor) -> tuple[float, ...]:
    """Noise over signal of eq. 29 on held-out rows, the correction found on the other rows."""
    base = problem.quantize(problem.weight * scale[0])
    return tuple(_modality_error(problem, m, base, s)[0] for m, s in enumerate(scale))


def learn_mas(problem: SiteProblem, schedule: Schedule, start: torch.Tensor) -> torch.Tensor:
    """Eq. 13-14 from `start [M, in]`: own smoothing and own weight per modality -> [M, in].

    Output channels are quantized on their own, so every step may look at a random part of them.
    """
    generator = torch.Generator().manual_seed(schedule.seed)
    n_out = problem.weight.shape[0]

    def loss(logs: torch.Tensor, batch: dict[int, torch.Tensor]) -> torch.Tensor:
        part = torch.randperm(n_out, generator=generator)[:OUTPUTS_PER_STEP]
        weight = problem.weight[part.to(problem.weight.device)]
        return sum(
            _mas_loss(problem, weight, logs[m], problem.rows[m][at]) for m, at in batch.items()
        )

    learned = []
    for m in range(len(start)):  # eq. 13 is a sum of independent terms, so each keeps its best

        def judge(logs: torch.Tensor, m: int = m) -> float:
            with torch.no_grad():
                return float(_mas_loss(problem, problem.weight, logs[m], problem.heldout[m]))

        best, _ = _descend(start, loss, judge, problem, schedule, only=(m,))
        learned.append(best[m])
    return torch.stack(learned)


def learn_joint(problem: SiteProblem, schedule: Schedule, mas: torch.Tensor) -> Learned:
    """Smoothing chosen knowing the bits and the rank. `mas [M, in]` holds eq. 14's answer.

    Never worse on held-out rows, by `_criterion`, than uniform smoothing, the base's scale for
    everyone, aligned scales or the paper's own choice: those are its starts.
    """
    scale, error, origin = _best_start(problem, mas)
    if schedule.epochs == 0:
        return Learned(scale, error, origin)
    subspaces: list[torch.Tensor | None] = [None] * len(scale)

    def judge(logs: torch.Tensor) -> float:
        """The criterion; refreshing each modality's V on the way, once an epoch."""
        with torch.no_grad():
            now = logs.exp()
            base = problem.quantize(problem.weight * now[0])
            errors = []
            for m, s in enumerate(now):
                e, subspaces[m] = _modality_error(problem, m, base, s, subspaces[m])
                errors.append(e)
            return _criterion(problem, errors)

    def loss(logs: torch.Tensor, batch: dict[int, torch.Tensor]) -> torch.Tensor:
        base = problem.quantize(problem.weight * logs[0].exp(), ste=True)
        total = 0.0
        for m, at in batch.items():
            y = problem.targets[m][at]
            smoothed = problem.rows[m][at] / logs[m].exp()
            error = y - fake_quant_rows_ste(smoothed, problem.activation_bits) @ base.T
            v = subspaces[m]
            if v is not None:
                error = error - (y - smoothed @ base.T) @ v @ v.T
            share = problem.loss_weights[m] / y.abs().mean().clamp_min(1e-12)
            total = total + share * error.abs().mean()
        return total

    best, _ = _descend(scale, loss, judge, problem, schedule)
    found = heldout_error(problem, best)
    if _criterion(problem, found) < _criterion(problem, error):
        return Learned(best, found, f"{origin}, then learned")
    return Learned(scale, error, origin)


def _mas_loss(
    problem: SiteProblem, weight: torch.Tensor, log_scale: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Eq. 14 over the output channels in `weight`, relative to the mean output."""
    scale = log_scale.exp()
    own = problem.quantize(weight * scale, ste=True)
    y = x @ weight.T
    error = y - fake_quant_rows_ste(x / scale, problem.activation_bits) @ own.T
    return error.abs().mean() / y.abs().mean().clamp_min(1e-12)


def _criterion(problem: SiteProblem, errors: Sequence[float]) -> float:
    """Weighted sum of relative noise powers: dominated by the worst modality, yet smooth."""
    return sum(w * e for w, e in zip(problem.loss_weights, errors, strict=True))


def _bases(problem: SiteProblem, mas: torch.Tensor) -> dict[str, torch.Tensor]:
    """Candidates for the shared scale: the base modality's own, uniform, and half way."""
    uniform = closed_form_scale(uniform_absmax(problem.absmax), problem.absmax_w)
    own = closed_form_scale(problem.absmax[0], problem.absmax_w)
    found = {"base's eq. 12": own, "uniform": uniform, "half uniform": (own * uniform).sqrt()}
    return found if torch.equal(own, mas[0]) else {"base's own": mas[0], **found}


def _best_start(
    problem: SiteProblem, mas: torch.Tensor
) -> tuple[torch.Tensor, tuple[float, ...], str]:
    """The best of the simple choices: a shared scale, and a scale for every other modality.

    Shared scales are first compared with few choices each; only the best two see them all.
    """
    found = [
        (*_best_for_base(problem, mas, base, name, few=True), base, name)
        for name, base in _bases(problem, mas).items()
    ]
    found.sort(key=lambda f: _criterion(problem, f[1]))
    finalists = (
        _best_for_base(problem, mas, base, name, few=False) for *_, base, name in found[:2]
    )
    return min(finalists, key=lambda f: _criterion(problem, f[1]))


def _best_for_base(
    problem: SiteProblem, mas: torch.Tensor, base_scale: torch.Tensor, name: str, *, few: bool
) -> tuple[torch.Tensor, tuple[float, ...], str]:
    base = problem.quantize(problem.weight * base_scale)
    scales, errors = [base_scale], [_modality_error(problem, 0, base, base_scale)[0]]
    origins = [name]
    for m in range(1, len(mas)):
        starts = _modality_starts(problem, mas, base_scale, m)
        tried = {
            label: (_modality_error(problem, m, base, scale)[0], scale)
            for label, scale in starts.items()
            if not few or label in ("base", "eq. 14", "aligned eq. 14")
        }
        label = min(tried, key=lambda key: tried[key][0])
        errors.append(tried[label][0])
        scales.append(tried[label][1])
        origins.append(label)
    return torch.stack(scales), tuple(errors), " | ".join(origins)


def _modality_starts(
    problem: SiteProblem, mas: torch.Tensor, base: torch.Tensor, m: int
) -> dict[str, torch.Tensor]:
    own = closed_form_scale(problem.absmax[m], problem.absmax_w)
    flat = closed_form_scale(problem.absmax[m], torch.ones_like(own), beta=1.0)
    uniform = closed_form_scale(uniform_absmax(problem.absmax), problem.absmax_w)
    energy = problem.rows[m].square().mean(0) * problem.weight.square().sum(0)
    near = {
        "aligned eq. 12": align(own, base, energy),
        "aligned eq. 14": align(mas[m], base, energy),
        "aligned flat": align(flat, base, energy),
        "aligned uniform": align(uniform, base, energy),
    }
    halves = {f"half {k}": (v * base).sqrt() for k, v in near.items() if k != "aligned uniform"}
    return {"base": base, "eq. 12": own, "eq. 14": mas[m], **near, **halves}


def _modality_error(
    problem: SiteProblem,
    m: int,
    base: torch.Tensor,
    scale: torch.Tensor,
    start: torch.Tensor | None = None,
) -> tuple[float, torch.Tensor | None]:
    """Held-out relative noise power of modality m, and the subspace V [out, r] it used."""
    y = problem.heldout_targets[m]
    smoothed = problem.heldout[m] / scale
    error = y - fake_quant_rows(smoothed, problem.activation_bits) @ base.T
    v = None
    if m > 0 and problem.rank > 0:
        residual = problem.targets[m] - (problem.rows[m] / scale) @ base.T
        v = top_right_subspace(residual, problem.rank, start)
        error = error - (y - smoothed @ base.T) @ v @ v.T
    return float(error.square().sum() / y.square().sum().clamp_min(1e-30)), v


def _descend(
    start: torch.Tensor,
    loss: Callable[[torch.Tensor, dict[int, torch.Tensor]], torch.Tensor],
    judge: Callable[[torch.Tensor], float],
    problem: SiteProblem,
    schedule: Schedule,
    only: tuple[int, ...] | None = None,
) -> tuple[torch.Tensor, float]:
    """Adam with a cosine rate on log-scales [M, in]; the best point by `judge`, once an epoch."""
    modalities = only or tuple(range(len(start)))
    logs = start.log().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([logs], lr=schedule.learning_rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(schedule.seed)
    most = max(len(problem.rows[m]) for m in modalities)
    steps = -(-most // schedule.batch_rows)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, schedule.epochs * steps, eta_min=0.05 * schedule.learning_rate
    )
    best, best_value = logs.detach().clone(), judge(logs.detach())
    for _ in range(schedule.epochs):
        orders = {m: torch.randperm(len(problem.rows[m]), generator=generator) for m in modalities}
        for step in range(steps):
            at = torch.arange(step * schedule.batch_rows, (step + 1) * schedule.batch_rows)
            batch = {}
            for m, order in orders.items():  # a short modality starts over
                batch[m] = order[at % len(order)].to(start.device)
            optimizer.zero_grad()
            loss(logs, batch).backward()
            optimizer.step()
            cosine.step()
        value = judge(logs.detach())
        if value < best_value:
            best, best_value = logs.detach().clone(), value
    return best.exp(), best_value
