"""What a number depends on: machine, versions, command. Goes into every result file."""

import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from masquant_kernels import dispatch

from masquant_cli.errors import EnvironmentProblem

PACKAGES = ("torch", "triton", "transformers", "gemlite", "torchao")


def about(device: torch.device) -> dict:
    facts = {
        "device": device.type,
        "name": device_name(device),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "kernels": dispatch.describe(device),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "command": shlex.join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "arch": f"sm_{properties.major}{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return facts


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_of(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda`. Raises EnvironmentProblem where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "no CUDA GPU that torch can use",
            hint="masquant doctor says what this machine has; --device cpu times the CPU",
        )
    return torch.device(name)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cache_bytes(device: torch.device) -> int:
    """Of the last-level cache that timings must not live in."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes) or 32 * 2**20
