"""The best rank-r correction of a smoothed linear (eq. 22-26), without inverting anything.

With D = W * s_m - Q(W * s_0)  [out, in] and smoothed activations X [T, in], the minimiser of
||X (D - L).T||_F over rank(L) <= r is L = V V.T D, where V [out, r] holds the top right singular
vectors of X D.T. It equals the paper's T^-1 U S V.T where T is invertible, and stays right when
there are fewer tokens than channels. So lr_a = D.T V (entries of order one) and lr_b = V.T
(orthonormal): no damping, no clamping, safe in fp16.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

EIGH = 30  # n^3 fp32 flops that an fp64 eigh takes the time of: measured on CPUs, n up to 2048
BLOCKS = 5  # that block Krylov is expected to need
OUTPUTS = 4096  # at a time, where a product of the weight's size is needed only for its sum
EXACT_SIDE = 512  # up to here all of the spectrum is found: it costs little, and reports show it
OVERSAMPLE = 8
TOLERANCE = 2e-4  # of the energy that is left
RESOLVED = 1e-3  # of all energy: TOLERANCE of less is lost in the rounding of fp32 products


@dataclass(frozen=True)
class LowRank:
    """lr_a [in, r], lr_b [r, out], singular values [k] of X D.T (k >= r), total energy.

    `complete`: the singular values are all of them.
    """

    lr_a: torch.Tensor
    lr_b: torch.Tensor
    singular_values: torch.Tensor
    energy: float
    complete: bool = True

    @property
    def residual(self) -> float:
        """Share of ||X D.T||_F^2 that the correction leaves."""
        kept = float(self.singular_values[: self.lr_b.shape[0]].double().square().sum())
        return max(0.0, 1.0 - kept / self.energy) if self.energy > 0 else 0.0


def rank_for(rank: float, in_features: int, out_features: int) -> int:
    """Columns of the correction: an absolute rank, or a ratio of min(in, out) rounded down."""
    side = min(in_features, out_features)
    return min(side, int(rank) if rank >= 1 else int(rank * side))


def smoothed_gram(gram: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Gram [in, in] of X / s, from the Gram of X."""
    return (gram / scale).div_(scale[:, None])


def output_energy(
    weight: torch.Tensor, gram: torch.Tensor | None = None, rows: torch.Tensor | None = None
) -> float:
    """||X W.T||_F^2 for W [out, in], from the Gram [in, in] of X or from rows [n, in] of it."""
    if rows is not None:
        return sum(_inner(y, y) for y in (rows @ w.T for w in weight.split(OUTPUTS)))
    return max(0.0, sum(_inner(w @ gram, w) for w in weight.split(OUTPUTS)))


