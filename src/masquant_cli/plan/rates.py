"""Seconds for a tape: its operations are done once each on this machine, in their true shapes.

Operations that would take long are done on a part and scaled; where a budget of time is spent, the
rest is estimated from those that were timed. Start at `Bench.seconds`.
"""

import time
from dataclasses import dataclass, field
from statistics import median
from types import FunctionType

import torch
from torch.nn.functional import scaled_dot_product_attention

from masquant_cli.algo import gptq
from masquant_cli.algo.curvature import of_gram, of_rows
from masquant_cli.plan.tape import Call, Shape, Tape

OVERHEAD = 4e-6  # seconds of a view, or of an operation's call alone
SMALL = 1 << 18  # bytes that are still in the caches where an operation wants them
CACHE = 32 << 20  # bytes, about what a processor's caches hold
LONG = 0.3  # seconds of what is not timed twice
PRODUCT = 1e11  # multiplications and additions per second
ROUNDED = 512  # input channels with which GPTQ is timed
LARGE = 4e8  # rough operations above which a part is timed
CUBIC = ("linalg_eigh", "linalg_eigvalsh", "linalg_cholesky_ex", "linalg_inv_ex", "linalg_solve_ex")
QR = ("linalg_qr", "linalg_svd")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear")


@dataclass
class Bench:
    """Times operations on `device`, at most about `budget` seconds for a tape."""

    device: torch.device
    budget: float = 8.0
    known: dict[Call, float] = field(default_factory=dict)
    other: torch.Tensor = field(default_factory=lambda: torch.zeros(CACHE // 4))

    def seconds(self, tape: Tape) -> float:
        """What the operations of a tape take, one after the other."""
        wanted = sorted(tape.calls, key=lambda c: -tape.calls[c] * _rough(c))
        until, total = time.perf_counter() + self.budget, 0.0
        timed = rough = 0.0
        for call in wanted:
            if _is_view(call):
                total += tape.calls[call] * OVERHEAD
                continue
            if call not in self.known and time.perf_counter() < until:
                self.known[call] = self._measure(call)
            if call in self.known:
                if not isinstance(call.op, FunctionType):
                    timed, rough = timed + self.known[call], rough + _rough(call)
                total += tape.calls[call] * self.known[call]
            else:
                total += tape.calls[call] * _rough(call) * (timed / rough if rough else 1.0)
        return total

    def _measure(self, call: Call) -> float:
        if isinstance(call.op, FunctionType):
            return self._rounding(call)
        part, factor = _smaller(call)
        try:
            with torch.no_grad():
                positional, named = part.arguments
                random = name_of(part) in CUBIC or name_of(part) in QR
                arguments = [self._real(a, random) for a in positional]
                options = {k: self._real(v, random) for k, v in named}
                if "device" in options:
                    options["device"] = self.device
                if "attention" in name_of(part):
                    part = Call(_attention, part.arguments)
                rounds = 2 if _rough(call) > 0.02 else 5
                forgets = SMALL < sum(t.nbytes for t in part.tensors) < CACHE
                part.op(*arguments, **options)
                taken = []
                for _ in range(rounds):
                    self._wait()
                    if forgets:
                        self._forget()
                    began = time.perf_counter()
                    part.op(*arguments, **options)
                    self._wait()
                    taken.append(time.perf_counter() - began)
                return factor * median(sorted(taken)[:3])  # others may have been at work
        except (RuntimeError, IndexError, TypeError, ValueError):
            return _rough(call)

    def _rounding(self, call: Call) -> float:
        """GPTQ: what it learns of the inputs once, then so many outputs at a time.

        Both grow with the channels, and are timed with a few of them; the first grows with their
        cube where it is of a Gram. Products beyond those timed are priced.
        """
        weight, _, rows, _ = call.arguments
        out, width = weight.size
        part = min(out, gptq.outputs_at_once(width, self.device))
        if rows is not None and 3 * rows.size[0] < width:
            columns = min(width, max(ROUNDED, 3 * rows.size[0] + 1))
            once, each = self._rounded(call, part, columns, rows.size[0])
            return (once + each * out / part) * width / columns
        columns = min(width, ROUNDED)
        once, each = self._rounded(call, part, columns, None)
        if width > columns:
            large = min(width, 2 * ROUNDED)
            once = self._rounded(call, 1, large, None)[0] * (width / large) ** 3
            each = each * width / columns + part * width * (width - columns) / PRODUCT
        return once + each * out / part

    def _rounded(self, call: Call, out: int, columns: int, rows: int | None) -> tuple[float, float]:
        """Seconds of what is learned of the inputs, and of rounding [out, columns]."""
        bits, _, *form = call.arguments[3]
        made = torch.randn(out, columns, device=self.device)
        seen = torch.randn(rows or 2 * columns, columns, device=self.device)
        gram, known = (seen.T @ seen, {}) if rows is None else (None, {"rows": seen})
        learn, x = (of_gram, gram) if rows is None else (of_rows, seen)
        turns: list[tuple[float, float]] = []
        while len(turns) < 2 and sum(map(sum, turns)) < LONG:
            self._wait()
            began = time.perf_counter()
            learn(x, 0.01, True, torch.float32)
            self._wait()
            learned = time.perf_counter()
            call.op(made, gram, bits, None, *form, **known)
            self._wait()
            once = learned - began
            turns.append((once, max(0.0, time.perf_counter() - learned - once)))
        return min(turns, key=sum)

    def _forget(self) -> None:
        """Other data into the caches: an operation seldom finds there what it reads."""
        if self.device.type == "cpu":
            self.other.add_(1.0)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _real(self, value, random: bool):
        if isinstance(value, Shape):
            made = torch.empty_strided(
                value.size, value.stride, dtype=value.dtype, device=self.device
            )
            if random and value.dtype.is_floating_point:
                made.normal_()
                if len(value.size) == 2 and value.size[0] == value.size[1]:
                    made.copy_(made @ made.T + torch.eye(len(made), device=made.device))
                return made
            return made.fill_(0 if value.dtype in (torch.int64, torch.int32, torch.bool) else 1)
        if isinstance(value, tuple):
            return [self._real(v, random) for v in value]
        if isinstance(value, torch.device):
            return self.device
        return value


def name_of(call: Call) -> str:
    """ "mm", "linalg_qr", or the name of a function that is timed as a whole."""
    if isinstance(call.op, FunctionType):
        return call.op.__name__
    return call.op._schema.name.rpartition("::")[2].strip("_")


def _is_view(call: Call) -> bool:
    if isinstance(call.op, FunctionType):
        return False
    schema = call.op._schema
    return not schema.is_mutable and any(r.alias_info for r in schema.returns)


def _attention(q, k, v, *_):
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def _rough(call: Call) -> float:
    """A guess in seconds that orders operations, and stands for those that nobody timed."""
    tensors, name = call.tensors, name_of(call)
    sizes = [t.numel for t in tensors]
    if not sizes:
        return OVERHEAD
    if name == "gptq_round":
        out, width = tensors[0].size
        return width * 1e-4 + 2 * out * width**2 / 2e10
    if "attention" in name:
        batch, heads, length, width = tensors[0].size
        return OVERHEAD + 4 * batch * heads * length**2 * width / 2e10
    if name in PRODUCTS and len(tensors) >= 2:
        a, b = tensors[-2], tensors[-1]
        work = a.numel * (b.size[-1] if len(b.size) > 1 else 1)
        return OVERHEAD + 2 * work / (5e10 if a.dtype.itemsize <= 4 else 2.5e10)
    if name in CUBIC:
        n = tensors[0].size[-1]
        batch = tensors[0].numel / max(n * n, 1)
        return OVERHEAD + batch * (15 if "eig" in name else 0.5) * n**3 / 2e10
    if name in QR:
        m, n = tensors[0].size[-2:]
        return OVERHEAD + 4 * tensors[0].numel * min(m, n) / 1e10
    return OVERHEAD + sum(t.nbytes for t in tensors) / 5e9


def _smaller(call: Call) -> tuple[Call, float]:
    """The call on a part of its data, and how much longer the whole takes."""
    whole, name, part = _rough(call), name_of(call), call
    to = side = max((d for t in call.tensors for d in t.size), default=1)
    if name in CUBIC or name in QR:
        to = side = call.tensors[0].size[-1 if name in CUBIC else -2]
    least = 256 if name in CUBIC else 16
    while _rough(part) > LARGE / 5e9 and to > least:
        to = max(least, to * 4 // 5)
        part = _resized(call, side, to)
    if part is call:
        return call, 1.0
    # The work falls with as many powers of the side as there are dimensions of that size.
    return part, (whole - OVERHEAD) / (_rough(part) - OVERHEAD)


def _resized(call: Call, side: int, to: int) -> Call:
    """The call with `to` in the place of every dimension of `side`."""

    def change(value):
        if isinstance(value, Shape):
            size = tuple(to if d == side else d for d in value.size)
            order = sorted(range(len(size)), key=lambda i: -value.stride[i])
            stride, step = [0] * len(size), 1
            for i in reversed(order):
                stride[i] = 0 if value.stride[i] == 0 and value.size[i] > 1 else step
                step *= size[i] if stride[i] else 1
            return Shape(size, tuple(stride), value.dtype)
        if isinstance(value, tuple):
            return tuple(map(change, value))
        return value

    return Call(call.op, change(call.arguments))
