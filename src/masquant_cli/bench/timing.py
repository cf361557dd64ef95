"""Medians of interleaved repeats: what disturbs one of the compared disturbs all alike.

CPU: wall clock over as many calls as fill a few milliseconds; callers rotate their weights so
that those do not stay in the cache. GPU: events around one replay of a CUDA graph (so that
launches from Python are not what is timed), the L2 cache overwritten before each.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from masquant_cli.bench.about import cache_bytes

Run = Callable[[int], object]  # run(i): the i-th call, which chooses among rotated operands


@dataclass(frozen=True)
class Timed:
    seconds: float  # of one call, median
    spread: float  # (third quartile - first) / median
    how: str  # wall clock | CUDA graph | CUDA events


@dataclass(frozen=True)
class Clock:
    device: torch.device
    repeats: int = 15
    fill: float = 2e-3  # seconds of work behind one reading of the CPU's clock
    graphs: bool = True

    def times(self, runs: Mapping[str, Run]) -> dict[str, Timed]:
        """Time every run, `repeats` rounds of all of them in alternating order."""
        if self.device.type == "cuda":
            flush = torch.empty(4 * cache_bytes(self.device), dtype=torch.int8, device=self.device)
            stopwatches = {name: _Events(run, self, flush) for name, run in runs.items()}
        else:
            stopwatches = {name: _Wall(run, self) for name, run in runs.items()}
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(self.repeats):
            for name in list(runs)[:: 1 if repeat % 2 == 0 else -1]:
                taken[name].append(stopwatches[name].once())
        return {
            name: Timed(statistics.median(seconds), _spread(seconds), stopwatches[name].how)
            for name, seconds in taken.items()
        }

    def probe(self, run: Run) -> float:
        """Seconds of one call after one to warm up: enough to tell what is hopeless."""
        run(0)
        self.wait()
        start = time.perf_counter()
        run(1)
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Wall:
    how = "wall clock"

    def __init__(self, run: Run, clock: Clock):
        self.run, self.count = run, 0
        once = min(clock.probe(run), clock.probe(run))
        self.calls = max(1, min(200, round(clock.fill / max(once, 1e-7))))

    def once(self) -> float:
        first, run = self.count, self.run
        self.count += self.calls
        start = time.perf_counter()
        for call in range(first, self.count):
            run(call)
        return (time.perf_counter() - start) / self.calls


class _Events:
    def __init__(self, run: Run, clock: Clock, flush: torch.Tensor):
        self.run, self.device, self.flush = lambda: run(0), clock.device, flush
        self.how = "CUDA events"
        for _ in range(3):
            self.run()
        clock.wait()
        if clock.graphs:
            self._capture()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.kept = self.run()  # the graph writes there again and again
        except RuntimeError:  # some implementation waits for the device: time its launches too
            torch.cuda.synchronize(self.device)
            return
        self.run, self.how = graph.replay, "CUDA graph"

    def once(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        self.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _spread(seconds: list[float]) -> float:
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4)
    return (high - low) / middle
