"""Does the exported folder give the solved model's logits? Asked in a fresh process.

A fresh process has only what the folder holds: a missing file, a wrong name or a tensor that
Transformers would fill with noise shows here, before the folder gets its final name. Both sides
run in fp32 and by the definition of every op: in 16 bits, or on a fast kernel, one activation
rounded the other way moves its token by a percent. Kernels have tests of their own.
"""

import contextlib
import errno
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from masquant_kernels import dispatch
from safetensors.torch import load_file, save_file

from masquant_cli.errors import CheckError, EnvironmentProblem
from masquant_cli.rundir import disk_errors
from masquant_cli.stages.job import Job
from masquant_cli.stages.probes import flatten, load_probes, unflatten
from masquant_cli.stages.reference import reference_logits


def verify(job: Job, folder: Path) -> dict[str, float]:
    """Relative logit error, ||y - y_ref|| / ||y_ref||, per kind of input.

    Raises CheckError when one exceeds the recipe's tolerance or the folder does not load.
    """
    probes = load_probes(job)
    job.progress.stage("verify", len(probes), "inputs")
    with _in_fp32(job.loaded.model):
        reference = reference_logits(job, probes)
    with tempfile.TemporaryDirectory() as scratch, disk_errors(Path(scratch)):
        asked, answered = Path(scratch) / "inputs.safetensors", Path(scratch) / "logits.safetensors"
        save_file(flatten(probes), asked)
        command = [sys.executable, "-m", "masquant_cli.stages.verify"]
        model = job.loaded.model
        command += [str(folder), str(asked), str(answered), str(model.device)]
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # the child needs room on the same card
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
            if "no space left" in reason.lower():
                raise OSError(errno.ENOSPC, reason)
            if result.returncode == -signal.SIGKILL or "out of memory" in reason.lower():
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
        logits = load_file(answered)
    tolerance, errors = job.recipe.export.tolerance, {}
    for kind, expected in reference.items():
        real = probes[kind]["attention_mask"].bool()
        found, expected = logits[kind][real], expected[real]
        errors[kind] = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
        if not errors[kind] <= tolerance:
            raise CheckError(
                f"reloaded logits differ from the reference by {errors[kind]:.2e} relative "
                f"({kind} input, tolerance {tolerance:g})",
                where=str(folder),
                hint="the folder is kept under this name for inspection; please report this",
            )
        job.progress.advance(1)
    return errors


@contextlib.contextmanager
def _in_fp32(model: torch.nn.Module) -> Iterator[None]:
    """Cast a model's floats to fp32, and back to what each was: exact both ways."""
    tensors = [t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()]
    dtypes = [tensor.dtype for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


def _answer(folder: str, asked: str, answered: str, device: str) -> None:
    from masquant_cli import load_quantized

    model = load_quantized(folder, dtype=torch.float32).to(device)
    logits = {}
    with torch.no_grad(), dispatch.force("reference"):
        for kind, inputs in unflatten(load_file(asked)).items():
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            logits[kind] = model(**inputs, use_cache=False).logits.float().cpu().contiguous()
    save_file(logits, answered)


if __name__ == "__main__":
    _answer(*sys.argv[1:])
