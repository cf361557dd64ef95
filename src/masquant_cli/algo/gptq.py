"""GPTQ (Frantar et al., 2023): rounding a weight one input channel after the other.

What a channel's rounding does to the output is made up for by the channels that are still to
come. Scales are those of rounding to nearest, so the stored format does not change.
"""

import math

import torch
from masquant_kernels.quantizers import QWeight, dequantize_weight, quantize_weight

from masquant_cli.algo.curvature import Curvature, of_gram, of_rows

# Weights that are in work at a time: outputs are independent of one another. Ten copies are made.
CHUNK = {"cpu": 2**21, "cuda": 2**26}
FEWEST = 512  # outputs at a time: every channel is a step, however few there are
PRECISE = 512  # up to so many channels sums are fp64, beyond fp32
FEW = 8  # channels that see each other's errors one by one; the rest is matrix products


def gptq_round(
    weight: torch.Tensor,
    gram: torch.Tensor | None,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    *,
    rows: torch.Tensor | None = None,
    damp: float = 0.01,
    act_order: bool = True,
) -> QWeight:
    """Integers for `weight [out, in]` that keep ||X (W - Q).T||_F small, X.T X = gram [in, in];
    or, with gram None, X = rows [n, in].

    H = X.T X + damp * mean(diag(X.T X)) * I, with `damp` raised tenfold until H = R R.T exists
    (R upper triangular). Then ||(W - Q) R||^2 is the output error, and with e_i = w_i - q_i

        q_j = round(w_j + sum_{i < j} e_i R_ij / R_jj)

    is the choice that costs least once all later channels have answered to it. As U = R^-1 is
    the Cholesky factor of H^-1 = U.T U, this is GPTQ's update without an inverse being formed.

    act_order: channels with the most energy first. Scale and zero are quantize_weight's. Output
    rows that come out worse than rounding to nearest on the undamped gram take the nearest
    integers, so no row is ever worse. Channels without energy round to nearest. Two matrices
    [in, in] beside the Gram at most; with few rows none at all.
    Raises ValueError on shapes that do not match, values that are not finite, damp <= 0, and
    whatever quantize_weight refuses.
    """
    n_in = weight.shape[1]
    found = quantize_weight(weight, bits, group_size, symmetric)
    if not 0 < damp < math.inf:
        raise ValueError(f"damp must be above 0 and finite, got {damp}")
    dtype = torch.float64 if n_in <= PRECISE else torch.float32
    if gram is None:
        if rows is None or rows.ndim != 2 or rows.shape[1] != n_in:
            raise ValueError(f"rows of {n_in} inputs are [n, {n_in}]")
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("the rows have values that are not finite")
        if 3 * len(rows) >= n_in:  # the products of rows would be more work than the Gram
            gram = rows.T @ rows
    if gram is not None:
        seen = of_gram(_checked(gram, n_in).to(weight.device), damp, act_order, dtype)
    else:
        seen = of_rows(rows, damp, act_order, dtype)
    size = outputs_at_once(n_in, weight.device)
    for start in range(0, len(weight), size):
        at = slice(start, start + size)
        zero = None if found.zero is None else found.zero[at]
        part = QWeight(found.q[at], found.scale[at], zero)
        part.q.copy_(_round(weight[at], part, seen, bits, dtype))
    return found


