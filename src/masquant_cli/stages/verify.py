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

from masquant_cli.data.inputs import encode
from masquant_cli.data.samples import Sample
from masquant_cli.errors import CheckError, EnvironmentProblem
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.rundir import disk_errors
from masquant_cli.stages.job import Job
from masquant_cli.stages.reference import reference_logits


def verify(job: Job, folder: Path) -> dict[str, float]:
    """Relative logit error, ||y - y_ref|| / ||y_ref||, per kind of input.

    Raises CheckError when one exceeds the recipe's tolerance or the folder does not load.
    """
    probes = probe_inputs(job)
    job.progress.stage("verify", len(probes), "inputs")
    reference = {kind: reference_logits(job, inputs) for kind, inputs in probes.items()}
    with tempfile.TemporaryDirectory() as scratch, disk_errors(Path(scratch)):
        asked, answered = Path(scratch) / "inputs.safetensors", Path(scratch) / "logits.safetensors"
        flat = {f"{k}.{n}": t.contiguous() for k, i in probes.items() for n, t in i.items()}
        save_file(flat, asked)
        command = [sys.executable, "-m", "masquant_cli.stages.verify"]
        model = job.loaded.model
        command += [str(folder), str(asked), str(answered), str(model.device), str(model.dtype)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
            if "no space left" in reason.lower():
                raise OSError(errno.ENOSPC, reason)
            if result.returncode == -signal.SIGKILL:
                raise EnvironmentProblem(
                    "the process that verifies the export was killed, most likely for memory",
                    where=str(folder),
                    hint="free memory and run again, or set export.verify=false",
                )
            raise CheckError(
                f"the exported folder does not load in a fresh process: {reason}",
                where=str(folder),
                hint="the folder is kept under this name for inspection",
            )
        logits = load_file(answered)
    # Half-precision models round differently in the two paths; fp32 ones do not.
    tolerance = max(job.recipe.export.tolerance, 0.0 if model.dtype == torch.float32 else 0.03)
    errors = {}
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


def probe_inputs(job: Job) -> dict[str, dict[str, torch.Tensor]]:
    """One encoded sample per set of modalities in the calibration data, and a text-only one."""
    processor, config = job.loaded.processor, job.loaded.model.config
    names, found = job.recipe.modalities, {}
    tokens = token_ids_of(config)
    for sample in job.chosen.samples:
        inputs = encode(processor, [sample], for_generation=False)
        present = modality_ids(inputs["input_ids"], tokens, names).unique().tolist()
        kind = "+".join(names[i] for i in present if i) or names[0]
        found.setdefault(kind, (sample, inputs))
    if names[0] not in found:
        sample = next(iter(found.values()))[0]
        found[names[0]] = (
            sample,
            encode(processor, [_without_media(sample)], for_generation=False),
        )
    return {kind: inputs for kind, (_, inputs) in sorted(found.items())}


def _without_media(sample: Sample) -> Sample:
    messages = [
        {**m, "content": [part for part in m["content"] if part["type"] == "text"]}
        for m in sample.messages
    ]
    return Sample(messages=messages, row=sample.row, key=sample.key, where=sample.where)


def _answer(folder: str, asked: str, answered: str, device: str, dtype: str) -> None:
    from masquant_cli import load_quantized

    model = load_quantized(folder, dtype=getattr(torch, dtype.removeprefix("torch."))).to(device)
    inputs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(asked).items():
        kind, _, name = key.partition(".")
        inputs.setdefault(kind, {})[name] = tensor.to(device)
    with torch.no_grad():
        logits = {
            kind: model(**batch, use_cache=False).logits.float().cpu().contiguous()
            for kind, batch in inputs.items()
        }
    save_file(logits, answered)


if __name__ == "__main__":
    _answer(*sys.argv[1:])
