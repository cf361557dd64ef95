"""Several processes on one stage: which layers are whose, and how statistics come together."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from masquant_cli import shards
from masquant_cli.algo.statistics import InputStatistics
from masquant_cli.distributed import World, deal
from masquant_cli.models.sites import LayerSites
from masquant_cli.stages.job import Job

K = TypeVar("K", bound=Hashable)
TOGETHER = 64 << 20  # bytes of statistics that travel at once, unless a single one has more


@dataclass(frozen=True)
class Share:
    """Indices of the layers that are not finished, and those of them that are this rank's."""

    todo: tuple[int, ...]
    mine: tuple[int, ...]


def share(job: Job, files: Sequence[Path], fingerprint: str, *, alone: bool = False) -> Share:
    """Deal out the unfinished layers, whose `files` are those of all layers; `alone` gives them all
    to rank 0. Asked for by every rank, before `begin`."""
    todo = job.world.from_main(  # one view of the disk: ranks must agree
        lambda: [i for i, path in enumerate(files) if not shards.is_done(path, fingerprint)]
    )
    owners = deal([cost(job.layers[i]) for i in todo], 1 if alone else job.world.size)
    mine = (i for i, owner in zip(todo, owners, strict=True) if owner == job.world.rank)
    return Share(tuple(todo), tuple(mine))


def begin(job: Job, stage: str, share: Share) -> None:
    """Tell the progress that the share is taken up."""
    finished, several = len(job.layers) - len(share.todo), job.world.size > 1
    job.progress.stage(
        stage, finished + len(share.mine), "layers of rank 0" if several else "layers"
    )
    job.progress.advance(finished)


def cost(layer: LayerSites) -> float:
    """What solving a layer takes, relative to others: products of Grams and rows with weights."""
    return sum(s.in_features * (s.in_features + sum(s.out_features)) for s in layer.sites)


def merged(
    world: World, owner: int, gathered: dict[K, InputStatistics]
) -> dict[K, InputStatistics]:
    """The statistics of all ranks' tokens, on their owner; nothing on the others.

    Sums are taken in the order of ranks, whoever the owner is, so that they repeat to the bit.
    """
    if world.size == 1:
        return gathered
    total: dict[K, InputStatistics] = {}
    for keys in list(_parcels(gathered)):
        mine = {
            f"{i}.{part}": tensor
            for i, key in enumerate(keys)
            for part, tensor in gathered[key].state().items()
        }
        if world.rank == owner:
            total |= {key: gathered[key].empty() for key in keys}
        for theirs in world.collect(owner, mine):
            for i, key in enumerate(keys):
                parts = gathered[key].state()
                total[key].merge({part: theirs[f"{i}.{part}"] for part in parts})
        for key in keys:
            del gathered[key]  # at most one parcel is in memory twice
    return total


def _parcels(gathered: Mapping[K, InputStatistics]) -> Iterator[list[K]]:
    """Keys of statistics that travel together; the same on every rank, whatever it has seen."""
    parcel: list[K] = []
    size = 0
    for key, one in gathered.items():
        nbytes = 4 * one.width * (one.keep + (one.width if one.with_gram else 0))
        if parcel and size + nbytes > TOGETHER:
            yield parcel
            parcel, size = [], 0
        parcel.append(key)
        size += nbytes
    if parcel:
        yield parcel
