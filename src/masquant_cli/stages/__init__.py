"""Stages: load artifacts, call the mathematics, save. The only place where the three meet.

Imports are lazy, so that planning a run stays quick.
"""

import importlib
from collections.abc import Callable

from masquant_cli.recipe import Calibration, Model
from masquant_cli.rundir import STAGES, content_hash, fingerprint

# Raise a stage's number when its result changes for the same inputs.
VERSIONS = {"calibrate": 3, "smooth": 3, "compensate": 3, "export": 2}


def stage_function(name: str) -> Callable[..., dict]:
    assert name in STAGES
    return getattr(importlib.import_module(f".{name}", __name__), name)


def model_fingerprint(spec: Model, *, download: bool = True) -> str | None:
    """Hash of the model's files as they are now; None when they are not on this machine."""
    from masquant_cli.models.resolve import model_files, resolve

    folder = resolve(spec, download=download)
    if folder is None:
        return None
    return fingerprint(
        {p.relative_to(folder).as_posix(): content_hash(p) for p in model_files(folder)}
    )


def data_fingerprint(calibration: Calibration) -> list[str]:
    """Per source, a hash of its local files. Hub data sets count by id and revision alone."""
    from masquant_cli.data.sources import local_files

    return [
        fingerprint([content_hash(p) for p in local_files(source)])
        for source in calibration.sources
    ]
