"""Nothing is timed before it agrees with the reference on the very inputs it is timed on.

    relative error = ||found - expected||_2 / ||expected||_2      largest = max |found - expected|

Integers must be equal, or (where a sum of floats decides a tie) one step apart on a stated tiny
share. A backend writes into poisoned outputs: what it forgets to write is seen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from masquant_kernels import dispatch, reference
from torch import Tensor

PER_TOKEN = ("x", "residual", "up", "q", "scale", "u", "h", "modality")
CHECKED_TOKENS = 64  # tokens do not see each other: a sample of them is as good as all
TIES = 1e-3  # share of integers that may be one step off behind a norm or a silu


@dataclass(frozen=True)
class Check:
    ok: bool
    relative: float  # of the worst output
    largest: float
    what: str = ""  # what is wrong

    def as_dict(self) -> dict:
        return {
            "ok": self.ok,
            "relative_error": self.relative,
            "max_error": self.largest,
            **({"what": self.what} if self.what else {}),
        }


def tolerance(dtype: torch.dtype, columns: int, low_rank: bool = False) -> float:
    """Of the relative error. Rounding to `dtype` costs less than its eps / 2 on every element;
    fp32 sums over `columns` drift like sqrt(columns) eps. The operands of low rank may be rounded
    on their way: to 11 bits with a shared scale on a CPU, to bf16 where activations have 16 bits.
    """
    eps = max(torch.finfo(dtype).eps, 4 * columns**0.5 * torch.finfo(torch.float32).eps)
    if not low_rank:
        return eps
    rounded = torch.float16 if dtype == torch.float32 else torch.bfloat16
    return max(eps, torch.finfo(rounded).eps)


def floats(found: Tensor, expected: Tensor, limit: float) -> Check:
    """NaN where NaN is expected and nowhere else; the rest within `limit`, also at its worst."""
    found, expected = found.double(), expected.double()
    if found.shape != expected.shape:
        return Check(False, float("inf"), float("inf"), f"shape {tuple(found.shape)}")
    bad = torch.isnan(expected)
    if not torch.equal(torch.isnan(found), bad):
        return Check(False, float("inf"), float("inf"), "NaN in the wrong places")
    error = (found - expected).masked_fill(bad, 0)
    norm = expected.masked_fill(bad, 0).norm().item()
    relative = error.norm().item() / norm if norm else error.norm().item()
    largest = error.abs().max().item() if error.numel() else 0.0
    peak = expected.masked_fill(bad, 0).abs().max().item() if expected.numel() else 0.0
    ok = relative <= limit and largest <= 8 * limit * peak
    what = "" if ok else f"relative error {relative:.1e}, largest {largest:.1e}, limit {limit:.1e}"
    return Check(ok, relative, largest, what)


def integers(found: Tensor, expected: Tensor, share: float = 0.0) -> Check:
    """Equal, except one step on at most `share` of them."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return Check(False, float("inf"), float("inf"), f"{found.dtype} {tuple(found.shape)}")
    error = (found.double() - expected.double()).abs()
    largest = error.max().item() if error.numel() else 0.0
    off = (error > 0).double().mean().item() if error.numel() else 0.0
    ok = largest == 0 or (largest <= 1 and off <= share)
    what = "" if ok else f"{off:.1e} of the integers differ, by up to {largest:.0f}"
    return Check(ok, off, largest, what)


def worst(checks: list[Check]) -> Check:
    return min(checks, key=lambda c: (c.ok, -c.relative))


def sample(tokens: int, device) -> Tensor:
    """Rows to check: all, or evenly spread ones with the first and the last."""
    if tokens <= CHECKED_TOKENS:
        return torch.arange(tokens, device=device)
    return torch.linspace(0, tokens - 1, CHECKED_TOKENS, device=device).round().long()


def expected(op: str, given: Mapping, rows: Tensor):
    """What the reference gives for these rows of an op's arguments."""
    chosen = {
        name: value[rows] if name in PER_TOKEN and value is not None else value
        for name, value in given.items()
    }
    return _tuple(getattr(reference, op)(**chosen))


def compare(op: str, given: Mapping, found, rows: Tensor, want, exact: bool = False) -> Check:
    """An op's outputs against the reference's `want` for `rows`; `exact`: nothing may differ."""
    found = [t[rows] for t in _tuple(found)]
    if "smooth_quant" in op:
        # A plain product and a correctly rounded division are exact; a mean or an exp is not.
        exact = given.get("norm_weight") is None and given.get("up") is None
        share = 0.0 if exact else TIES
        limit = 0.0 if exact else tolerance(torch.float32, given["x"].shape[1])
        checks = [integers(found[0], want[0], share), floats(found[1], want[1], limit)]
        return worst([*checks, *(floats(a, b, 0.0) for a, b in zip(found[2:], want[2:], strict=1))])
    columns = next(iter(given.values())).shape[1]
    dtype = want[0].dtype
    low_rank = op == "lowrank_down" or given.get("h") is not None
    return floats(found[0], want[0], 0.0 if exact else tolerance(dtype, columns, low_rank))


def check_op(op: str, given: Mapping, exact: bool = False) -> tuple[str, Check]:
    """(backend, its check) of the backend that serves this case. What raises has failed.

    The reference serves what nothing else covers; it is not compared with itself.
    """
    first = next(iter(given.values()))
    rows = sample(first.shape[0], first.device)
    want = expected(op, given, rows)
    for backend, function in implementations(op, first.device.type):
        if backend == "reference":
            return backend, Check(True, 0.0, 0.0)
        try:
            found = function(_poisoned(want, first.shape[0]), *given.values())
            if found is NotImplemented:
                continue
            return backend, compare(op, given, found, rows, want, exact)
        except Exception as error:  # whatever a compiler or a driver can raise
            what = f"{type(error).__name__}: {error}"
            return backend, Check(False, float("inf"), float("inf"), what)
    raise AssertionError(f"no backend covers {op}")


def serving(op: str, given: Mapping) -> str:
    """The backend that serves a case, unchecked."""
    made = _tuple(getattr(torch.ops.masquant, op)(*given.values()))
    out = tuple(map(torch.empty_like, made)) if len(made) > 1 else torch.empty_like(made[0])
    device = made[0].device.type
    asked = ((b, f(out, *given.values())) for b, f in implementations(op, device))
    return next(backend for backend, found in asked if found is not NotImplemented)


def implementations(op: str, device: str) -> list[tuple[str, Callable]]:
    """(backend, function) in the order in which a call asks them."""
    order = dispatch.BACKENDS.get(device, ("reference",))
    first = dispatch.backend_of(op, device)  # another than order[0] where one is forced
    rest = order[order.index(first) :] if first in order else (first, "reference")
    found = []
    for backend in rest:
        functions = dispatch.functions(op, device, backend)  # this one if it has the op, reference
        if backend == "reference" or len(functions) > 1:
            found.append((backend, functions[0]))
    return found


def _poisoned(want: tuple[Tensor, ...], tokens: int):
    """Outputs for all tokens, filled with what no right answer contains."""
    out = []
    for part in want:
        full = part.new_empty(tokens, *part.shape[1:])
        out.append(full.fill_(77 if part.dtype == torch.int8 else torch.nan))
    return tuple(out) if len(out) > 1 else out[0]


def _tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)
