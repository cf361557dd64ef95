"""GPTQ (Frantar et al., 2023): rounding a weight one input channel after the other.

What a channel's rounding does to the output is made up for by the channels that are still to
come. Scales are those of rounding to nearest, so the stored format does not change.
"""

import math

import torch
from masquant_kernels.quantizers import QWeight, dequantize_weight, quantize_weight

BLOCK = 128  # channels whose mutual corrections are made one by one; the rest is a matrix product


def gptq_round(
    weight: torch.Tensor,
    gram: torch.Tensor,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    *,
    damp: float = 0.01,
    act_order: bool = True,
) -> QWeight:
    """Integers for `weight [out, in]` that keep ||X (W - Q).T||_F small, X.T X = gram [in, in].

    H = gram + damp * mean(diag(gram)) * I, with `damp` raised tenfold until H = R R.T exists
    (R upper triangular). Then ||(W - Q) R||^2 is the output error, and with e_i = w_i - q_i

        q_j = round(w_j + sum_{i < j} e_i R_ij / R_jj)

    is the choice that costs least once all later channels have answered to it. As U = R^-1 is
    the Cholesky factor of H^-1 = U.T U, this is GPTQ's update without an inverse being formed.

    act_order: channels with the most energy first. Scale and zero are quantize_weight's. Output
    rows that come out worse than rounding to nearest on the undamped gram take the nearest
    integers, so no row is ever worse. Channels without energy round to nearest. fp64 inside.
    Raises ValueError on shapes that do not match, values that are not finite, damp <= 0, and
    whatever quantize_weight refuses.
    """
    nearest, hessian, order = _prepare(
        weight, gram, bits, group_size, symmetric, damp=damp, act_order=act_order
    )
    factor, added = _upper_factor(hessian[order][:, order], damp)
    diagonal = factor.diagonal().clone()
    # Row j of `ahead` says how much of each earlier error channel j answers to; unit diagonal.
    ahead = factor.div_(diagonal).T.contiguous()
    grid = _Grid(nearest, bits)
    # [in, out] in rounding order: a channel is contiguous.
    w = weight.float().T.contiguous()[order].double()
    error_nearest = w - dequantize_weight(nearest).T.contiguous()[order]
    error, q = torch.empty_like(w), torch.empty_like(nearest.q.T)
    gain = torch.zeros_like(w[0])  # ||error||^2 of nearest minus ours, per output row
    channels = order.tolist()
    for start in range(0, len(channels), BLOCK):
        stop = min(start + BLOCK, len(channels))
        wanted = torch.addmm(w[start:stop], ahead[start:stop, :start], error[:start])
        missed = torch.empty_like(wanted)
        for j in range(start, stop):
            target = wanted[j - start]
            if j > start:
                target = torch.addmv(target, error[start:j].T, ahead[j, start:j])
            integers, value = grid.round(target, channels[j])
            q[channels[j]] = integers
            error[j] = w[j] - value
            missed[j - start] = target - value
        size = diagonal[start:stop, None]
        gain += ((ahead[start:stop, :stop] @ error_nearest[:stop]) * size).square().sum(0)
        gain -= (missed * size).square().sum(0)
    gain += added * (error.square().sum(0) - error_nearest.square().sum(0))
    return nearest._replace(q=torch.where(gain[:, None] > 0, q.T, nearest.q).contiguous())


def gptq_round_naive(
    weight: torch.Tensor,
    gram: torch.Tensor,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    *,
    damp: float = 0.01,
    act_order: bool = True,
) -> QWeight:
    """`gptq_round` as optimal brain quantization states it: the reference, and slow.

    Every rounded channel changes all that remain by -(w_j - q_j) / [H^-1]_jj * [H^-1]_j: and is
    then eliminated from the explicit H^-1.
    """
    nearest, hessian, order = _prepare(
        weight, gram, bits, group_size, symmetric, damp=damp, act_order=act_order
    )
    _, added = _upper_factor(hessian.clone(), damp)
    inverse = torch.linalg.inv(hessian + added * torch.eye(len(hessian)).to(hessian))
    grid = _Grid(nearest, bits)
    w = weight.double().clone()
    q = torch.empty_like(nearest.q)
    remaining = torch.ones(len(order), dtype=torch.bool, device=w.device)
    for j in order.tolist():
        q[:, j], value = grid.round(w[:, j], j)
        remaining[j] = False
        step = (w[:, j] - value) / inverse[j, j]
        w -= step[:, None] * torch.where(remaining, inverse[j], 0)
        inverse -= inverse[:, j, None] * inverse[j] / inverse[j, j]

    def loss(candidate: QWeight) -> torch.Tensor:
        error = weight.double() - dequantize_weight(candidate).double()
        return (error @ hessian * error).sum(1, keepdim=True)

    found = nearest._replace(q=q)
    return found._replace(q=torch.where(loss(found) < loss(nearest), q, nearest.q))


class _Grid:
    """The integers and values that one input channel may take, given fixed scales."""

    def __init__(self, nearest: QWeight, bits: int):
        self.scale = nearest.scale.T.contiguous()  # [groups, out]
        self.zero = None if nearest.zero is None else nearest.zero.T.float().contiguous()
        self.group = nearest.q.shape[1] // nearest.scale.shape[1]
        self.high = 2 ** (bits - 1) - 1
        self.low = -self.high if self.zero is None else -self.high - 1

    def round(self, w: torch.Tensor, channel: int) -> tuple[torch.Tensor, torch.Tensor]:
        """w f64 [out] -> integers (f32) and the f64 values they stand for, as quantize_weight
        and dequantize_weight have them: both in fp32, zero added after rounding."""
        g = channel // self.group
        zero = 0.0 if self.zero is None else self.zero[g]
        q = ((w.float() / self.scale[g]).round_() + zero).clamp_(self.low, self.high)
        return q, ((q - zero) * self.scale[g]).double()


def _prepare(
    weight: torch.Tensor,
    gram: torch.Tensor,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    *,
    damp: float,
    act_order: bool,
) -> tuple[QWeight, torch.Tensor, torch.Tensor]:
    """Nearest rounding, the cleaned Gram (f64 [in, in]), and the channels in rounding order."""
    nearest = quantize_weight(weight, bits, group_size, symmetric)
    columns = weight.shape[1]
    if gram.shape != (columns, columns):
        raise ValueError(
            f"the gram of {columns} inputs is [{columns}, {columns}], got {tuple(gram.shape)}"
        )
    if not 0 < damp < math.inf:
        raise ValueError(f"damp must be above 0 and finite, got {damp}")
    hessian = gram.to(weight.device, torch.float64)
    if not torch.isfinite(hessian).all():
        raise ValueError("the gram has values that are not finite")
    hessian = (hessian + hessian.T) / 2
    # A channel without energy goes with nothing; anything else in its row is rounding.
    dead = hessian.diagonal() <= 0
    hessian.masked_fill_(dead | dead[:, None], 0)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    else:
        order = torch.arange(columns, device=hessian.device)
    return nearest, hessian, order


def _upper_factor(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
    """Upper triangular R with R R.T = hessian + added * I, and `added`; changes hessian."""
    # Without any energy every choice of damping is the same.
    added, wanted = 0.0, damp * float(hessian.diagonal().mean()) or 1.0
    while True:
        hessian.diagonal().add_(wanted - added)
        # The lower factor of the matrix turned round is the upper one turned round.
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            return lower.flip(0, 1), wanted
        added, wanted = wanted, 10 * wanted
