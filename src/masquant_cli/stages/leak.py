"""A model must not be judged on what it was calibrated on: rows are told apart by content."""

import json
from collections.abc import Set
from pathlib import Path

from masquant_cli.errors import ArtifactError, CheckError
from masquant_cli.progress import Progress
from masquant_cli.rundir import file_sha256, read_manifest
from masquant_cli.stages.prepare import Prepared


def calibrated_on(folder: Path) -> frozenset[str] | None:
    """Hashes of what the samples of a finished calibrate stage show; None without one."""
    manifest = read_manifest(folder)
    if manifest is None or "samples.json" not in manifest.outputs:
        return None
    path = folder / "samples.json"
    if not path.is_file() or file_sha256(path) != manifest.outputs["samples.json"]:
        raise ArtifactError(
            "the hashes of the calibration samples are gone or were changed",
            where=str(path),
            hint="calibrate again",
        )
    return frozenset(h for sample in json.loads(path.read_text())["samples"] for h in sample)


def overlap(prepared: Prepared, seen: Set[str], *, allow: bool, progress: Progress) -> int:
    """How many of the task's rows show a picture, sound or text that calibration saw.

    Raises CheckError unless there is none or `allow` is set, which warns.
    """
    found = sum(any(h in seen for h in sample) for sample in prepared.shown)
    if not found:
        return 0
    name = prepared.task.name
    said = f"{found} of {len(prepared.shown)} rows of task {name!r} were calibrated on"
    if not allow:
        raise CheckError(
            said,
            where=f"task {name}, dataset {prepared.task.source.dataset}",
            hint="evaluate on another split, calibrate on other data, or pass --allow-overlap "
            "to get numbers that flatter the model",
        )
    progress.warn(f"{said}: its score flatters the model")
    return found
