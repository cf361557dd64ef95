"""What this machine has, or what a model has: the first thing to look at, and to paste into a bug
report."""

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from masquant_cli import __version__, recipe_yaml
from masquant_cli.progress import layer_ranges

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


def examine_model(path: str) -> dict[str, Any]:
    """What masquant finds in a model folder or a hub id; "supported" says whether it can run."""
    from masquant_cli.inspect.support import support

    return support(path)


def show_model(document: dict[str, Any]) -> None:
    """That document, for a person."""
    from masquant_cli.cli.render import draw_table, size

    facts = {"model": document["path"], "model type": document["model_type"] or "none named"}
    if "family" in document:
        facts |= _supported_facts(document, size)
    else:
        facts["architectures"] = ", ".join(document["architectures"]) or "none named"
    draw_table(("", ""), list(facts.items()), heads=False)
    for group in document.get("sites", ()):
        rows = [
            (kind, ", ".join(site["linears"]), str(site["experts"] or ""), str(site["in"]),
             ", ".join(map(str, site["out"])))
            for kind, site in group["sites"].items()
        ]  # fmt: skip
        print(f"\n{layer_ranges(group['layers'])}")
        draw_table(("site", "linears", "experts", "inputs", "outputs"), rows, right=(2, 3))
    if document.get("left_float"):
        print("\nleft float")
        rows = [(part["module"], f"{part['parameters']:,}") for part in document["left_float"]]
        draw_table(("module", "parameters"), rows, right=(1,))
    _show_unknown(document)
    print()
    for warning in document["warnings"]:
        print("note:", warning)
    for problem in document["problems"]:
        print("problem:", problem)
    known = "family" in document and not document["quantized_by"]
    verdict = "a supported family, but this checkpoint cannot be used" if known else "not supported"
    print("supported" if document["supported"] else verdict)


def _supported_facts(document: dict[str, Any], size) -> dict[str, str]:
    parameters, files = document["parameters"], document["files"]
    weights = "none here: config.json alone was read"
    if document["quantized_by"]:
        weights = "quantized"
    elif files and files["complete"]:
        count = files["shards"]
        weights = f"{count} {'files' if count > 1 else 'file'}, {size(files['bytes'])}"
    elif files:
        weights = "damaged or incomplete: see below"
    said = [
        name + (f" (token {', '.join(map(str, tokens))})" if tokens else "")
        for name, tokens in document["modalities"].items()
    ]
    return {
        "class": document["class"],
        "decoder": f"{document['layers']['at']}, {document['layers']['count']} layers",
        "modalities": ", ".join(said),
        "parameters": f"{_count(parameters['total'])}; in decoder layers "
        f"{_count(parameters['decoder_layers'])}; in linears to quantize "
        f"{_count(parameters['quantized'])}",
        "tied embeddings": "yes" if document["tied_embeddings"] else "no",
        "weights": weights,
    }


def _show_unknown(document: dict[str, Any]) -> None:
    from masquant_cli.cli.render import draw_table

    if found := document.get("looks_like_decoder"):
        print(f"\nlooks like a decoder: {found['layers']} of {found['class']}, "
              f"{found['count']} layers, most of them {found['layer']}")  # fmt: skip
        rows = [(name, str(i), str(o)) for name, (o, i) in found["linears"].items()]
        draw_table(("linear", "inputs", "outputs"), rows, right=(1, 2))
    if document.get("placeholders"):
        found = ", ".join(f"{name} {value}" for name, value in document["placeholders"].items())
        print(f"\nplaceholder tokens: {found}")
    for missing in document.get("missing", ()):
        print("missing:", missing)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.3g} M"
