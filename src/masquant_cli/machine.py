"""What a stage cost: wall seconds, and peak memory of this process and of its GPU."""

import contextlib
import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Cost:
    seconds: float = 0.0
    peak_bytes: int = 0
    peak_gpu_bytes: int = 0


@contextlib.contextmanager
def measure() -> Iterator[Cost]:
    """Fill in a `Cost` when the block ends. The peak is the block's own on Linux."""
    cost = Cost()
    give_back_memory()
    _reset_peak()
    cuda = _cuda()
    if cuda:
        cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield cost
    cost.seconds = round(time.perf_counter() - start, 3)
    cost.peak_bytes = _peak()
    if cuda:
        cost.peak_gpu_bytes = cuda.max_memory_allocated()


def give_back_memory() -> None:
    """Return freed memory to the system; glibc keeps what lies below something that is in use."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _cuda():
    """torch.cuda where it is loaded and has a device; measuring must not import torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(text for text in lines if text.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
