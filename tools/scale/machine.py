"""What every result file says of the machine, the versions and the command."""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "scale"
# What other programs' versions are read from: a dist's name in the other tool's environment.
PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "numpy")
CODE = ("src/masquant_cli", "kernels/masquant_kernels", "tools/scale")


def about(pythons: dict[str, str]) -> dict:
    """`pythons`: whose versions to name, {"masquant": sys.executable, ...}."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": {
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "memory_gb": round(memory / 1e9, 1),
            "load_before": [round(x, 2) for x in os.getloadavg()],
        },
        "versions": {name: versions(python) for name, python in pythons.items()},
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_fingerprint(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions(python: str) -> dict[str, str]:
    code = (
        "import platform, importlib.metadata as m\n"
        "print('python', platform.python_version())\n"
        f"for name in {PACKAGES!r}:\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: pass\n"
    )
    out = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    return dict(line.split() for line in out.splitlines())


def code_fingerprint() -> str:
    """Of all source that the numbers depend on: a result is measured again when it changes."""
    digest = hashlib.sha256()
    for folder in CODE:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]
