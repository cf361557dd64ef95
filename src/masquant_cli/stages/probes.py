"""A few encoded inputs, one per kind, that calibrate leaves behind for verifying the export.

So verifying needs neither the calibration data nor the hub again.
"""

from pathlib import Path

from masquant_cli import shards
from masquant_cli.data.chat import MEDIA, modality_of
from masquant_cli.data.inputs import encode
from masquant_cli.data.samples import Sample
from masquant_cli.errors import ArtifactError
from masquant_cli.stages.job import Job
from masquant_cli.stages.samples import CalibrationSet
from masquant_cli.stages.walk import Probes, flatten, unflatten

FILE = "probes.safetensors"


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
    probes = {
        kind: encode(job.float.processor, [sample], for_generation=False)
        for kind, sample in sorted(found.items())
    }
    shards.save(folder / FILE, flatten(probes), fingerprint=fingerprint, notes={})


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


def _without_media(sample: Sample) -> Sample:
    messages = [
        {**m, "content": [part for part in m["content"] if part["type"] == "text"]}
        for m in sample.messages
    ]
    return Sample(messages=messages, row=sample.row, key=sample.key, where=sample.where)
