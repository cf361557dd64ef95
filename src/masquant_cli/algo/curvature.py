"""What GPTQ knows of a site's inputs: which channel answers how much to which channel's error.

With channels in `order`, H = L L.T is factored from the first on and rounded from the last on:
channel b answers to the error of a > b by L[a, b] / L[b, b]. From a Gram L is a matrix; of n rows
X, L[a, b] = x_a . v_b off the diagonal blocks, so n numbers for each channel say it all.
"""

from collections.abc import Iterator

import torch

PRECISE = 4096  # up to here a Gram is factored in fp64; above that takes too much time and memory
BLOCK = 128  # channels of rows that are factored as a matrix


class Curvature:
    """`order` i64 [in]: channels, the last is rounded first; `added` is the damping in use.

    State of a rounding and errors are of shape [.., outputs], rows in `order`.
    """

    order: torch.Tensor
    added: float

    def start(self, outputs: int) -> torch.Tensor | None:
        """State before the first channel."""
        return None

    def blocks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(low, high, answers [high - low, high - low]) from the last channels to the first."""
        raise NotImplementedError

    def answer(self, state, wanted: torch.Tensor, low: int, high: int) -> None:
        """Add to wanted[low:high] what it answers to the blocks before."""

    def remember(self, state, error: torch.Tensor, low: int, high: int) -> None:
        """Take in the errors of a block that is done."""

    def energy(self, state, error: torch.Tensor, missed: torch.Tensor) -> torch.Tensor:
        """||X e||^2 [outputs] of the rounding that led to `state`."""
        raise NotImplementedError

    def energy_of(self, error: torch.Tensor) -> torch.Tensor:
        """||X e||^2 [outputs] of any errors [in, outputs]."""
        raise NotImplementedError


class _Dense(Curvature):
    """`factor` [in, in]: L with columns divided by its diagonal, which is `size` [in]."""

    def __init__(self, order, added, factor, dtype):
        self.order, self.added = order, added
        diagonal = factor.diagonal().clone()
        self.size = diagonal.to(dtype)
        self.factor = factor.div_(diagonal).to(dtype)

    def blocks(self):
        yield 0, len(self.order), self.factor

    def energy(self, state, error, missed):
        found = (missed * self.size[:, None]).square_().sum(0)
        return found - self.added * error.square().sum(0)

    def energy_of(self, error):
        found = -self.added * error.square().sum(0)
        for low in range(0, len(error), 512):  # L.T e; above its diagonal L is zero
            part = self.factor[low:, low : low + 512].T @ error[low:]
            found += (part * self.size[low : low + 512, None]).square_().sum(0)
        return found


class _Rows(Curvature):
    """`x` and `v` [n, in]; `inside`: the diagonal blocks, columns divided by `size` [in]."""

    def __init__(self, order, added, x, v, inside, size):
        self.order, self.added, self.x, self.v, self.inside, self.size = (
            order, added, x, v, inside, size,
        )  # fmt: skip

    def start(self, outputs):
        return self.x.new_zeros(len(self.x), outputs)  # X e so far

    def blocks(self):
        for low in reversed(range(0, len(self.order), BLOCK)):
            yield low, min(low + BLOCK, len(self.order)), self.inside[low // BLOCK]

    def answer(self, state, wanted, low, high):
        wanted[low:high].addmm_((self.v[:, low:high] / self.size[low:high]).T, state)

    def remember(self, state, error, low, high):
        state.addmm_(self.x[:, low:high], error[low:high])

    def energy(self, state, error, missed):
        return state.square().sum(0)

    def energy_of(self, error):
        return (self.x @ error).square_().sum(0)


def of_gram(gram: torch.Tensor, damp: float, act_order: bool, dtype: torch.dtype) -> Curvature:
    """From X.T X [in, in], symmetrised; a channel without energy goes with nothing, and anything
    else in its row is rounding. Two matrices of that size at most are made."""
    energy = gram.diagonal()
    order = _order(energy, act_order)
    dead = (energy[order] <= 0).nonzero()[:, 0]
    mean = float(energy.double().clamp_min(0).mean())
    exact = torch.float64 if len(gram) <= PRECISE else torch.float32
    added = damp * mean or 1.0  # without any energy every choice is the same
    while True:
        hessian = gram.index_select(0, order).index_select(1, order).to(exact)
        hessian.index_fill_(0, dead, 0).index_fill_(1, dead, 0)
        _symmetrise_lower(hessian)
        hessian.diagonal().add_(added)
        torch.linalg.cholesky_ex(hessian, out=(hessian, failed := torch.empty_like(dead[:0]).int()))
        if not bool(failed):
            return _Dense(order, added, hessian, dtype)
        added *= 10


def of_rows(rows: torch.Tensor, damp: float, act_order: bool, dtype: torch.dtype) -> Curvature:
    """From X [n, in] itself, without anything of size [in, in].

    After the blocks before b, the rest of H is X.T M X + added I, M [n, n]: a block's factor is
    that of its own part, v = M x L^-T, and M loses v v.T.
    """
    energy = rows.square().sum(0)
    order = _order(energy, act_order)
    x = rows[:, order]
    added = damp * float(energy.double().mean()) or 1.0
    while True:
        found = _factor_rows(x, added, dtype)
        if found is not None:
            v, inside, size = found
            return _Rows(order, added, x.to(dtype), v, inside, size)
        added *= 10


def _factor_rows(x: torch.Tensor, added: float, dtype: torch.dtype):
    n, n_in = x.shape
    m = torch.eye(n, dtype=torch.float64, device=x.device)
    v = torch.empty(n, n_in, dtype=dtype, device=x.device)
    size, inside = torch.empty(n_in, dtype=dtype, device=x.device), []
    for low in range(0, n_in, BLOCK):
        block = x[:, low : low + BLOCK].double()
        image = m @ block
        part = block.T @ image
        part.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(part)
        if bool(failed):
            return None
        image = torch.linalg.solve_triangular(lower.T, image, upper=True, left=False)
        m.addmm_(image, image.T, alpha=-1)
        v[:, low : low + BLOCK] = image
        size[low : low + BLOCK] = lower.diagonal()
        inside.append((lower / lower.diagonal()).to(dtype))
    return v, inside, size


def _order(energy: torch.Tensor, act_order: bool) -> torch.Tensor:
    """The first to be rounded comes last."""
    if act_order:
        return energy.argsort(descending=True, stable=True).flip(0)
    return torch.arange(len(energy), device=energy.device).flip(0)


def _symmetrise_lower(matrix: torch.Tensor, block: int = 2048) -> None:
    """Lower triangle and diagonal of (A + A.T) / 2, in place."""
    for i in range(0, len(matrix), block):
        for j in range(0, i + 1, block):
            here, there = matrix[i : i + block, j : j + block], matrix[j : j + block, i : i + block]
            here.copy_((here + there.T) / 2)
