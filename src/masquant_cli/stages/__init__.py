"""Stages: load artifacts, call the mathematics, save. The only place where the three meet.

Imports are lazy, so that planning a run needs no torch.
"""

import importlib
from collections.abc import Callable

from masquant_cli.recipe import Calibration, Model
from masquant_cli.rundir import STAGES, fingerprint

# Raise a stage's number when its result changes for the same inputs.
VERSIONS = {"calibrate": 1, "smooth": 1, "compensate": 1, "export": 1}


def stage_function(name: str) -> Callable[..., dict]:
    assert name in STAGES
    return getattr(importlib.import_module(f".{name}", __name__), name)


def model_fingerprint(spec: Model, *, download: bool = True) -> str | None:
    """Hash of the model's files as they are now; None when they are not on this machine."""
    from masquant_cli.models.resolve import resolve
    from masquant_cli.shards import sampled_sha256

    folder = resolve(spec, download=download)
    if folder is None:
        return None
    files = (".safetensors", ".json", ".jinja", ".txt")
    paths = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in files]
    return fingerprint({p.name: sampled_sha256(p) for p in paths})


def data_fingerprint(calibration: Calibration) -> list[str]:
    """Per source, a hash of its local files. Hub data sets count by id and revision alone."""
    from masquant_cli.data.sources import local_files
    from masquant_cli.shards import sampled_sha256

    return [
        fingerprint([sampled_sha256(p) for p in local_files(source)])
        for source in calibration.sources
    ]
