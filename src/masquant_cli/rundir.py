"""A run directory: RUN/<stage>/layers/NNN.safetensors and, last, RUN/<stage>/manifest.json.

A stage without a manifest is unfinished, whatever else lies there. Writes go to a temporary
file, are synced, then renamed, so a crash or a full disk never leaves a file that looks whole.
"""

import contextlib
import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, Timeout

from masquant_cli.errors import ArtifactError, EnvironmentProblem

SCHEMA = 1
WHOLE = 64 << 20  # bytes; larger files are not read to their end to see whether they changed
RECIPE = "recipe.json"  # of a run directory: what it was last run with
STAGES = ("calibrate", "smooth", "compensate", "export")


@dataclass(frozen=True)
class Manifest:
    """What a finished stage says of itself. `outputs` maps relative paths to sha256.

    Of several processes, `seconds` are rank 0's and the peaks those of the one with most.
    """

    stage: str
    fingerprint: str
    outputs: dict[str, str]
    seed: int
    seconds: float
    peak_bytes: int
    peak_gpu_bytes: int
    summary: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    reads: dict = field(default_factory=dict)  # what the fingerprint hashes
    sizes: dict = field(default_factory=dict)  # bytes of each output
    upstream: str = ""  # hash of the outputs of the stage before
    processes: int = 1
    schema: int = SCHEMA


@dataclass(frozen=True)
class RunDir:
    path: Path

    def stage(self, name: str) -> Path:
        return self.path / name

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run against other processes; the operating system frees it when we die."""
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            with disk_errors(self.path):
                lock.acquire(timeout=0)
        except Timeout:
            raise ArtifactError(
                "another masquant process is working in this run directory",
                where=str(self.path),
                hint="wait for it, or choose another --run-dir",
            ) from None
        try:
            yield
        finally:
            lock.release()


def read_manifest(stage_dir: Path) -> Manifest | None:
    """The stage's manifest, or None when the stage never finished."""
    path = stage_dir / "manifest.json"
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise ArtifactError(
                f"this stage has schema {data['schema']}, this masquant reads {SCHEMA}",
                where=str(path),
                hint="delete the stage's folder and run again",
            )
        return Manifest(**data)
    except (IsADirectoryError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"this manifest is damaged: {error}",
            where=str(path),
            hint="delete the stage's folder and run again",
        ) from error


def write_manifest(stage_dir: Path, manifest: Manifest) -> None:
    write_json(stage_dir / "manifest.json", asdict(manifest))


def damaged_output(stage_dir: Path, manifest: Manifest) -> str | None:
    """The first output a finished stage no longer has in the size it wrote, or None.

    Contents are checked by whoever reads them; nothing reads an exported folder again, so that
    one is compared with its hashes.
    """
    for name, digest in manifest.outputs.items():
        path = stage_dir / name
        if not path.is_file() or path.stat().st_size != manifest.sizes.get(name):
            return name
        if manifest.stage == "export" and file_sha256(path) != digest:
            return name
    return None


def reopen(stage_dir: Path) -> None:
    """Make a stage unfinished. Outputs that are not as the manifest left them are dropped, so
    that resuming cannot take them for its own."""
    if manifest := read_manifest(stage_dir):
        for name, digest in manifest.outputs.items():
            path = stage_dir / name
            if path.is_file() and file_sha256(path) != digest:
                path.unlink()
    (stage_dir / "manifest.json").unlink(missing_ok=True)


def remember_calibration(run: RunDir, folder: Path) -> None:
    """Note whose calibrate stage a run used, when it is another run's."""
    note = run.path / "calibrated_by.json"
    if folder.resolve() == run.stage("calibrate").resolve():
        note.unlink(missing_ok=True)
    else:
        write_json(note, {"folder": str(folder.resolve())})


def calibration_of(run: RunDir) -> Path:
    """The folder of the calibrate stage that a run used, its own or a reused one."""
    try:
        note = json.loads((run.path / "calibrated_by.json").read_text())
        return Path(note["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return run.stage("calibrate")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_hash(path: Path) -> str:
    """sha256 of a file; of a large one, of its size, its time and 17 spread pieces."""
    state = os.stat(path)
    if state.st_size <= WHOLE:
        return file_sha256(path)
    digest = hashlib.sha256(f"{state.st_size} {state.st_mtime_ns}".encode())
    with open(path, "rb", buffering=0) as file:
        for piece in range(17):
            file.seek((state.st_size - 65536) * piece // 16)
            digest.update(file.read(65536))
    return digest.hexdigest()


def fingerprint(content: object) -> str:
    """sha256 of json-able content, independent of key order."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_mapping(path: Path, what: str, hint: str) -> dict | None:
    """A JSON file's mapping, None where there is no such file. Raises ArtifactError for damage,
    which says that `what` cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a mapping")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{what} cannot be read: {error}", where=str(path), hint=hint
        ) from error


def write_json(path: Path, content: object) -> None:
    with replace_atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def replace_atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling; on success sync it and rename it over `path`."""
    temporary = path.with_name(f".{path.name}.partial")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with disk_errors(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # safetensors lets no one else read
            os.replace(temporary, path)
            if sys.platform != "win32":
                sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    os.umask(mask := os.umask(0o077))
    return mask


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path, chosen_by: str = "--run-dir") -> Iterator[None]:
    """Turn a full disk or a missing permission into one clear error; `chosen_by` is what a user
    changes to write elsewhere.

    safetensors reports them as its own error type, with the reason only in its text.
    """
    try:
        yield
    except Exception as error:
        text = str(error).lower()
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "no space left" in text or "os error 28" in text:
            raise EnvironmentProblem(
                "the disk is full; nothing half-written was kept",
                where=str(path),
                hint=f"free space or choose another {chosen_by}, then run the same command again",
            ) from error
        refused = isinstance(error, (PermissionError, NotADirectoryError, FileExistsError))
        if refused or getattr(error, "errno", None) == errno.EROFS:
            raise EnvironmentProblem(
                f"cannot write here: {error.strerror or error}",
                where=str(path),
                hint=f"choose a {chosen_by} that you may write to",
            ) from error
        raise


def versions() -> dict[str, str]:
    """Versions of what shapes the numbers."""
    found = {"python": sys.version.split()[0]}
    for package in ("masquant", "torch", "transformers", "datasets", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
