"""Float models and their processors: a folder, a hub id, or the model that ships with masquant."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from masquant_cli import recipe as recipes
from masquant_cli.errors import EnvironmentProblem, MasquantError, RecipeError
from masquant_cli.models.families import family_of
from masquant_cli.models.quantized import quantized_by
from masquant_cli.models.resolve import resolve


@dataclass(frozen=True)
class Loaded:
    model: torch.nn.Module
    processor: Any
    path: Path


def read_config(folder: Path) -> transformers.PretrainedConfig:
    """The model's configuration, refusing families masquant does not know and quantized ones."""
    try:
        raw = json.loads((folder / "config.json").read_text())
        if not isinstance(raw, dict):
            raise ValueError("it is not a mapping")
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"config.json cannot be read: {error}", where=str(folder / "config.json"),
            hint="download the model again",
        ) from error  # fmt: skip
    if (method := quantized_by(raw)) is not None:
        raise RecipeError(
            f"this checkpoint is already quantized ({method})", where=str(folder),
            hint="start from the float checkpoint",
        )  # fmt: skip
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # each configuration class refuses values in its own way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(
            f"Transformers does not accept this configuration: {reason[:300]}",
            where=str(folder / "config.json"),
            hint="is it complete? a newer transformers may know the model",
        ) from error  # fmt: skip
    return config


def pick_device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "device: cuda was asked for and torch sees no GPU", where="device",
            hint="use device: cpu, or install a CUDA build of torch",
        )  # fmt: skip
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def pick_dtype(
    wanted: str, device: torch.device, config: transformers.PretrainedConfig
) -> torch.dtype:
    """`auto` is the checkpoint's own dtype where the device has units for it: on GPUs, and bf16 on
    CPUs that can multiply it. Other CPUs compute in fp32: bf16 takes them four times as long."""
    if wanted != "auto":
        return getattr(torch, wanted)
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if device.type != "cpu":
        return own or torch.bfloat16
    return own if own == torch.bfloat16 and cpu_multiplies_bf16() else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products (AMX, AVX512-BF16, Arm's BF16)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = {flag for x in lines if x.startswith(("flags", "Features")) for flag in x.split()}
    return bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


def load_float(spec: recipes.Model, device: str = "auto") -> Loaded:
    """The float model in eval mode with its processor. Raises RecipeError, EnvironmentProblem."""
    folder = resolve(spec)
    config = read_config(folder)
    family = family_of(config)
    where = pick_device(device)
    try:
        model, info = getattr(transformers, family.model_class).from_pretrained(
            folder, dtype=pick_dtype(spec.dtype, where, config), output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise RecipeError(
            f"the weights cannot be loaded: {str(error).splitlines()[0]}", where=str(folder),
            hint="is a shard missing or truncated? download the model again",
        ) from error  # fmt: skip
    if missing := sorted(info["missing_keys"]):
        raise RecipeError(
            f"the checkpoint lacks {len(missing)} tensors, first {missing[0]}", where=str(folder),
            hint="is a shard missing? download the model again",
        )  # fmt: skip
    _refuse_bad_weights(model, folder)
    return Loaded(model.to(where).eval().requires_grad_(False), load_processor(folder), folder)


def load_processor(folder: Path) -> Any:
    """The model's processor, or its tokenizer where it has no other.

    Without torchvision the processor of a model that also takes video comes without that part.
    """
    from transformers import AutoProcessor

    try:
        try:
            processor = AutoProcessor.from_pretrained(folder)
        except ImportError:
            from masquant_cli.models.without_video import load_without_video

            if (processor := load_without_video(folder)) is None:
                raise
        # Without its file Transformers makes up an empty tokenizer, which encodes nothing.
        if getattr(getattr(processor, "tokenizer", processor), "vocab_size", None) in (0, 1):
            raise ValueError("its tokenizer has no vocabulary")
        return processor
    except (MasquantError, MemoryError):
        raise
    except Exception as error:  # tokenizers raises no narrower one for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(
            f"the processor cannot be loaded: {reason[:300]}", where=str(folder),
            hint="the folder must hold preprocessor and tokenizer files; some need torchvision: "
            "pip install 'masquant[vision]'",
        ) from error  # fmt: skip


def _refuse_bad_weights(model: torch.nn.Module, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise RecipeError(
                f"the weight {name} holds NaN or infinity", where=str(folder),
                hint="the checkpoint is damaged; download it again",
            )  # fmt: skip