def best_low_rank(
    delta: torch.Tensor,
    rank: int,
    *,
    gram: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> LowRank:
    """Truncated SVD of X D.T: of its smaller side exactly, or by block Krylov where that is
    cheaper; its error ||X (D - L).T||_F is then within 0.1 % of the least (where that is above a
    thirtieth of ||X D.T||_F: fp32 products see no less).

    delta [out, in]; exactly one of gram [in, in] and rows [n, in], smoothed like delta.
    Eigen-decompositions are fp64; results have delta's dtype.
    """
    if (gram is None) == (rows is None):
        raise ValueError("pass exactly one of gram and rows")
    if rows is not None:
        return _of_image(delta, rows @ delta.T, rank)
    side, inner = delta.shape
    if _krylov_flops(side, inner, rank) < EIGH * min(side, inner) ** 3:
        seen = delta @ gram if side <= inner else None  # else D (G (D.T v)) costs less memory
        found = top_eigenvectors(
            lambda v: seen @ (delta.T @ v) if seen is not None else delta @ (gram @ (delta.T @ v)),
            side,
            rank,
            _inner(seen, delta) if seen is not None else output_energy(delta, gram),
            like=delta,
        )
        if found is not None:
            return _assemble(delta, *found, complete=False)
    if side <= inner:
        values, vectors = _eigh_descending(delta @ gram @ delta.T)
        return _assemble(delta, vectors[:, :rank], values)
    return _of_image(delta, _square_root(gram) @ delta.double().T, rank)


def unwhitened_low_rank(delta: torch.Tensor, rank: int) -> LowRank:
    """Plain truncated SVD of D, blind to the activations: the paper's baseline in Fig. 6."""
    # D.T is what identity rows would show; the spectrum is that of D, not of X D.T.
    return replace(_of_image(delta, delta.T, rank), complete=False)


def _of_image(delta: torch.Tensor, image: torch.Tensor, rank: int) -> LowRank:
    """The correction of D from `image [n, out]`, which is X D.T."""
    inner, side = image.shape
    if _krylov_flops(side, inner, rank) < EIGH * min(side, inner) ** 3:
        wide = image.to(delta.dtype)
        found = top_eigenvectors(
            lambda v: wide.T @ (wide @ v), side, rank, _inner(wide, wide), like=delta
        )
        if found is not None:
            return _assemble(delta, *found, complete=False)
    image = image.double()
    if side <= inner:
        values, vectors = _eigh_descending(image.T @ image)
        return _assemble(delta, vectors[:, :rank], values)
    # A A.T [inner, inner] is the smaller, and V = A.T U / sigma.
    values, u = _eigh_descending(image @ image.T)
    return _assemble(delta, torch.linalg.qr(image.T @ u[:, :rank]).Q, values)


def _krylov_flops(side: int, inner: int, rank: int) -> float:
    """What a few blocks cost: the products, and keeping the basis orthogonal."""
    if min(side, inner) <= EXACT_SIDE:
        return math.inf
    block = rank + OVERSAMPLE
    return BLOCKS * 4 * side * inner * block + 6 * side * (BLOCKS * block) ** 2


def top_right_subspace(
    image: torch.Tensor, rank: int, start: torch.Tensor | None = None, steps: int = 3
) -> torch.Tensor:
    """V [out, rank], nearly the top right singular vectors of image [n, out], in a few steps.

    For loops that ask often and can hand over the last answer as `start [out, <= rank]`.
    """
    n_out = image.shape[1]
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(n_out, min(rank + OVERSAMPLE, n_out), generator=generator).to(image)
    if start is not None:
        v[:, : start.shape[1]] = start
    for _ in range(steps):
        v = torch.linalg.qr(image.T @ (image @ v)).Q
    part = image @ v
    _, turn = torch.linalg.eigh((part.T @ part).double())
    return v @ turn.flip(1)[:, :rank].to(v.dtype)


def singular_values(delta: torch.Tensor) -> torch.Tensor:
    """Those of D [out, in], descending, from its smaller side: good to 1e-8 of the largest."""
    d = delta.double() if delta.shape[0] <= delta.shape[1] else delta.double().T
    return torch.linalg.eigvalsh(d @ d.T).clamp_min(0).sqrt().flip(0)


def effective_rank(singular_values: torch.Tensor) -> float:
    """exp of the entropy of the normalised spectrum (Roy and Vetterli 2007)."""
    values = singular_values.double().clamp_min(0)
    total = values.sum()
    if total <= 0:
        return 0.0
    p = values / total
    return float(torch.exp(-(p * p.clamp_min(1e-300).log()).sum()))


def top_eigenvectors(
    apply: Callable[[torch.Tensor], torch.Tensor],
    side: int,
    rank: int,
    energy: float,
    *,
    like: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """(V [side, rank], Ritz values f64 [>= rank] descending, energy) of a symmetric positive
    semidefinite operator of trace `energy`, by block Krylov; None where it does not pay.

    Blocks wider than the rank find clusters of equal eigenvalues too. Every block adds to what V
    captures, less and less. It has arrived once a block adds less than TOLERANCE of the energy
    that is left: a tenth of what an error of 0.1 % is, for those that come in slowly.
    """
    block = rank + OVERSAMPLE
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(side, block, generator=generator).to(like)).Q
    basis, images = q[:, :0], q[:, :0]
    before = 0.0
    while basis.shape[1] + block <= side // 2:
        basis = torch.cat([basis, q], 1)
        image = apply(q)
        images = torch.cat([images, image], 1)
        values, turn = _eigh_descending(basis.T @ images)
        captured = float(values[:rank].clamp_min(0).sum())
        left = max(energy - captured, RESOLVED * energy)
        # The first block is random: what it captures of a huge side says nothing.
        if basis.shape[1] > block and captured - before <= TOLERANCE * left:
            return basis @ turn[:, :rank].to(like), values, energy
        before = captured
        # A column that the operator has nothing to add to is rounding, most of it along the basis:
        # it takes a second time, at length one, to lie across, and a third to lie across exactly.
        for _ in range(3):
            image = torch.linalg.qr(image - basis @ (basis.T @ image)).Q
        q = image
    return None


def _assemble(
    delta: torch.Tensor,
    v: torch.Tensor,
    squares: torch.Tensor,
    energy: float | None = None,
    complete: bool = True,
) -> LowRank:
    # Eigenvectors have no sign of their own; fix one, so that equal inputs give equal bytes.
    v = v * torch.where(v.gather(0, v.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    v = v.to(delta.dtype)
    squares = squares.clamp_min(0)
    return LowRank(
        lr_a=(delta.T @ v).contiguous(),
        lr_b=v.T.contiguous(),
        singular_values=squares.sqrt().float(),
        energy=float(squares.sum()) if energy is None else energy,
        complete=complete,
    )


def _eigh_descending(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(symmetric.double())
    return values.flip(0), vectors.flip(1)


def _inner(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sum of the products of two fp32 matrices: by rows, which are then added up in fp64."""
    return float(torch.linalg.vecdot(a, b).double().sum())


def _square_root(gram: torch.Tensor) -> torch.Tensor:
    """F with F.T F = gram; tiny negative eigenvalues of an fp32 Gram are rounding, and dropped."""
    lower, failed = torch.linalg.cholesky_ex(gram.double())
    if not failed:
        return lower.T
    values, vectors = torch.linalg.eigh(gram.double())
    return (vectors * values.clamp_min(0).sqrt()).T