def outputs_at_once(n_in: int, device: torch.device) -> int:
    """How many outputs of a weight with `n_in` inputs are rounded together."""
    return max(FEWEST, CHUNK.get(device.type, 2**26) // n_in)


def _checked(gram: torch.Tensor, n_in: int) -> torch.Tensor:
    if gram.shape != (n_in, n_in):
        raise ValueError(f"the gram of {n_in} inputs is [{n_in}, {n_in}], got {tuple(gram.shape)}")
    if not all(bool(torch.isfinite(g).all()) for g in gram.split(1024)):
        raise ValueError("the gram has values that are not finite")
    return gram


def _round(
    weight: torch.Tensor, nearest: QWeight, seen: Curvature, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """Integers [out, in] i8 of some outputs. Inside, channels are rows in rounding order, which
    is `seen.order` backwards: from the last row up."""
    order = seen.order
    w = weight.float().T.contiguous()[order].to(dtype)
    state = _State(w, _Grid(nearest, bits), order.tolist(), torch.empty_like(nearest.q.T))
    inputs = seen.start(w.shape[1])
    for low, high, ahead in seen.blocks():
        seen.answer(inputs, state.wanted, low, high)
        _channel_by_channel(state, low, high, ahead, low)
        seen.remember(inputs, state.error, low, high)
    values = dequantize_weight(nearest).T.contiguous()[order].to(dtype)
    gain = seen.energy(inputs, state.error, state.missed) - seen.energy_of(w - values)
    return torch.where(gain[:, None] > 0, nearest.q, state.q.T)


class _State:
    """One rounding under way: all [in, outputs], rows in rounding order but for `q`."""

    def __init__(self, w: torch.Tensor, grid: "_Grid", channels: list[int], q: torch.Tensor):
        self.w, self.grid, self.channels, self.q = w, grid, channels, q
        self.wanted = w.clone()  # and what earlier channels add to it
        self.error, self.missed = torch.empty_like(w), torch.empty_like(w)


def _channel_by_channel(
    state: _State, low: int, high: int, ahead: torch.Tensor, offset: int
) -> None:
    """Rows low..high - 1; ahead[a - offset, b - offset] is what b answers of a's error."""
    # No closure: one that calls itself is freed, tensors and all, only when garbage is collected.
    wanted, error = state.wanted, state.error
    if high - low > FEW:
        middle = (low + high) // 2
        _channel_by_channel(state, middle, high, ahead, offset)
        share = ahead[middle - offset : high - offset, low - offset : middle - offset]
        wanted[low:middle].addmm_(share.T, error[middle:high])
        _channel_by_channel(state, low, middle, ahead, offset)
        return
    for j in range(high - 1, low - 1, -1):
        target, channel = wanted[j], state.channels[j]
        if j < high - 1:
            answer = ahead[j + 1 - offset : high - offset, j - offset]
            target = torch.addmv(target, error[j + 1 : high].T, answer)
        state.q[channel], value = state.grid.round(target, channel)
        torch.sub(state.w[j], value, out=error[j])
        torch.sub(target, value, out=state.missed[j])


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
    nearest = quantize_weight(weight, bits, group_size, symmetric)
    if not 0 < damp < math.inf:
        raise ValueError(f"damp must be above 0 and finite, got {damp}")
    gram = _checked(gram, weight.shape[1])
    seen = of_gram(gram, damp, act_order, torch.float64)
    order, hessian = seen.order.flip(0), (gram.double() + gram.double().T) / 2
    dead = hessian.diagonal() <= 0
    hessian.masked_fill_(dead | dead[:, None], 0)
    inverse = torch.linalg.inv(hessian + seen.added * torch.eye(len(hessian)).to(hessian))
    grid = _Grid(nearest, bits)
    w = weight.double().clone()
    q = torch.empty_like(nearest.q)
    remaining = torch.ones(len(order), dtype=torch.bool, device=w.device)
    for j in order.tolist():
        q[:, j], value = grid.round(w[:, j], j)  # f32
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
        """w [out] -> integers (f32) and the values they stand for (f32), as quantize_weight
        and dequantize_weight have them: zero added after rounding."""
        g = channel // self.group
        q = (w.float() / self.scale[g]).round_()
        if self.zero is None:
            q.clamp_(self.low, self.high)
            return q, q * self.scale[g]
        q.add_(self.zero[g]).clamp_(self.low, self.high)
        return q, (q - self.zero[g]).mul_(self.scale[g])
