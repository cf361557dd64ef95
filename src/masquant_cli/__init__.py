"""masquant: post-training quantization of multimodal LLMs.

After `import masquant_cli`, Transformers' own `from_pretrained` understands checkpoints
written by masquant. The import itself loads neither torch nor transformers: the
registration waits until Transformers is imported.
"""

import wrapt

__version__ = "0.1.0"
__all__ = ["__version__", "load_quantized"]


def __getattr__(name: str):
    if name == "load_quantized":
        from masquant_cli.runtime import load_quantized

        return load_quantized
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@wrapt.when_imported("transformers.quantizers.auto")
def _register_quantizer(_module) -> None:
    import masquant_cli.runtime.hf  # noqa: F401  (registers itself)


@wrapt.when_imported("transformers.models.auto.processing_auto")
def _register_processor(_module) -> None:
    from masquant_cli.models import omni_processor

    # Absent while omni_processor itself is what imports Transformers; it registers at its end.
    getattr(omni_processor, "register", lambda: None)()
