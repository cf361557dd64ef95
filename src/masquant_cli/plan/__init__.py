"""`--dry-run`: what a run would take and give, before anything is spent. Start at `predict`.

The real functions run on shapes alone (work.py), what they would do is written down (tape.py) and
timed operation by operation on this machine (rates.py), or priced for another one (machine.py).
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from masquant_cli.errors import RecipeError
from masquant_cli.models.loading import pick_device
from masquant_cli.plan import subject as subjects
from masquant_cli.plan.coverage import Coverage, cover
from masquant_cli.plan.machine import CARDS, Elsewhere, Here, disk_near, elsewhere
from masquant_cli.plan.stages import Planner
from masquant_cli.recipe import Recipe
from masquant_cli.rundir import STAGES
from masquant_cli.stages.memory import machine_memory, resident


def predict(
    recipe: Recipe,
    run_dir: Path,
    todo: Sequence[str] = STAGES,
    *,
    on: str | None = None,
    processes: int = 1,
    machines: int = 1,
) -> dict[str, Any] | None:
    """What the stages in `todo` would take, json-able; None for a hub model that is not here.

    {"stages": {name: {"seconds", "peak_bytes", "peak_gpu_bytes", "disk_bytes"}}, "seconds",
    "size", "matched", "ignored", "coverage", "problems", ...}. `problems` says what does not fit;
    "written_bytes" of these stages' disk are there from an earlier start.
    `on` names another machine, "h200x8": its numbers are not measured. The run will have so many
    `processes` on so many `machines` like this one; bytes of memory are those of one process.
    Raises RecipeError where `run` would, for what can be told without weights.
    """
    remote = _remote(on)
    device = "cpu" if remote else pick_device(recipe.device).type
    subject = subjects.open_subject(recipe, device)
    if subject is None:
        return None
    if remote and recipe.model.dtype == "auto":
        subject = _in_its_own_dtype(subject)
    covered = cover(subject)
    run_dir, base = Path(run_dir), resident()
    gpu = remote is not None or device == "cuda"
    here = remote.processes if remote else -(-processes // machines)
    limit = _limit(recipe, here, remote)
    with nullcontext() if gpu else _threads_of_one(here):
        place = torch.device(device), run_dir, subject.job.float.checkpoint
        machine = remote or Here(*place, processes)
        planner = Planner(subject, covered, machine, base, limit, gpu)
        stages = {name: planner.stage(name) for name in todo}
        about = _about(remote, device, processes)
    found = {
        "on": about,
        "measured": remote is None,
        "processes": remote.processes if remote else processes,
        "model": {"path": recipe.model.path, "known_from": subject.known_from,
                  "dtype": str(subject.job.float.dtype).removeprefix("torch.")},
        "stages": {name: stage.plain() for name, stage in stages.items()},
        "seconds": round(sum(stage.seconds for stage in stages.values()), 1),
        "size": subjects.size(subject),
        "matched": subjects.matched(subject),
        "ignored": subjects.ignored(subject),
        "coverage": _coverage(recipe, covered),
    }  # fmt: skip
    there = found["written_bytes"] = _written(run_dir, todo)
    found["problems"] = _problems(planner, stages, run_dir, there, remote)
    return found


def _written(run_dir: Path, todo: Sequence[str]) -> int:
    """Bytes that lie where an earlier start of the run left them: kept, or written anew in place.
    Not those of an export, whose files are there twice until the new ones are complete."""
    folders = [run_dir / stage for stage in todo if stage != "export"]
    return sum(p.stat().st_size for f in folders for p in f.rglob("*") if p.is_file())


def _remote(on: str | None) -> Elsewhere | None:
    if on is None:
        return None
    try:
        return elsewhere(on)
    except (KeyError, ValueError):
        raise RecipeError(
            f"no machine is known by the name {on!r}", where="--on",
            hint=f"one of {', '.join(CARDS)}, or several of them: h200x8",
        ) from None  # fmt: skip


def _limit(recipe: Recipe, processes: int, remote: Elsewhere | None = None) -> int:
    """Bytes that one of a machine's processes may use, as stages/memory.py shares them out."""
    if recipe.resources.max_bytes:
        return recipe.resources.max_bytes // processes
    if remote:  # nobody knows its memory
        return sys.maxsize
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's; it is divided by them already
    return machine_memory() * shared // max(shared, processes)


@contextmanager
def _threads_of_one(processes: int) -> Iterator[None]:
    """What is timed has the threads that each of a machine's processes will have."""
    before, cores = torch.get_num_threads(), os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # those that this process may use
        cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, min(before, cores // processes)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_its_own_dtype(subject: subjects.Subject) -> subjects.Subject:
    """On a GPU `dtype: auto` is the checkpoint's."""
    from dataclasses import replace

    linear = subject.job.layers[0].sites[0].linears[0]
    dtype = subject.job.float.checkpoint.stored[f"{linear}.weight"].dtype
    for parameter in subject.job.float.model.parameters():
        parameter.data = parameter.data.to(dtype)
    subject.job.float = replace(subject.job.float, dtype=dtype)
    return subject


def _about(remote: Elsewhere | None, device: str, processes: int) -> str:
    if remote is None:
        where = torch.cuda.get_device_name() if device == "cuda" else "this machine's CPU"
        several = f"{processes} processes of " if processes > 1 else ""
        return f"{where}, {several}{torch.get_num_threads()} threads"
    return f"{remote.processes} x {remote.card.name}, from its peak rates, nothing measured"


def _coverage(recipe: Recipe, covered: Coverage) -> dict[str, Any]:
    least = recipe.calibration.min_tokens
    return {
        "known": covered.known,
        "samples": covered.samples,
        "tokens": covered.tokens,
        "too_few": [m for m, n in covered.tokens.items() if n < least],
        "skipped_long": covered.skipped_long,
    }


def _problems(
    planner: Planner, stages: dict, run_dir: Path, there: int, remote: Elsewhere | None
) -> list[str]:
    """What does not fit, in sentences. `there`: bytes that are on the disk already."""
    found = []
    if remote is None or planner.job.recipe.resources.max_memory:
        for name, stage in stages.items():
            if stage.ram > planner.limit:
                each = " by each of the processes" if planner.machine.processes > 1 else ""
                found.append(
                    f"{name} needs {stage.ram / 1e9:.1f} GB of memory, "
                    f"{planner.limit / 1e9:.1f} GB may be used{each}"
                )
    if remote is None:
        (near, free), disk = disk_near(run_dir), sum(s.disk for s in stages.values())
        if disk - there > free:
            found.append(f"the run writes {disk / 1e9:.1f} GB, {near} has {free / 1e9:.1f} GB left")
    if planner.gpu:
        room = remote.memory if remote else torch.cuda.mem_get_info()[0]
        for name, stage in stages.items():
            if stage.vram > room:
                found.append(
                    f"{name} needs {stage.vram / 1e9:.1f} GB of GPU memory, "
                    f"there are {room / 1e9:.1f} GB"
                )
    return found
