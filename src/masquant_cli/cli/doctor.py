"""What this machine has: the first thing to look at, and to paste into a bug report."""

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from masquant_cli import __version__, recipe_yaml

NEEDED = ("torch", "transformers", "datasets", "safetensors", "pydantic", "jiwer", "soundfile")
OPTIONAL = ("triton", "accelerate", "vllm", "torchvision")


def examine() -> dict[str, Any]:
    """`facts` for the reader, `warnings`, and `problems` that would stop a run."""
    facts: dict[str, str] = {
        "masquant": __version__,
        "python": f"{platform.python_version()} at {sys.prefix}",
        "platform": platform.platform(),
        "cores, memory": f"{os.cpu_count()}, {_memory()}",
    }
    warnings: list[str] = []
    problems: list[str] = []
    for name in (*NEEDED, *OPTIONAL):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
            if name in NEEDED:
                problems.append(f"{name} is not installed: pip install masquant")
    _torch(facts, warnings, problems)
    _disk(facts, warnings)
    _hub(facts)
    assets = Path(__file__).parents[1] / "assets" / "tiny-omni" / "model"
    facts["embedded model"] = str(assets) if assets.is_dir() else "missing"
    if not assets.is_dir():
        problems.append("the embedded model is missing from this installation")
    facts["shipped recipes"] = str(len(recipe_yaml.shipped()))
    if not recipe_yaml.shipped():
        problems.append("the shipped recipes are missing from this installation")
    return {"facts": facts, "warnings": warnings, "problems": problems}


def _torch(facts: dict[str, str], warnings: list[str], problems: list[str]) -> None:
    try:
        import torch
    except ImportError as error:
        problems.append(f"torch cannot be imported: {error}")
        return
    facts["torch build"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["GPU"] = ", ".join(names)
    else:
        facts["GPU"] = "none that torch can use"
        if shutil.which("nvidia-smi") and not torch.version.cuda:
            warnings.append("there is an NVIDIA driver but torch is a CPU build: TORCH=cuda")
    _kernels(facts, warnings, "cuda" if torch.cuda.is_available() else "cpu")


def _kernels(facts: dict[str, str], warnings: list[str], device: str) -> None:
    from masquant_kernels import dispatch

    backend = dispatch.describe(device)
    if device == "cpu" and dispatch.backend_of("gemm_w4a8", device) != "cpu":
        warnings.append(
            f"quantized models will be slow on this CPU ({backend}): the fast kernels need x86-64 "
            "with AVX2 and a C compiler"
        )
    facts[f"kernels on {device}"] = backend


def _disk(facts: dict[str, str], warnings: list[str]) -> None:
    free = shutil.disk_usage(Path.cwd()).free
    facts["free disk here"] = f"{free / 1e9:.0f} GB"
    if free < 2e9:
        warnings.append("less than 2 GB free in the current directory")


def _hub(facts: dict[str, str]) -> None:
    try:
        from huggingface_hub import constants
    except ImportError:
        return
    facts["hub"] = constants.ENDPOINT + (" (offline)" if constants.HF_HUB_OFFLINE else "")
    facts["hub cache"] = constants.HF_HUB_CACHE


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB"
    except (ValueError, OSError, AttributeError):
        return "unknown memory"
