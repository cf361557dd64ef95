"""Learning scales by gradient: eq. 14 for each modality, or one scale for all of them.

Log-scales in fp32, so scales stay positive; a straight-through gradient through the rounding;
each modality normalised by its own output; the best point seen on held-out rows is returned.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from masquant_cli.algo.linear import fake_quant_rows_ste
from masquant_cli.algo.site import SiteProblem

OUTPUTS_PER_STEP = 512


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

    `only` these modalities learn; the rest keep their start. Output channels are quantized on
    their own, so every step may look at a random part of them.
    """
    generator = torch.Generator().manual_seed(schedule.seed)
    n_out = problem.weight.shape[0]

    def loss(logs: torch.Tensor, batch: dict[int, torch.Tensor]) -> torch.Tensor:
        part = torch.randperm(n_out, generator=generator)[:OUTPUTS_PER_STEP]
        weight = problem.weight[part.to(problem.weight.device)]
        return sum(
            mas_loss(problem, weight, logs[m], problem.rows[m][at]) for m, at in batch.items()
        )

    learned = start.clone()
    for m in only or range(
        len(start)
    ):  # eq. 13 is a sum of independent terms, so each keeps its best

        def judge(logs: torch.Tensor, m: int = m) -> float:
            with torch.no_grad():
                return float(mas_loss(problem, problem.weight, logs[m], problem.heldout[m]))

        best, _ = descend(start, loss, judge, problem, schedule, only=(m,))
        learned[m] = best[m]
    return learned


def learn_uniform(problem: SiteProblem, schedule: Schedule, start: torch.Tensor) -> torch.Tensor:
    """Eq. 10 for one scale that every modality shares, from `start [in]` -> [in].

    The loss is eq. 13's sum over the modalities, with its weights.
    """
    generator = torch.Generator().manual_seed(schedule.seed)
    n_out = problem.weight.shape[0]

    def total(log_scale: torch.Tensor, weight: torch.Tensor, rows: dict[int, torch.Tensor]):
        return sum(
            problem.loss_weights[m] * mas_loss(problem, weight, log_scale, x)
            for m, x in rows.items()
        )

    def loss(logs: torch.Tensor, batch: dict[int, torch.Tensor]) -> torch.Tensor:
        part = torch.randperm(n_out, generator=generator)[:OUTPUTS_PER_STEP]
        weight = problem.weight[part.to(problem.weight.device)]
        return total(logs[0], weight, {m: problem.rows[m][at] for m, at in batch.items()})

    def judge(logs: torch.Tensor) -> float:
        with torch.no_grad():
            return float(total(logs[0], problem.weight, dict(enumerate(problem.heldout))))

    best, _ = descend(start[None], loss, judge, problem, schedule)
    return best[0]


def mas_loss(
    problem: SiteProblem, weight: torch.Tensor, log_scale: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Eq. 14 over the output channels in `weight`, relative to the mean output."""
    scale = log_scale.exp()
    own = problem.quantize(weight * scale, ste=True)
    y = x @ weight.T
    error = y - fake_quant_rows_ste(x / scale, problem.activation_bits) @ own.T
    return error.abs().mean() / y.abs().mean().clamp_min(1e-12)


def descend(
    start: torch.Tensor,
    loss: Callable[[torch.Tensor, dict[int, torch.Tensor]], torch.Tensor],
    judge: Callable[[torch.Tensor], float],
    problem: SiteProblem,
    schedule: Schedule,
    only: tuple[int, ...] | None = None,
) -> tuple[torch.Tensor, float]:
    """Adam with a cosine rate on log-scales [M or 1, in]; the best by `judge`, once an epoch."""
    modalities = only or tuple(range(len(problem.rows)))
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
