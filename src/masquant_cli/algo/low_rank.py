"""The best rank-r correction of a smoothed linear (eq. 22-26), without inverting anything.

With D = W * s_m - Q(W * s_0)  [out, in] and smoothed activations X [T, in], the minimiser of
||X (D - L).T||_F over rank(L) <= r is L = V V.T D, where V [out, r] holds the top right singular
vectors of X D.T. It equals the paper's T^-1 U S V.T where T is invertible, and stays right when
there are fewer tokens than channels. So lr_a = D.T V (entries of order one) and lr_b = V.T
(orthonormal): no damping, no clamping, safe in fp16.
"""

from dataclasses import dataclass, replace

import torch

EXACT_SIDE = 2048  # above this side length, subspace iteration is cheaper than eigh
OVERSAMPLE = 8
MAX_ITERATIONS = 24


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
    return gram / scale / scale[:, None]


def output_covariance(
    delta: torch.Tensor, gram: torch.Tensor | None, rows: torch.Tensor | None
) -> torch.Tensor:
    """D G D.T [out, out] from a Gram [in, in] or from rows [n, in], both already smoothed."""
    if gram is not None:
        return delta @ gram @ delta.T
    image = rows @ delta.T
    return image.T @ image


def output_energy(
    weight: torch.Tensor, gram: torch.Tensor | None = None, rows: torch.Tensor | None = None
) -> float:
    """||X W.T||_F^2 for W [out, in], from the Gram [in, in] of X or from rows [n, in] of it."""
    if rows is not None:
        return float((rows @ weight.T).square().sum())
    return max(0.0, float((weight @ gram * weight).sum()))


def best_low_rank(
    delta: torch.Tensor,
    rank: int,
    *,
    gram: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> LowRank:
    """Truncated SVD of X D.T by the cheapest exact side, or subspace iteration when all are wide.

    delta [out, in]; exactly one of gram [in, in] and rows [n, in], smoothed like delta.
    Works in fp64 on the side it decomposes; results are fp32.
    """
    if (gram is None) == (rows is None):
        raise ValueError("pass exactly one of gram and rows")
    n_out, n_in = delta.shape
    inner = n_in if rows is None else rows.shape[0]
    if min(n_out, inner) > max(EXACT_SIDE, 4 * rank):
        return _subspace(delta, rank, gram, rows)
    if n_out <= inner:
        values, vectors = _eigh_descending(output_covariance(delta, gram, rows))
        v = vectors[:, :rank]
    else:
        # The smaller side: X D.T = A, A A.T [inner, inner], and V = A.T U / sigma.
        factor = rows.double() if rows is not None else _square_root(gram)
        image = factor @ delta.double().T
        values, u = _eigh_descending(image @ image.T)
        v = torch.linalg.qr(image.T @ u[:, :rank]).Q
    return _assemble(delta, v, values)


def unwhitened_low_rank(delta: torch.Tensor, rank: int) -> LowRank:
    """Plain truncated SVD of D, blind to the activations: the paper's baseline in Fig. 6."""
    if delta.shape[0] <= delta.shape[1]:
        values, vectors = _eigh_descending(delta.double() @ delta.double().T)
        v = vectors[:, :rank]
    else:
        values, u = _eigh_descending(delta.double().T @ delta.double())
        v = torch.linalg.qr(delta.double() @ u[:, :rank]).Q
    found = _assemble(delta, v, values)
    # The spectrum is that of D, not of X D.T.
    return replace(found, complete=False)


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


def _assemble(delta: torch.Tensor, v: torch.Tensor, squares: torch.Tensor) -> LowRank:
    # Eigenvectors have no sign of their own; fix one, so that equal inputs give equal bytes.
    v = v * torch.where(v.gather(0, v.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    v = v.to(delta.dtype)
    squares = squares.clamp_min(0)
    return LowRank(
        lr_a=(delta.T @ v).contiguous(),
        lr_b=v.T.contiguous(),
        singular_values=squares.sqrt().float(),
        energy=float(squares.sum()),
    )


def _subspace(delta, rank, gram, rows) -> LowRank:
    """Randomised subspace iteration until the captured energy moves by less than 1e-4."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(delta.shape[0], rank + OVERSAMPLE, generator=generator)
    v = torch.linalg.qr(start.to(delta)).Q

    def apply(v: torch.Tensor) -> torch.Tensor:  # D G D.T v, never forming [out, out]
        down = delta.T @ v
        return delta @ (gram @ down if gram is not None else rows.T @ (rows @ down))

    captured = 0.0
    for _ in range(MAX_ITERATIONS):
        image = apply(v)
        now = float((v * image).sum())
        v = torch.linalg.qr(image).Q
        if abs(now - captured) <= 1e-4 * max(now, 1e-30):
            break
        captured = now
    values, inner = _eigh_descending(v.T @ apply(v))
    found = _assemble(delta, (v.double() @ inner)[:, :rank], values)
    # trace(D G D.T) is the whole energy, of which `values` holds the top.
    return replace(found, energy=output_energy(delta, gram, rows), complete=False)


def _eigh_descending(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(symmetric.double())
    return values.flip(0), vectors.flip(1)


def _square_root(gram: torch.Tensor) -> torch.Tensor:
    """F with F.T F = gram; tiny negative eigenvalues of an fp32 Gram are rounding, and dropped."""
    values, vectors = torch.linalg.eigh(gram.double())
    return (vectors * values.clamp_min(0).sqrt()).T
