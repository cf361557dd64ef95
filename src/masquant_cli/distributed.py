"""Several processes on one run: `torchrun --nproc-per-node N -m masquant_cli run ...`.

A `World` says which process (rank) this is, and moves objects and tensors between ranks. The one
for a single process does next to nothing and needs no torch; ranks.py has that for several.
docs/distributed.md says what users see.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from masquant_cli.errors import EnvironmentProblem, RecipeError
from masquant_cli.progress import Progress

T = TypeVar("T")
TIMEOUT = "MASQUANT_RANK_TIMEOUT"  # seconds that a rank may go without a sign of life


class World:
    """The processes of this run: `rank` of `size`. One alone never touches torch.distributed.

    What ranks exchange, they must all ask for in the same order.
    """

    rank = 0
    size = 1
    local_size = 1  # processes of this world on this machine

    @property
    def main(self) -> bool:
        """Whether this process holds the lock, writes manifests and the export, and speaks."""
        return self.rank == 0

    def pulse(self) -> None:
        """Say that this rank is getting on."""

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While open, this rank says by itself that it is getting on: for downloads, which do."""
        yield

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; only rank 0 calls it."""
        return make()

    def all_gather(self, mine: T) -> list[T]:
        """Every rank's (small, picklable) object, in the order of ranks."""
        return [mine]

    def barrier(self, folder: Path | None = None) -> None:
        """Go on when every rank has come here, and see what the others wrote in `folder`."""
        self.all_gather(None)
        if folder is not None and self.size > 1:  # opening a folder makes NFS look again
            with suppress(FileNotFoundError):  # a stage of which nobody wrote anything yet
                for path in (folder.parent, folder, *folder.glob("*/")):
                    os.listdir(path)

    def collect(self, owner: int, tensors: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """On the owner, every rank's tensors (of the same names), in the order of ranks, so that
        sums repeat to the bit. Nothing on the others. To be iterated on every rank.
        """
        yield tensors

    def use(self, device: str) -> None:
        """Take this rank's share of the machine: its GPU, or its part of the cores."""

    def check_shared(self, folder: Path) -> None:
        """Raise EnvironmentProblem unless every rank sees the folder that rank 0 writes to."""

    def ending(self, failure: dict) -> tuple[dict, bool]:
        """Why the run ends, given why this rank does, and whether this rank should print it.

        A failure has `message`, `where`, `hint` and `exit_code`.
        """
        return failure, True

    def leave(self) -> None:
        """The work is done."""


def deal(costs: Sequence[float], size: int) -> list[int]:
    """Which of `size` ranks gets each item, so that none gets much more than its share: the
    costliest first, each to the rank with the least so far. Equal items go round in turn."""
    loads, ranks = [0.0] * size, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(size), key=lambda r: (loads[r], r))
        ranks[item] = rank
        loads[rank] += costs[item]
    return ranks


class _Pulsing:
    """Progress whose every step is also a sign of life to the other ranks."""

    def __init__(self, progress: Progress, world: World):
        self.progress, self.world = progress, world

    def stage(self, name: str, total: int | None, unit: str) -> None:
        self.world.pulse()
        self.progress.stage(name, total, unit)

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        self.world.pulse()
        self.progress.advance(n, tokens)

    def note(self, text: str) -> None:
        self.progress.note(text)

    def warn(self, text: str) -> None:
        self.progress.warn(text)


def pulsing(progress: Progress, world: World) -> Progress:
    """The same progress, whose steps tell waiting ranks that this one gets on."""
    return progress if world.size == 1 else _Pulsing(progress, world)


_world: World = World()


def world() -> World:
    """The processes that this one works with: itself, unless `join` was called."""
    return _world


def launched() -> bool:
    """Whether torchrun started this process with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> World:
    """Meet the other processes that torchrun started. Raises EnvironmentProblem."""
    global _world
    import torch
    import torch.distributed as dist

    from masquant_cli.ranks import Ranks

    timeout = _timeout()
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=dist.PrefixStore("torch", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise EnvironmentProblem(
            f"the ranks do not find each other: {str(error).splitlines()[0]}",
            where=f"rank {os.environ.get('RANK')} on {socket.gethostname()}",
            hint="check torchrun's --nnodes and --rdzv-endpoint, and that the hosts reach each "
            "other; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network",
        ) from error
    _world = Ranks(dist.PrefixStore("masquant", store), rank, size, timeout)
    _world.barrier()  # who is who is known
    return _world


def _timeout() -> float:
    text = os.environ.get(TIMEOUT, "3600")
    with suppress(ValueError):
        if (seconds := float(text)) > 0:
            return seconds
    raise RecipeError(f"{text!r} is not a number of seconds", where=TIMEOUT, hint=f"{TIMEOUT}=3600")
