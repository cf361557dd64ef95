"""Running a quantized checkpoint: modules, modality ids, and the Transformers integration."""


def __getattr__(name: str):
    # Lazy, so that registering with Transformers while it is being imported stays cheap.
    if name == "load_quantized":
        from masquant_cli.runtime.hf import load_quantized

        return load_quantized
    if name == "modality_ids":
        from masquant_cli.runtime.context import modality_ids

        return modality_ids
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
