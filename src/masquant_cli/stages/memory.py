"""How much memory calibration may use for hidden states: what its other needs leave."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from masquant_cli.stages.job import Job

SPARE = 0.1  # of the limit, for what is not counted
PER_PATCH = 4 * 4  # patches that a vision token is merged from, and tensors of that width alive
SCORES = 64 << 20  # bytes of attention's own blocks and of temporaries


def room_for_hidden(job: Job) -> int:
    """Bytes: the limit less this process as it is now, and less the larger of what embedding and
    what one decoder layer take. At least 0, which puts all on disk."""
    if job.float.device.type != "cpu":
        return room(job)
    layer = max(layer_bytes(job, i) for i in {0, len(job.layers) // 2, len(job.layers) - 1})
    embedding = embedding_bytes(job) if embeds_at_once(job) else 0
    return max(0, room(job) - max(embedding, layer))


def room(job: Job) -> int:
    """Bytes that are left of the recipe's limit, or of the machine's memory."""
    return int(budget(job) * (1 - SPARE)) - resident()


def budget(job: Job) -> int:
    """Bytes that this process may use: the recipe's limit or the machine's memory, shared with
    the run's other processes on this machine."""
    limit = job.recipe.resources.max_bytes
    return limit // job.world.local_size if limit else machine_memory()


def embeds_at_once(job: Job) -> bool:
    """Whether there is room for the towers and the embeddings, all at once."""
    return job.float.device.type != "cpu" or embedding_bytes(job) <= room(job)


def embedding_bytes(job: Job) -> int:
    """All that runs before the first decoder layer: its weights, and activations of a batch."""
    skeleton = job.float
    words = skeleton.model.get_input_embeddings().weight
    found = [skeleton.model.get_parameter(name) for name in skeleton.names_outside_layers()]
    width = max((p.shape[0] for p in found if p.ndim > 1 and p is not words), default=0)
    activations = PER_PATCH * job.recipe.calibration.batch_tokens * width * skeleton.dtype.itemsize
    return sum(p.numel() * p.dtype.itemsize for p in found) + activations


def layer_bytes(job: Job, index: int) -> int:
    """One decoder layer: its weights, its statistics, and the activations of a batch."""
    calibration, modalities = job.recipe.calibration, len(job.recipe.modalities)
    layer, skeleton = job.layers[index], job.float
    statistics = sum(
        4 * modalities * site.in_features
        * (calibration.rows + (site.in_features if site.kind in calibration.gram else 0))
        for site in layer.sites if site.expert is None
    )  # fmt: skip
    widths = sum(s.in_features + sum(s.out_features) for s in layer.sites if s.expert is None)
    activations = calibration.batch_tokens * skeleton.dtype.itemsize * widths
    return skeleton.nbytes(layer.module) + statistics + activations + SCORES


def machine_memory() -> int:
    """Bytes that this process may use, what it has included: its share of the machine's free
    memory, within its share of what its control groups allow."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    allowed = [int(line) for file in _limits() for line in _lines(file) if line.isdigit()]
    return min([free // processes + resident(), *(limit // processes for limit in allowed)])


def _limits() -> Iterator[str]:
    """Files that may hold a limit of this process's control groups, of either version."""
    for line in _lines("/proc/self/cgroup"):
        _, kinds, path = line.split(":", 2)
        root, name = ("/sys/fs/cgroup", "memory.max") if not kinds else (None, None)
        if "memory" in kinds.split(","):
            root, name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        if root:
            # A container may see its group as the root, whatever it is called outside.
            for group in (PurePosixPath(path), *PurePosixPath(path).parents):
                yield str(PurePosixPath(f"{root}{group}") / name)


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    for line in _lines("/proc/self/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
