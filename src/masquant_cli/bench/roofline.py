"""What this machine can do at best, measured: bandwidth by a large copy, peaks by matmuls.

    floor seconds = max(flops / peak, bytes / bandwidth)

An implementation at fraction 1 of it cannot be improved; above 1, what was measured was no peak:
torch has no fast integer product on this device, or operands came from a cache.
"""

import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial

import torch

from masquant_cli.bench.timing import Clock


@dataclass(frozen=True)
class Roof:
    bandwidth: float  # bytes per second, read plus written
    peaks: dict[str, float]  # operations per second by operand type

    def floor(self, flops: float, moved: float, kind: str) -> float:
        """Least seconds for this work; `kind` is float32 | bfloat16 | float16 | int8 | float8."""
        peak = self.peaks.get(kind) or max(self.peaks.values())
        return max(flops / peak, moved / self.bandwidth)

    def as_dict(self) -> dict:
        return asdict(self)


def measure_roof(device: torch.device, small: bool = False) -> Roof:
    """`small`: sizes for tests of the code, whose results mean nothing."""
    cuda = device.type == "cuda"
    size = 256 if small else 8192 if cuda else 2048
    count = 2**16 if small else 2**30 if cuda else 2**28  # bytes
    clock = Clock(device)
    source = torch.ones(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * count / _best(clock, partial(target.copy_, source))
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if cuda else (torch.float32,):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        peaks[name] = 2 * size**3 / _best(clock, partial(torch.mm, a, b))
    size = size if cuda else 256  # without VNNI torch is slow at it, and larger is not faster
    q = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
    w = q.t() if cuda else q
    seconds = _best(clock, partial(torch._int_mm, q, w))
    # An integer product can always be had in floats (of up to 24 bits, exactly).
    peaks["int8"] = max(2 * size**3 / seconds, peaks["float32"])
    if cuda and torch.cuda.get_device_capability(device) >= (8, 9):
        f = torch.randn(size, size, device=device).to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        product = partial(torch._scaled_mm, f, f.t(), one, one, out_dtype=torch.bfloat16)
        peaks["float8"] = 2 * size**3 / _best(clock, product)
    return Roof(bandwidth, peaks)


def _best(clock: Clock, run) -> float:
    """Median of five: not the minimum, which a timer's granularity can make too good."""
    taken = []
    for _ in range(7):
        clock.wait()
        start = time.perf_counter()
        run()
        clock.wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])
