"""Which layers a process solves, where several work on one run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from masquant_cli import shards
from masquant_cli.distributed import deal
from masquant_cli.models.sites import LayerSites
from masquant_cli.stages.job import Job


@dataclass(frozen=True)
class Share:
    """Indices of the layers that are not finished, and those of them that are this rank's."""

    todo: tuple[int, ...]
    mine: tuple[int, ...]


def share(job: Job, files: Sequence[Path], fingerprint: str, *, alone: bool = False) -> Share:
    """Deal out the unfinished layers, whose `files` are those of all layers; `alone` gives them all
    to rank 0. Asked for by every rank."""
    todo = job.world.from_main(  # one view of the disk: ranks must agree
        lambda: [i for i, path in enumerate(files) if not shards.is_done(path, fingerprint)]
    )
    owners = deal([cost(job.layers[i]) for i in todo], 1 if alone else job.world.size)
    mine = (i for i, owner in zip(todo, owners, strict=True) if owner == job.world.rank)
    return Share(tuple(todo), tuple(mine))


def cost(layer: LayerSites) -> float:
    """What solving a layer takes, relative to others: products of Grams and rows with weights."""
    return sum(s.in_features * (s.in_features + sum(s.out_features)) for s in layer.sites)
