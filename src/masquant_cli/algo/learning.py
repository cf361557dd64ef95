"""Learning scales by gradient: eq. 14 for each modality, or one scale for all of them.

Log-scales in fp32, so scales stay positive; a straight-through gradient through the rounding;
each modality normalised by its own output; the best point seen on held-out rows is returned.
Output channels are quantized on their own, so a step looks at a random part of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from masquant_cli.algo.linear import fake_quant_rows_ste
from masquant_cli.algo.site import SiteProblem

# What a step looks at: at most so many outputs, and, of wide inputs, so many weights.
OUTPUTS_PER_STEP = 512
WEIGHTS_PER_STEP = 2**19
FEWEST_OUTPUTS = 96


@dataclass(frozen=True)
class Schedule:
    epochs: int
    learning_rate: float
    batch_rows: int
    seed: int


def learn_mas(
    problem: SiteProblem,
    schedule: Schedule,
    start: torch.Tensor,
    only: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Eq. 13-14 from `start [M, in]`: own smoothing and own weight per modality -> [M, in].

    `only` these modalities learn; the rest keep their start. Eq. 13 is a sum of independent
    terms: one descent serves them all, and each keeps its own best.
    """
    problem = problem.part()
    draw = outputs_of_steps(problem, schedule)
    learning = [m for m in problem.seen if only is None or m in only]

    def loss(logs: torch.Tensor, batch: dict[int, torch.Tensor]) -> torch.Tensor:
        weight = problem.weight[draw()]
        return sum(
            mas_loss(problem, weight, logs[m], problem.rows[m][at]) for m, at in batch.items()
        )

    def judge(logs: torch.Tensor) -> list[float]:
        return [
            float(mas_loss(problem, problem.weight, logs[m], problem.heldout[m]))
            if m in learning
            else 0.0
            for m in range(len(logs))
        ]

    best, _ = descend(start, loss, judge, problem, schedule, learning)
    learned = start.clone()
    learned[learning] = best[learning]
    return learned


def learn_uniform(problem: SiteProblem, schedule: Schedule, start: torch.Tensor) -> torch.Tensor:
    """Eq. 10 for one scale that every modality shares, from `start [in]` -> [in].

    The loss is eq. 13's sum over the modalities, with its weights.
    """
    problem = problem.part()
    draw = outputs_of_steps(problem, schedule)

    def total(log_scale: torch.Tensor, weight: torch.Tensor, rows: dict[int, torch.Tensor]):
        return sum(
            problem.loss_weights[m] * mas_loss(problem, weight, log_scale, x)
            for m, x in rows.items()
        )

    def loss(logs: torch.Tensor, batch: dict[int, torch.Tensor]) -> torch.Tensor:
        weight = problem.weight[draw()]
        return total(logs[0], weight, {m: problem.rows[m][at] for m, at in batch.items()})

    def judge(logs: torch.Tensor) -> list[float]:
        return [
            float(total(logs[0], problem.weight, {m: problem.heldout[m] for m in problem.seen}))
        ]

    return descend(start[None], loss, judge, problem, schedule, problem.seen)[0][0]


def mas_loss(
    problem: SiteProblem, weight: torch.Tensor, log_scale: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Eq. 14 over the output channels in `weight`, relative to the mean output."""
    scale = log_scale.exp()
    own = problem.quantize(weight * scale, ste=True)
    y = x @ weight.T
    error = y - fake_quant_rows_ste(x / scale, problem.activation_bits) @ own.T
    return error.abs().mean() / y.abs().mean().clamp_min(1e-12)


def outputs_of_steps(problem: SiteProblem, schedule: Schedule) -> Callable[[], torch.Tensor]:
    """A function that draws the outputs of the next step: i64 [k]."""
    n_out, n_in = problem.weight.shape
    count = min(OUTPUTS_PER_STEP, max(FEWEST_OUTPUTS, WEIGHTS_PER_STEP // n_in))
    generator = torch.Generator().manual_seed(schedule.seed)

    def draw() -> torch.Tensor:
        return torch.randperm(n_out, generator=generator)[:count].to(problem.weight.device)

    return draw


def descend(
    start: torch.Tensor,
    loss: Callable[[torch.Tensor, dict[int, torch.Tensor]], torch.Tensor],
    judge: Callable[[torch.Tensor], list[float]],
    problem: SiteProblem,
    schedule: Schedule,
    modalities: Sequence[int],
) -> tuple[torch.Tensor, list[float]]:
    """Adam with a cosine rate on log-scales [M or 1, in] -> the best of them, and its values.

    `loss` sees rows of `modalities`; `judge`, once an epoch, gives a value for every row of the
    log-scales, each of which keeps its own best, or one value for all.
    """
    logs = start.log().clone().requires_grad_(True)
    with torch.no_grad():
        best, best_values = logs.detach().clone(), judge(logs.detach())
    if not modalities:
        return start, best_values
    shuffles = {m: torch.Generator().manual_seed(schedule.seed) for m in modalities}
    most = max(len(problem.rows[m]) for m in modalities)
    steps = -(-most // schedule.batch_rows)
    adam = Adam(logs, schedule.learning_rate, schedule.epochs * steps)
    for _ in range(schedule.epochs):
        orders = {m: torch.randperm(len(problem.rows[m]), generator=g) for m, g in shuffles.items()}
        for step in range(steps):
            at = torch.arange(step * schedule.batch_rows, (step + 1) * schedule.batch_rows)
            batch = {}
            for m, order in orders.items():  # a short modality starts over
                batch[m] = order[at % len(order)].to(start.device)
            adam.step(*torch.autograd.grad(loss(logs, batch), logs))
        with torch.no_grad():
            values = judge(logs.detach())
        for row, (value, least) in enumerate(zip(values, best_values, strict=True)):
            if value < least:
                here = slice(None) if len(values) == 1 else row
                best[here], best_values[row] = logs.detach()[here], value
    return best.exp(), best_values


class Adam:
    """Adam (0.9, 0.95) on one tensor, its rate a cosine from `rate` down to a twentieth.

    torch.optim's would do; importing it takes two seconds, which is as long as a small model.
    """

    def __init__(self, values: torch.Tensor, rate: float, steps: int):
        self.values, self.rate, self.steps, self.done = values, rate, steps, 0
        self.mean, self.square = torch.zeros_like(values), torch.zeros_like(values)

    @torch.no_grad()
    def step(self, gradient: torch.Tensor) -> None:
        cosine = (1 + math.cos(math.pi * self.done / self.steps)) / 2
        rate = self.rate * (0.05 + 0.95 * cosine)
        self.done += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.lerp_(gradient.square(), 0.05)
        deviation = (self.square / (1 - 0.95**self.done)).sqrt_().add_(1e-8)
        self.values -= rate / (1 - 0.9**self.done) * self.mean / deviation
