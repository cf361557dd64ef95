"""Smoothing chosen for eq. 29 itself, which is what runs: one shared base weight, activation
quantization and the rank-r correction in the loop, from several simple starts.
"""

from collections.abc import Sequence

import torch

from masquant_cli.algo.learning import Schedule, descend, outputs_of_steps
from masquant_cli.algo.linear import fake_quant_rows_ste
from masquant_cli.algo.site import Learned, SiteProblem, judged, modality_error
from masquant_cli.algo.smoothing import align, closed_form_scale, uniform_absmax

# Choices of a modality that a shared scale is judged by: what is near it, and what is its own.
FEW = ("base", "eq. 12", "eq. 14", "aligned eq. 14")


def learn_joint(problem: SiteProblem, schedule: Schedule, mas: torch.Tensor) -> Learned:
    """Smoothing chosen knowing the bits and the rank. `mas [M, in]` holds eq. 14's answer.

    Never worse on held-out rows (and, of a large site, on the part of its outputs that is looked
    at), by `_criterion`, than uniform smoothing, the base's scale for everyone, aligned scales or
    the paper's own choice: those are its starts.
    """
    part = problem.part()
    scale, error, origin = _best_start(part, mas)
    if schedule.epochs:
        best, value = _learn(part, schedule, scale)
        if value < _criterion(part, error):
            scale, origin = best, f"{origin}, then learned"
    return judged(problem, scale, origin)


def _learn(
    problem: SiteProblem, schedule: Schedule, start: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Descent from `start [M, in]` -> the best scales, and their criterion.

    A step sees some outputs O. The correction that they get, R V V_O.T, needs R of all outputs; but
    R V = Y V - (X / s_m) Q(W s_0).T V, and (Q(W s_0) / s_0).T V [in, r] hardly moves: it is held
    as `seen` from one judgement to the next, as is V.
    """
    draw = outputs_of_steps(problem, schedule)
    subspaces: list[torch.Tensor | None] = [None] * len(start)
    seen: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(start)

    def judge(logs: torch.Tensor) -> list[float]:
        """The criterion; refreshing each modality's V on the way, once an epoch."""
        now, errors = logs.exp(), []
        base = problem.smoothed(now[0])
        for m, s in enumerate(now):
            e, v = modality_error(problem, m, base, s, subspaces[m])
            errors.append(e)
            subspaces[m] = v
            seen[m] = None if v is None else (problem.targets[m] @ v, base.T @ v / now[0][:, None])
        return [_criterion(problem, errors)]

    def loss(logs: torch.Tensor, batch: dict[int, torch.Tensor]) -> torch.Tensor:
        outputs, scale = draw(), logs.exp()
        base = problem.quantize(problem.weight[outputs] * scale[0], ste=True)
        total = logs.new_zeros(())
        for m, at in batch.items():
            y = problem.targets[m][at][:, outputs]
            smoothed = problem.rows[m][at] / scale[m]
            error = y - fake_quant_rows_ste(smoothed, problem.activation_bits) @ base.T
            if seen[m] is not None:
                target, image = seen[m]
                left = target[at] - (smoothed * scale[0]) @ image
                error = error - left @ subspaces[m][outputs].T
            share = problem.loss_weights[m] / y.abs().mean().clamp_min(1e-12)
            total = total + share * error.abs().mean()
        return total

    best, values = descend(start, loss, judge, problem, schedule, problem.seen)
    return best, values[0]


def _criterion(problem: SiteProblem, errors: Sequence[float]) -> float:
    """Weighted sum of relative noise powers: dominated by the worst modality, yet smooth."""
    return sum(w * e for w, e in zip(problem.loss_weights, errors, strict=True))


def _bases(problem: SiteProblem, mas: torch.Tensor) -> dict[str, torch.Tensor]:
    """Candidates for the shared scale: the base modality's own, uniform, and half way."""
    uniform = closed_form_scale(uniform_absmax(problem.absmax), problem.absmax_w)
    own = closed_form_scale(problem.absmax[0], problem.absmax_w)
    found = {"base's own": mas[0], "base's eq. 12": own}
    if len(problem.rows) > 1:
        found |= {"uniform": uniform, "half uniform": (own * uniform).sqrt()}
    if torch.equal(own, mas[0]):
        del found["base's own"]
    return found


def _best_start(
    problem: SiteProblem, mas: torch.Tensor
) -> tuple[torch.Tensor, tuple[float, ...], str]:
    """The best of the simple choices: a shared scale, and a scale for every other modality.

    Shared scales are first compared with few choices each; only the best two see them all.
    """
    found = [_Base(problem, mas, scale, name) for name, scale in _bases(problem, mas).items()]
    answers = sorted(
        ((base.best(few=True), base) for base in found),
        key=lambda answer: _criterion(problem, answer[0][1]),
    )
    if len(problem.rows) == 1:
        return answers[0][0]
    return min(
        (base.best(few=False) for _, base in answers[:2]),
        key=lambda answer: _criterion(problem, answer[1]),
    )


class _Base:
    """A shared scale, its rounded weight, and what the other modalities' choices make of it."""

    def __init__(self, problem: SiteProblem, mas: torch.Tensor, scale: torch.Tensor, name: str):
        self.problem, self.mas, self.scale, self.name = problem, mas, scale, name
        self.weight = problem.smoothed(scale)
        self.tried: dict[tuple[int, str], float] = {}

    def best(self, *, few: bool) -> tuple[torch.Tensor, tuple[float, ...], str]:
        """(scale [M, in], held-out error of each modality, where they come from)"""
        scales, errors, origins = [self.scale], [self._error(0, self.name, self.scale)], [self.name]
        for m in range(1, len(self.problem.rows)):
            starts = _modality_starts(self.problem, self.mas, self.scale, m)
            labels = FEW if few else tuple(starts)
            label = min(labels, key=lambda key: self._error(m, key, starts[key]))
            errors.append(self._error(m, label, starts[label]))
            scales.append(starts[label])
            origins.append(label)
        return torch.stack(scales), tuple(errors), " | ".join(origins)

    def _error(self, m: int, label: str, scale: torch.Tensor) -> float:
        if (m, label) not in self.tried:
            self.tried[m, label] = modality_error(self.problem, m, self.weight, scale)[0]
        return self.tried[m, label]


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
