"""The correction of one site: `best_low_rank` against equations 23-25 as they are printed."""

import gc
import time
from collections.abc import Callable
from statistics import median

TOLERANCE = 1.001  # error over the optimum's
RATIO = 0.05
REPEATS, ENOUGH = 3, 30.0  # the literal form is not repeated once it took this many seconds
# (out, in, rows, least speed-up, part). None rows: from a Gram. From fewer rows than inputs T of
# equation 23 has no inverse, so there is nothing literal to compare with. Where the literal form
# would take hours it is timed with both sides divided by `part`, and that times part cubed.
SITES = (
    (1024, 3072, None, 4.0, 1),
    (3072, 1024, None, 4.0, 1),
    (18944, 3584, None, 10.0, 1),
    (3584, 18944, 512, None, 1),
    (3584, 18944, None, 10.0, 4),
)


def lowrank(say: Callable[[str], None], sites=SITES) -> dict:
    """Both get the same residual and the same statistics, in one process, in turns."""
    import torch

    found = {}
    for n_out, n_in, rows, least, part in sites:
        torch.manual_seed(0)
        delta, given = site(n_out, n_in, rows)
        one = compare(delta, given, int(RATIO * min(n_out, n_in)), part)
        name = f"{n_out}x{n_in}" + (f", {rows} rows" if rows else "")
        found[name] = {**one, "at_least": least}
        said = f"{name}, rank {one['rank']}: {one['seconds']:.2f} s"
        if "speedup" in one:
            said += f", literal {one['literal_seconds']:.1f} s ({one['speedup']:.1f}x)"
        say(f"{said}, error {one['error_over_optimum']:.6f} of the optimum")
        del delta, given
        gc.collect()
    return {"ratio": RATIO, "sites": found, "error_at_most": TOLERANCE}


def site(n_out: int, n_in: int, rows: int | None):
    """(residual [out, in], {"gram": [in, in]} or {"rows": [rows, in]}), fp32.

    Inputs have a decaying spectrum and channels of uneven size; the residual is the one between a
    weight smoothed for one modality and the 4-bit weight smoothed for another.
    """
    import torch
    from masquant_kernels.quantizers import dequantize_weight, quantize_weight

    tokens = rows or n_in + 256
    low = torch.randn(tokens, n_in // 8) @ torch.randn(n_in // 8, n_in) / (n_in // 8) ** 0.5
    x = (low + 0.3 * torch.randn(tokens, n_in)) * torch.exp(0.7 * torch.randn(n_in))
    weight = torch.randn(n_out, n_in) * n_in**-0.5
    base, own = (torch.exp(0.5 * torch.randn(n_in)) for _ in range(2))
    delta = weight * own - dequantize_weight(quantize_weight(weight * base, 4, None, True))
    x /= own * tokens**0.5
    return delta, {"rows": x} if rows else {"gram": x.T @ x}


def literal(delta, gram, rank: int):
    """Equations 23-25 in fp64: (L1 [in, r], L2 [r, out])."""
    import torch

    p, values, _ = torch.linalg.svd(gram.double())
    t = (p * values.sqrt()).T
    u, s, vh = torch.linalg.svd(t @ delta.double().T, full_matrices=False)
    return torch.linalg.inv(t) @ u[:, :rank], s[:rank, None] * vh[:rank]


def compare(delta, given: dict, rank: int, part: int = 1) -> dict:
    """Seconds of both (medians, interleaved) and errors, as norms over the optimum's.

    part: above 1 the literal form is timed once, with sides that much shorter, and extrapolated.
    """
    from masquant_cli.algo.low_rank import best_low_rank

    small = {k: v[:64, :64].contiguous() for k, v in given.items()}
    best_low_rank(delta[:64, :64].contiguous(), 8, **small)  # wakes threads and libraries
    ours, theirs = [], []
    for _ in range(REPEATS):
        began = time.perf_counter()
        found = best_low_rank(delta, rank, **given)
        ours.append(time.perf_counter() - began)
        if "gram" in given and part == 1 and sum(theirs) < ENOUGH:
            began = time.perf_counter()
            l1, l2 = literal(delta, given["gram"], rank)
            theirs.append(time.perf_counter() - began)
        if sum(ours) > ENOUGH:
            break
    if part > 1:
        few = site(len(delta) // part, delta.shape[1] // part, None)
        began = time.perf_counter()
        literal(few[0], few[1]["gram"], rank // part)
        theirs.append(part**3 * (time.perf_counter() - began))
    values = spectrum(delta, given)
    optimum = float(values[rank:].sum().clamp_min(0))
    one = {
        "rank": rank,
        "seconds": round(median(ours), 4),
        "optimal_energy_left": optimum / float(values.sum()),
        "error_over_optimum": (left(delta, given, found.lr_a, found.lr_b) / optimum) ** 0.5,
    }
    if theirs:
        one["literal_seconds"] = round(median(theirs), 3)
        one["literal_turns"] = len(theirs)
        one["speedup"] = round(median(theirs) / median(ours), 2)
        one["literal_part"] = part
    if theirs and part == 1:
        one["literal_error_over_optimum"] = (left(delta, given, l1, l2) / optimum) ** 0.5
    return one


def spectrum(delta, given: dict):
    """All squared singular values of X D.T, descending, in fp64, from its smallest side."""
    import torch

    d = delta.double()
    if "rows" in given:
        image = given["rows"].double() @ d.T
        square = image @ image.T
    elif len(d) <= d.shape[1]:
        square = d @ given["gram"].double() @ d.T
    else:
        values, p = torch.linalg.eigh(given["gram"].double())
        half = (p * values.clamp_min(0).sqrt()).T @ d.T  # [in, out], as T dW
        square = half @ half.T
    return torch.linalg.eigvalsh(square).flip(0).clamp_min(0)


def left(delta, given: dict, lr_a, lr_b) -> float:
    """||X (D.T - lr_a lr_b)||_F^2 in fp64, a slice of outputs at a time."""
    total = 0.0
    for start in range(0, len(delta), 1024):
        at = slice(start, start + 1024)
        rest = delta[at].double().T - lr_a.double() @ lr_b[:, at].double()
        if "rows" in given:
            total += float((given["rows"].double() @ rest).square().sum())
        else:
            total += float((given["gram"].double() @ rest * rest).sum())
    return total
