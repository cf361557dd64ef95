"""A few encoded inputs, one per kind, that calibrate leaves behind for verifying the export.

So verifying needs neither the calibration data nor the hub again.
"""

from pathlib import Path

import torch

from masquant_cli import shards
from masquant_cli.data.chat import MEDIA, modality_of
from masquant_cli.data.inputs import encode
from masquant_cli.data.samples import Sample
from masquant_cli.errors import ArtifactError
from masquant_cli.stages.job import Job
from masquant_cli.stages.samples import CalibrationSet

FILE = "probes.safetensors"
Probes = dict[str, dict[str, torch.Tensor]]


def save_probes(job: Job, chosen: CalibrationSet, folder: Path, fingerprint: str) -> None:
    """Encode the shortest sample of every set of modalities, and a text-only one."""
    names = job.recipe.modalities
    order = sorted(range(len(chosen.samples)), key=lambda i: (chosen.lengths[i], i))
    found: dict[str, Sample] = {}
    for sample in (chosen.samples[i] for i in order):
        present = {modality_of(kind, names) for kind in MEDIA if sample.media(kind)}
        kind = "+".join(m for m in names[1:] if m in present) or names[0]
        found.setdefault(kind, sample)
    found.setdefault(names[0], _without_media(chosen.samples[order[0]]))
    tensors = {
        f"{kind}/{name}": tensor
        for kind, sample in sorted(found.items())
        for name, tensor in encode(job.loaded.processor, [sample], for_generation=False).items()
    }
    shards.save(folder / FILE, tensors, fingerprint=fingerprint, notes={})


def load_probes(job: Job) -> Probes:
    """{"vision+audio": inputs of one sample, ...} of the finished calibrate stage."""
    folder, manifest = job.finished["calibrate"]
    if FILE not in manifest.outputs:
        raise ArtifactError(
            "the calibrate stage has no probes",
            where=str(folder),
            hint="delete the stage's folder and run again",
        )
    return unflatten(shards.load(folder / FILE, sha256=manifest.outputs[FILE]))


def unflatten(tensors: dict[str, torch.Tensor]) -> Probes:
    probes: Probes = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        probes.setdefault(kind, {})[name] = tensor
    return probes


def flatten(probes: Probes) -> dict[str, torch.Tensor]:
    return {f"{k}/{n}": t.contiguous() for k, inputs in probes.items() for n, t in inputs.items()}


def _without_media(sample: Sample) -> Sample:
    messages = [
        {**m, "content": [part for part in m["content"] if part["type"] == "text"]}
        for m in sample.messages
    ]
    return Sample(messages=messages, row=sample.row, key=sample.key, where=sample.where)
