"""Does the exported folder give the solved model's logits? Asked in a fresh process.

A fresh process has only what the folder holds: a missing file, a wrong name or a tensor that
Transformers would fill with noise shows here, before the folder gets its final name.
"""

import errno
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
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
    reference = reference_logits(job, probes)
    with tempfile.TemporaryDirectory() as scratch, disk_errors(Path(scratch)):
        asked, answered = Path(scratch) / "inputs.safetensors", Path(scratch) / "logits.safetensors"
        save_file(flatten(probes), asked)
        command = [sys.executable, "-m", "masquant_cli.stages.verify"]
        model = job.loaded.model
        command += [str(folder), str(asked), str(answered), str(model.device), str(model.dtype)]
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


def _answer(folder: str, asked: str, answered: str, device: str, dtype: str) -> None:
    from masquant_cli import load_quantized

    model = load_quantized(folder, dtype=getattr(torch, dtype.removeprefix("torch."))).to(device)
    logits = {}
    with torch.no_grad():
        for kind, inputs in unflatten(load_file(asked)).items():
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            logits[kind] = model(**inputs, use_cache=False).logits.float().cpu().contiguous()
    save_file(logits, answered)


if __name__ == "__main__":
    _answer(*sys.argv[1:])
