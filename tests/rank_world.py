"""Starts a few processes as torchrun would, in a second instead of ten.

The store lives in the test's process, as torchrun's lives in its own, and workers are forked from
a server that has imported everything once.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path

import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed", "rank_imports", "rank_jobs"])


@dataclass
class Launched:
    """The workers of one launch, and where they write."""

    processes: list
    folder: Path
    store: object  # lives as long as they do

    def wait(self, seconds: float = 60) -> list[int | None]:
        """Exit codes by rank; negative for a signal, None for one that had to be killed."""
        codes = []
        for process in self.processes:
            process.join(seconds)
            codes.append(process.exitcode)
            if process.exitcode is None:
                process.kill()
        return codes

    def said(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text()

    def printed(self, rank: int) -> str:
        return (self.folder / f"{rank}.out").read_text()


def launch(folder: Path, work: Callable, *args, size: int = 2, **environment: str) -> Launched:
    """Run `work(*args)`, a function of an importable module, in `size` processes; what it returns
    is their exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    _start_server()
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False,
                          timeout=timedelta(seconds=30))  # fmt: skip
    common = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        **environment,
    }  # fmt: skip
    processes = []
    for rank in range(size):
        own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _context.Process(target=_work, args=(work, args, own, str(folder / str(rank))))
        process.start()
        processes.append(process)
    return Launched(processes, folder, store)


def _start_server() -> None:
    """Python 3.11's server looks for what it imports where PYTHONPATH says, and nowhere else."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _work(work: Callable, args: tuple, environment: dict[str, str], output: str) -> None:
    os.environ |= environment
    for stream, descriptor, name in ((sys.stdout, 1, "out"), (sys.stderr, 2, "err")):
        stream.flush()
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        stream.reconfigure(line_buffering=True)
    try:
        code = work(*args)
    except Exception:
        traceback.print_exc()
        code = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)
