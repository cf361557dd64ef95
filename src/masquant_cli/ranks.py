"""A world of more than one process, on torch.distributed (gloo, nccl).

Tensors go from rank to rank through torch.distributed. Small objects go through torchrun's store,
and whoever has to wait asks it in a Python loop: so every rank sees within a second that another
one failed, died or fell silent, and none sits in C++, deaf to signals, for longer than a transfer.
"""

import contextlib
import json
import os
import pickle
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from masquant_cli.distributed import TIMEOUT, T, World
from masquant_cli.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EnvironmentProblem,
    MasquantError,
)

LONGEST_PAUSE = 0.05  # seconds between two looks at the store
SHOWN_AFTER = 5.0  # seconds that network file systems may take to show a new file
AGAIN = "run the same command again: finished layers and stages are kept"


class AnotherFailed(MasquantError):
    """This rank ends because another one did; it says what that one said."""

    def __init__(self, record: dict):
        super().__init__(record["message"], where=record["where"], hint=record["hint"])
        self.exit_code = record["exit_code"]


class Ranks(World):
    """A world of more than one process. Made by `join`."""

    def __init__(self, store, rank: int, size: int, timeout: float):
        self.rank, self.size = rank, size
        self.local_size = int(os.environ["LOCAL_WORLD_SIZE"])
        self._store, self._timeout = store, timeout
        self._turn = self._pulses = 0
        self._pulsed = 0.0
        self._host = socket.gethostname()
        self._store.set(f"who/{rank}", json.dumps([self._host, os.getpid()]))

    def pulse(self) -> None:
        if time.monotonic() - self._pulsed > 1:
            self._pulsed = time.monotonic()
            self._pulses += 1
            with _lost_torchrun():
                self._store.set(f"pulse/{self.rank}", str(self._pulses))

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        done = threading.Event()

        def beat() -> None:
            with contextlib.suppress(EnvironmentProblem):  # the main thread will see for itself
                while not done.wait(1):
                    self.pulse()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def from_main(self, make: Callable[[], T]) -> T:
        key = self._next()
        if self.rank == 0:
            made = make()
            self._put(key, made)
            return made
        return self._get(key, peer=0)

    def all_gather(self, mine: T) -> list[T]:
        key = self._next()
        self._put(f"{key}/{self.rank}", mine)
        return [
            mine if r == self.rank else self._get(f"{key}/{r}", peer=r) for r in range(self.size)
        ]

    def collect(self, owner: int, tensors: dict[str, Any]) -> Iterator[dict[str, Any]]:
        key = self._next()
        if self.rank != owner:
            self._send(f"{key}/{self.rank}", owner, tensors)
            return
        for peer in range(self.size):
            yield tensors if peer == owner else self._receive(f"{key}/{peer}", peer, tensors)

    def _send(self, key: str, owner: int, tensors: dict) -> None:
        import torch.distributed as dist

        self._put(key, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
        self._get(f"{key}/go", peer=owner)  # so that nobody blocks in C++, deaf to signals
        with self._translated(owner):
            for tensor in tensors.values():
                if tensor.numel():
                    dist.send(tensor.contiguous(), owner)

    def _receive(self, key: str, peer: int, like: dict) -> dict:
        import torch
        import torch.distributed as dist

        offered = self._get(key, peer)
        found = {
            name: torch.empty(shape, dtype=dtype, device=like[name].device)
            for name, (shape, dtype) in offered.items()
        }
        self._put(f"{key}/go", None)
        with self._translated(peer):
            for tensor in found.values():
                if tensor.numel():
                    dist.recv(tensor, peer)
        return found

    def use(self, device: str) -> None:
        import torch

        local = int(os.environ["LOCAL_RANK"])
        if device == "cuda" and torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                raise EnvironmentProblem(
                    f"{self.local_size} processes share {torch.cuda.device_count()} GPUs",
                    where=f"rank {self.rank} on {self._host}",
                    hint="use --nproc-per-node with the number of GPUs, or --set device=cpu",
                )
            torch.cuda.set_device(local)
        if not _threads_chosen():
            torch.set_num_threads(max(1, _cores() // self.local_size))

    def check_shared(self, folder: Path) -> None:
        mark = folder / ".shared"
        token = self.from_main(lambda: _leave_mark(mark))
        seen = self.all_gather(_sees(mark, token))
        hosts = [json.loads(self._store.get(f"who/{r}"))[0] for r in range(self.size)]
        if self.rank == 0:
            mark.unlink(missing_ok=True)
        if blind := [r for r, sees in enumerate(seen) if not sees]:
            raise EnvironmentProblem(
                f"rank {blind[0]} on {hosts[blind[0]]} does not see the run directory of rank 0",
                where=f"{hosts[0]}:{folder.resolve()}" if self.main else str(folder),
                hint="all ranks need the same --run-dir, on a file system that all of them share",
            )

    def ending(self, failure: dict) -> tuple[dict, bool]:
        try:
            if failure["exit_code"] == EXIT_TERMINATED:  # also what torchrun does when one died
                failure = self._died() or failure
            everywhere = failure["exit_code"] in (EXIT_INTERRUPTED, EXIT_TERMINATED)
            named = (failure["where"] or "").startswith("rank ")
            if self.rank and not everywhere and not named:
                here = f"rank {self.rank} on {self._host}"
                failure = {**failure, "where": ", ".join(filter(None, (here, failure["where"])))}
            mine = json.dumps([self.rank, failure])
            found = self._store.compare_set("failure", "", mine).decode()
            self._store.set(f"left/{self.rank}", "")
            first, why = json.loads(found)
            spoken = f"spoken/{self._host}"
            bug = why["exit_code"] == EXIT_BUG  # whose traceback only that rank has
            if self.rank == first != 0 and not bug:  # people look at rank 0; it may be busy, though
                end = time.monotonic() + 2
                while time.monotonic() < end and not self._store.check([spoken]):
                    time.sleep(LONGEST_PAUSE)
            speaks = self.rank == first or (self.rank == 0 and not bug)
            speaks = speaks and self._store.add(spoken, 1) == 1
            return why, speaks
        except RuntimeError:  # torchrun is gone
            return failure, self.rank == 0

    def leave(self) -> None:
        import torch.distributed as dist

        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
        dist.destroy_process_group()

    def _next(self) -> str:
        self._turn += 1
        self.pulse()
        return f"turn/{self._turn}"

    def _put(self, key: str, value: object) -> None:
        with _lost_torchrun():
            self._store.set(key, pickle.dumps(value))

    def _get(self, key: str, peer: int) -> Any:
        with _lost_torchrun():
            self._wait(key, peer)
            return pickle.loads(self._store.get(key))

    def _wait(self, key: str, peer: int) -> None:
        pause, heard, pulse, looked = 0.0005, time.monotonic(), b"", time.monotonic()
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            self.pulse()  # who waits for this rank waits for that one
            if (now := time.monotonic()) - looked < 0.2:
                continue
            looked = now
            self._raise_failure()
            if self._is_dead(peer) and not self._store.check([key]):
                self._raise_failure()  # which it may have said before it ended
                raise _death(peer, self._store)
            if self._store.check([f"pulse/{peer}"]):
                last = self._store.get(f"pulse/{peer}")
                heard, pulse = (now, last) if last != pulse else (heard, pulse)
            if now - heard > self._timeout:
                raise EnvironmentProblem(
                    f"rank {peer} has given no sign of life for {self._timeout:g} seconds",
                    where=f"rank {peer}, {_who(peer, self._store)}",
                    hint=f"is its machine stuck? {AGAIN}; {TIMEOUT} sets how long to wait",
                )

    def _raise_failure(self) -> None:
        if self._store.check(["failure"]):
            raise AnotherFailed(json.loads(self._store.get("failure"))[1])

    def _is_dead(self, peer: int) -> bool:
        """Whether a rank on this host is gone without having said why; others are not looked at."""
        host, pid = json.loads(self._store.get(f"who/{peer}"))
        return host == self._host and not _runs(pid) and not self._store.check([f"left/{peer}"])

    def _died(self) -> dict | None:
        for peer in range(self.size):
            if self._is_dead(peer):
                error = _death(peer, self._store)
                return {k: getattr(error, k) for k in ("message", "where", "hint", "exit_code")}
        return None

    @contextlib.contextmanager
    def _translated(self, peer: int) -> Iterator[None]:
        """gloo's and nccl's errors as what they mean: the peer failed, died or is silent."""
        try:
            yield
        except RuntimeError as error:
            with _lost_torchrun():
                end = time.monotonic() + 2  # its parent has to notice, too
                while time.monotonic() < end:
                    self._raise_failure()
                    if self._is_dead(peer):
                        raise _death(peer, self._store) from error
                    time.sleep(LONGEST_PAUSE)
            raise EnvironmentProblem(
                f"the connection to rank {peer} broke: {str(error).splitlines()[0]}",
                where=f"rank {self.rank} on {self._host}",
                hint=f"{AGAIN}; see docs/distributed.md",
            ) from error


@contextlib.contextmanager
def _lost_torchrun() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's errors for stores and networks are of this kind
        raise EnvironmentProblem(
            f"torchrun, which holds the ranks together, is gone: {str(error).splitlines()[0]}",
            where=f"rank {os.environ.get('RANK')} on {socket.gethostname()}",
            hint=AGAIN,
        ) from error


def _death(rank: int, store) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"rank {rank} died",
        where=f"rank {rank}, {_who(rank, store)}",
        hint=f"it was killed, perhaps for want of memory (dmesg says so). {AGAIN}",
    )


def _who(rank: int, store) -> str:
    host, pid = json.loads(store.get(f"who/{rank}"))
    return f"process {pid} on {host}"


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return not Path("/proc/self").exists()  # no such file system: not known to be dead
    except OSError:
        return True


def _leave_mark(mark: Path) -> str:
    mark.write_text(token := secrets.token_hex(8))
    return token


def _sees(mark: Path, token: str) -> bool:
    end = time.monotonic() + SHOWN_AFTER
    while True:
        with contextlib.suppress(OSError):
            if mark.read_text() == token:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(LONGEST_PAUSE)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads_chosen() -> bool:
    """Whether someone set OMP_NUM_THREADS. torchrun sets it to 1 for its processes where nobody
    did, so what counts is what torchrun itself was started with."""
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return True
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    return any(entry.startswith(b"OMP_NUM_THREADS=") for entry in started_with.split(b"\0"))
