"""Compile the C files of this folder, once per machine, and load them.

Nothing is linked against: OpenMP's symbols come from the runtime that torch has loaded, so both
share one pool of threads (two pools would fight for the cores). The library is kept under
`$XDG_CACHE_HOME/masquant` (or ~/.cache/masquant) by the hash of its sources.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-mavx2", "-mfma", "-mf16c")
VNNI_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni")
log = logging.getLogger(__name__)


def load() -> ctypes.CDLL:
    """The compiled library. Raises ImportError, with the reason, where there can be none."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        raise ImportError("the CPU kernels are written for x86-64 Linux")
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        raise ImportError("this processor has no AVX2")
    path = _cached()
    if not path.exists():
        try:
            path = _compile(path)
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("masquant: fast CPU kernels are off: %s", error)
            raise ImportError(str(error)) from None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("masquant: fast CPU kernels are off: %s", error)
        raise ImportError(str(error)) from None


def compiler() -> str | None:
    """The C compiler that would be used: $CC, cc, gcc or clang."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _sources() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.[ch]"))


def _cached() -> Path:
    digest = hashlib.sha256(repr((FLAGS, VNNI_FLAGS)).encode())
    for source in _sources():
        digest.update(source.name.encode() + source.read_bytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "masquant" / f"cpu-{digest.hexdigest()[:16]}.so"


def _compile(target: Path) -> Path:
    cc = compiler()
    if cc is None:
        raise FileNotFoundError("no C compiler found (install gcc or clang)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=target.parent)
    except OSError:  # a home that cannot be written to: compile for this process alone
        scratch = tempfile.mkdtemp()
        target = Path(scratch) / target.name
    objects = compile_objects(cc, scratch)
    linked = f"{scratch}/linked.so"
    subprocess.run([cc, "-shared", *objects, "-o", linked], check=True, capture_output=True)
    os.replace(linked, target)  # whole or not at all, whoever else is compiling
    if Path(scratch) != target.parent:
        shutil.rmtree(scratch)
    return target


def compile_objects(
    cc: str,
    folder: str,
    vnni_flags: tuple[str, ...] = VNNI_FLAGS,
    flags: tuple[str, ...] = (),
) -> list[str]:
    """Object files of all sources, compiled side by side."""
    objects, running = [], []
    for source in _sources():
        if source.suffix == ".c":
            objects.append(f"{folder}/{source.stem}.o")
            special = vnni_flags if "vnni" in source.stem else ()
            command = [cc, *FLAGS, *flags, *special, "-c", str(source), "-o", objects[-1]]
            running.append((subprocess.Popen(command, stderr=subprocess.PIPE, text=True), command))
    for process, command in running:
        errors = process.communicate()[1]
        if process.returncode:
            raise subprocess.SubprocessError(f"`{' '.join(command)}` failed: {errors.strip()}")
    return objects
