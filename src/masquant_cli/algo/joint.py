"""Smoothing chosen for eq. 29 itself, which is what runs: one shared base weight, activation
quantization and the rank-r correction in the loop, from several simple starts.
"""

from collections.abc import Sequence

import torch

from masquant_cli.algo.learning import Schedule, descend
from masquant_cli.algo.linear import fake_quant_rows_ste
from masquant_cli.algo.site import Learned, SiteProblem, heldout_error, modality_error
from masquant_cli.algo.smoothing import align, closed_form_scale, uniform_absmax


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
                e, subspaces[m] = modality_error(problem, m, base, s, subspaces[m])
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

    best, _ = descend(scale, loss, judge, problem, schedule)
    found = heldout_error(problem, best)
    if _criterion(problem, found) < _criterion(problem, error):
        return Learned(best, found, f"{origin}, then learned")
    return Learned(scale, error, origin)


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
    scales, errors = [base_scale], [modality_error(problem, 0, base, base_scale)[0]]
    origins = [name]
    for m in range(1, len(mas)):
        starts = _modality_starts(problem, mas, base_scale, m)
        tried = {
            label: (modality_error(problem, m, base, scale)[0], scale)
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
