"""Whether a checkpoint is quantized already, by its config.json. Needs neither torch nor
transformers."""

KEYS = ("quantization_config", "compression_config")


def quantized_by(raw: dict) -> str | None:
    """How the checkpoint is quantized already, as its config or a part of it says, the outermost
    first; "?" where no method is named, None where it is not quantized."""
    for found in filter(None, map(raw.get, KEYS)):
        return str(found.get("quant_method", "?") if isinstance(found, dict) else found)
    parts = (part for part in raw.values() if isinstance(part, dict))
    return next(filter(None, map(quantized_by, parts)), None)
