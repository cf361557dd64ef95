"""The correction of one site: `best_low_rank` against equations 23-25 as they are printed."""

import gc
import time
from collections.abc import Callable
from statistics import median

TOLERANCE = 1.001  # error over the optimum's
# (out, in, least speed-up; None: the literal form needs hours here, so only ours is timed)
SITES = ((1024, 3072, 4.0), (3072, 1024, 4.0), (18944, 3584, 10.0), (3584, 18944, None))
RATIO = 0.05


def lowrank(say: Callable[[str], None], sites=SITES) -> dict:
    """Both start from the same Gram of smoothed inputs and the same residual, in one process."""
    import torch

    found = {}
    for n_out, n_in, least in sites:
        torch.manual_seed(0)
        delta, gram = site(n_out, n_in)
        rank = int(RATIO * min(n_out, n_in))
        one = compare(delta, gram, rank, against=least is not None, repeats=3 if n_in < 3500 else 1)
        one["at_least"] = least
        found[f"{n_out}x{n_in}"] = one
        said = f"{n_out}x{n_in}, rank {rank}: {one['seconds']:.2f} s"
        if least is not None:
            said += f", literal {one['literal_seconds']:.1f} s ({one['speedup']:.1f}x)"
            said += f", error {one['error_over_optimum']:.6f} of the optimum"
        say(said)
        del delta, gram
        gc.collect()
    return {"ratio": RATIO, "sites": found, "error_at_most": TOLERANCE}


def site(n_out: int, n_in: int):
    """(residual [out, in], Gram [in, in] of smoothed inputs), fp32.

    Inputs have a decaying spectrum and channels of uneven size; the residual is the one between a
    weight smoothed for one modality and the 4-bit weight smoothed for another.
    """
    import torch
    from masquant_kernels.quantizers import dequantize_weight, quantize_weight

    tokens = n_in + 256
    low = torch.randn(tokens, n_in // 8) @ torch.randn(n_in // 8, n_in) / (n_in // 8) ** 0.5
    x = (low + 0.3 * torch.randn(tokens, n_in)) * torch.exp(0.7 * torch.randn(n_in))
    weight = torch.randn(n_out, n_in) * n_in**-0.5
    base, own = (torch.exp(0.5 * torch.randn(n_in)) for _ in range(2))
    delta = weight * own - dequantize_weight(quantize_weight(weight * base, 4, None, True))
    x /= own
    gram = x.T @ x / tokens
    return delta, gram


def literal(delta, gram, rank: int):
    """Equations 23-25 in fp64: (L1 [in, r], L2 [r, out], all singular values of T dW)."""
    import torch

    p, values, _ = torch.linalg.svd(gram.double())
    t = (p * values.sqrt()).T
    u, s, vh = torch.linalg.svd(t @ delta.double().T, full_matrices=False)
    return torch.linalg.inv(t) @ u[:, :rank], s[:rank, None] * vh[:rank], s


def compare(delta, gram, rank: int, *, against: bool, repeats: int) -> dict:
    """Seconds of both (medians, interleaved) and both errors over the optimum's."""
    from masquant_cli.algo.low_rank import best_low_rank

    best_low_rank(delta[:64, :64], 8, gram=gram[:64, :64])  # threads, libraries
    ours, theirs, one = [], [], {"rank": rank}
    for _turn in range(repeats):
        began = time.perf_counter()
        found = best_low_rank(delta, rank, gram=gram)
        ours.append(time.perf_counter() - began)
        if against:
            began = time.perf_counter()
            l1, l2, s = literal(delta, gram, rank)
            theirs.append(time.perf_counter() - began)
    one["seconds"] = round(median(ours), 4)
    one["residual_energy_left"] = round(left(delta, gram, found.lr_a, found.lr_b), 8)
    if against:
        squares = s.square()
        optimum = float(squares[rank:].sum() / squares.sum())
        one["literal_seconds"] = round(median(theirs), 3)
        one["speedup"] = round(median(theirs) / median(ours), 2)
        one["literal_residual_energy_left"] = round(left(delta, gram, l1, l2), 8)
        one["optimal_residual_energy_left"] = round(optimum, 8)
        # Of norms, as the error of an output is.
        one["error_over_optimum"] = round((one["residual_energy_left"] / optimum) ** 0.5, 6)
    return one


def left(delta, gram, lr_a, lr_b) -> float:
    """Share of ||X D.T||_F^2 that a correction leaves, in fp64."""
    whole = delta.double()
    rest = whole - (lr_a.double() @ lr_b.double()).T
    g = gram.double()
    return energy(rest, g) / energy(whole, g)


def energy(d, gram) -> float:
    """trace(D G D.T), a slice of outputs at a time."""
    return sum(float((part @ gram * part).sum()) for part in d.split(1024))
