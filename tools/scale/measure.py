"""Running timed jobs in processes of their own, and the memory of a tree of processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from scale.machine import ROOT

WORKER = Path(__file__).with_name("worker.py")
TICK = 0.1  # seconds between looks at /proc
PAGE = os.sysconf("SC_PAGE_SIZE")


class Failed(Exception):
    """A measured command did not end well; holds the end of what it said."""


def job(name: str, *, python: str = sys.executable, threads: int = 2, **arguments) -> dict:
    """One job of worker.py: its JSON, with `wall_seconds` and `tree_peak_bytes` from outside."""
    command = [python, str(WORKER), name, json.dumps(arguments)]
    found = watched(command, threads=threads)
    return {**json.loads(found.pop("stdout").strip().splitlines()[-1]), **found}


def watched(
    command: Sequence[str],
    *,
    threads: int = 2,
    interrupt: Callable[[], bool] | None = None,
    log: Path | None = None,
) -> dict:
    """{"stdout", "wall_seconds", "tree_peak_bytes", "rss_peak_bytes", "interrupted"} of a command.

    The tree's peak is the largest sum of resident sets of the process and all its descendants,
    sampled; rss_peak_bytes is the largest VmHWM that any one of them showed. `interrupt` is asked
    at every look; once it says yes the command gets SIGTERM. Raises Failed.
    """
    paths = [str(ROOT / "src"), str(ROOT / "kernels")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(":"),
    }
    began, tree, single, interrupted = time.perf_counter(), 0, 0, False
    # Files, not pipes: nobody reads while the command runs.
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=said)
        try:
            while process.poll() is None:
                now = memory_of_tree(process.pid)
                tree, single = max(tree, now[0]), max(single, now[1])
                if interrupt and not interrupted and interrupt():
                    interrupted = True
                    process.terminate()  # SIGINT is ignored where a shell put us aside
                time.sleep(TICK)
        finally:
            if process.poll() is None:
                for pid in [*descendants(process.pid), process.pid]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        wall = time.perf_counter() - began
        stdout, tail = (read_from_start(file) for file in (out, said))
    if log:
        log.write_text(tail)
    if process.returncode and not interrupted:
        what = " ".join(map(str, command[:4]))
        raise Failed(f"{what} ... ended with {process.returncode}:\n{tail[-3000:]}")
    return {
        "stdout": stdout,
        "wall_seconds": round(wall, 2),
        "tree_peak_bytes": tree,
        "rss_peak_bytes": single,
        "interrupted": interrupted,
        "code": process.returncode,
    }


def read_from_start(file) -> str:
    file.seek(0)
    return file.read()


def memory_of_tree(root: int) -> tuple[int, int]:
    """(sum of resident bytes, largest VmHWM) of a process and its descendants, now."""
    total = most = 0
    for pid in [root, *descendants(root)]:
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except (OSError, IndexError, ValueError):
            continue  # it ended meanwhile
        peak = next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:")), 0)
        most = max(most, peak)
    return total, most


def descendants(root: int) -> list[int]:
    """Every process below `root`, by the kernel's own lists of children."""
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                new = [int(x) for x in children.read_text().split()]
            except OSError:
                continue
            found += new
            waiting += new
    return found
