"""Does the exported folder give the solved model's logits? Asked in a fresh process.

A fresh process has only what the folder holds: a missing file, a wrong name or a tensor that
Transformers would fill with noise shows here, before the folder gets its final name. Both sides
run in fp32 and by the definition of every op: in 16 bits, or on a fast kernel, one activation
rounded the other way moves its token by a percent. Kernels have tests of their own.
"""

import contextlib
import errno
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from masquant_cli.errors import CheckError, EnvironmentProblem
from masquant_cli.machine import give_back_memory
from masquant_cli.models.checkpoint import open_checkpoint, read_headers
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.models.skeleton import Skeleton, build
from masquant_cli.rundir import disk_errors
from masquant_cli.runtime.pack import SUFFIXES
from masquant_cli.stages.job import Job
from masquant_cli.stages.memory import machine_memory
from masquant_cli.stages.probes import load_probes
from masquant_cli.stages.reference import reference_logits
from masquant_cli.stages.walk import IDS, POSITIONS, Probes, flatten

COMPARED = 64  # tokens per probe whose logits are compared, at most
# Bytes in fp32 up to which the export is loaded as a whole; beyond, layer by layer.
WHOLE = 2_000_000_000
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "memoryerror")
PULSE = 5  # seconds between two signs that the second process still works
# A child must not take itself for one of the ranks.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Fresh:
    """A process that waits to be asked, and what it says on stderr."""

    process: subprocess.Popen
    said: IO[str]


@contextlib.contextmanager
def fresh_process(job: Job) -> Iterator[Fresh]:
    """A process that is about to be asked; what it imports takes long, so it starts early."""
    command = [sys.executable, "-m", "masquant_cli.stages.fresh", job.float.family.model_type]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
            text=True,
            env={key: value for key, value in os.environ.items() if key not in RANKS},
        ) as process,
    ):
        try:
            yield Fresh(process, said)
        finally:
            process.kill()
            with contextlib.suppress(OSError):  # what it was to read, it cannot any more
                process.stdin.close()


def verify(job: Job, folder: Path, fresh: Fresh) -> dict[str, float]:
    """Relative logit error, ||y - y_ref|| / ||y_ref||, per kind of input.

    Over `COMPARED` tokens of each, chosen by the recipe's seed. Raises CheckError when an
    error exceeds the recipe's tolerance or the folder does not load.
    """
    probes = load_probes(job)
    job.progress.stage("verify", len(job.layers), "layers")
    tokens, modalities = token_ids_of(job.float.config), job.recipe.modalities
    ids = {k: modality_ids(p["input_ids"], tokens, modalities) for k, p in probes.items()}
    positions = {k: _positions(p["attention_mask"], job.recipe.seed) for k, p in probes.items()}
    skeleton = in_fp32(job.float)
    probes = {kind: _given(skeleton, inputs) for kind, inputs in probes.items()}
    with tempfile.TemporaryDirectory() as scratch, disk_errors(Path(scratch), "TMPDIR"):
        kept = Path(scratch) / "reference.safetensors"
        save_file(reference_logits(job, skeleton, probes, ids, positions), kept)
        asked = {
            kind: {**inputs, IDS: ids[kind], POSITIONS: positions[kind]}
            for kind, inputs in probes.items()
        }
        logits = _ask(job, fresh, folder, asked, Path(scratch))
        reference = load_file(kept)
    errors = {}
    for kind, expected in reference.items():
        error = float((logits[kind] - expected).norm() / expected.norm().clamp_min(1e-30))
        errors[kind] = error
        if not error <= job.recipe.export.tolerance:
            raise CheckError(
                f"reloaded logits differ from the reference by {error:.2e} relative "
                f"({kind} input, tolerance {job.recipe.export.tolerance:g})",
                where=str(folder),
                hint="the folder is kept under this name for inspection; please report this",
            )
    return errors


def in_fp32(skeleton: Skeleton) -> Skeleton:
    """The same model, computing in fp32."""
    if skeleton.dtype == torch.float32:
        return skeleton
    model = build(skeleton.config, skeleton.family, torch.float32)
    checkpoint = open_checkpoint(skeleton.path, model)
    for name, buffer in list(model.named_buffers()):
        path, _, own = name.rpartition(".")
        kept = checkpoint.read(name, buffer.dtype) if name in checkpoint.stored else buffer
        model.get_submodule(path)._buffers[own] = kept.to(skeleton.device)
    return replace(skeleton, model=model, checkpoint=checkpoint, dtype=torch.float32)


def fits(folder: Path, tokens: int, limit: int | None) -> bool:
    """Whether the exported folder may be loaded as a whole: in fp32, with the logits of the longest
    probe and its files (which are mapped), it stays below WHOLE and below half of the memory."""
    stored = read_headers(folder).values()
    weights = sum(s.nbytes if s.key.endswith(SUFFIXES) else 4 * s.numel for s in stored)
    files = sum(s.nbytes for s in stored)
    vocabulary = max((s.shape[0] for s in stored if len(s.shape) == 2), default=0)
    needed = weights + files + 8 * tokens * vocabulary
    return needed <= min(WHOLE, (limit or machine_memory()) // 2)


def _given(skeleton: Skeleton, probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model is called with: kinds of tokens only where it knows them."""
    known = inspect.signature(skeleton.model.forward).parameters
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in probe.items()
        if name in known or not name.endswith("token_type_ids")
    }


def _positions(mask: Tensor, seed: int) -> Tensor:
    """int64 [k], ascending: at most COMPARED of the real tokens of a mask [B, T]."""
    real = mask.flatten().nonzero()[:, 0]
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    return real[order[:COMPARED]].sort().values


def _ask(job: Job, fresh: Fresh, folder: Path, asked: Probes, scratch: Path) -> dict[str, Tensor]:
    paths = [folder, scratch / "inputs.safetensors", scratch / "logits.safetensors"]
    save_file(flatten(asked), paths[1])
    longest = max(inputs["input_ids"].numel() for inputs in asked.values())
    request = {
        "paths": list(map(str, paths)),
        "device": str(job.float.device),
        "whole": fits(folder, longest, job.recipe.resources.max_bytes),
    }
    give_back_memory()  # the child needs it
    if job.float.device.type == "cuda":
        torch.cuda.empty_cache()
    process = fresh.process
    with contextlib.suppress(BrokenPipeError):  # it ended already, and has said why
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=PULSE)
        job.progress.advance(0)
    if process.returncode == 0:
        return load_file(paths[2])
    fresh.said.seek(0)
    reason = (fresh.said.read().strip().splitlines() or ["no output"])[-1]
    if "no space left" in reason.lower():
        raise OSError(errno.ENOSPC, reason)
    if process.returncode == -signal.SIGKILL or any(s in reason.lower() for s in OUT_OF_MEMORY):
        raise EnvironmentProblem(
            "there is too little memory to verify the export in a second process",
            where=str(folder),
            hint="free memory and run again, or set export.verify=false",
        )
    raise CheckError(
        f"the exported folder does not load in a fresh process: {reason}",
        where=str(folder),
        hint="the folder is kept under this name for inspection",
    )
