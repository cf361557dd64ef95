"""Supported model families, as one table. To add a family, add a row and a tiny model to the tests.

Everything that differs between families and is not discoverable from the module tree
lives here; the rest (`sites.py`, `modality.py`, `names.py`) reads this table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from masquant_cli.errors import RecipeError

# site kind -> linears that share one input, relative to the decoder layer. The first
# name's parent is the block in which the exported site module is placed.
LLAMA_SITES: Mapping[str, tuple[str, ...]] = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_out": ("mlp.down_proj",),
}
# site kind -> the norm whose output is read by that site's linears and by nothing else.
LLAMA_NORMS: Mapping[str, str] = {
    "attn_in": "input_layernorm",
    "mlp_in": "post_attention_layernorm",
}


@dataclass(frozen=True)
class Family:
    """One row of the table. Paths are module paths inside the class named by `model_class`."""

    model_type: str  # config.model_type
    model_class: str  # the Transformers class that is loaded and quantized
    layers: tuple[str, ...]  # decoder layers; the first that exists (they moved between releases)
    token_fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # modality -> names
    sites: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: LLAMA_SITES)
    norms: Mapping[str, str] = field(default_factory=lambda: LLAMA_NORMS)
    mlp: str = "mlp"  # block that computes down_proj(act(gate_proj(x)) * up_proj(x))
    root: str = ""  # module that receives input_ids, "" for the model itself
    subconfig: str = ""  # config attribute that `model_class` is built from, "" for the whole


_IMAGE = ("image_token_id", "image_token_index")
_VIDEO = ("video_token_id", "video_token_index")
_AUDIO = ("audio_token_id", "audio_token_index")
_VL = {"vision": _IMAGE, "video": _VIDEO}
_OMNI = {"vision": _IMAGE, "video": _VIDEO, "audio": _AUDIO}

FAMILIES: Mapping[str, Family] = {
    f.model_type: f
    for f in (
        Family(
            "qwen2_vl",
            "Qwen2VLForConditionalGeneration",
            ("model.language_model.layers",),
            _VL,
        ),
        Family(
            "qwen2_5_vl",
            "Qwen2_5_VLForConditionalGeneration",
            ("model.language_model.layers",),
            _VL,
        ),
        Family(
            "qwen2_5_omni_thinker",
            "Qwen2_5OmniThinkerForConditionalGeneration",
            ("model.language_model.layers", "model.layers"),
            _OMNI,
        ),
        # A full Omni checkpoint also holds a speaking half; the thinker alone is loaded.
        Family(
            "qwen2_5_omni",
            "Qwen2_5OmniThinkerForConditionalGeneration",
            (
                "model.language_model.layers",
                "model.layers",
                "thinker.model.language_model.layers",
                "thinker.model.layers",
            ),
            _OMNI,
            root="thinker",
            subconfig="thinker_config",
        ),
        Family("qwen2", "Qwen2ForCausalLM", ("model.layers",)),
        Family("qwen3", "Qwen3ForCausalLM", ("model.layers",)),
        Family("llama", "LlamaForCausalLM", ("model.layers",)),
        Family("mistral", "MistralForCausalLM", ("model.layers",)),
    )
}


def family_of(config, *, where: str | None = None) -> Family:
    """The table row for a Transformers config. Raises RecipeError for a family not in it."""
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    architectures = ", ".join(getattr(config, "architectures", None) or ()) or "none named"
    raise RecipeError(
        f"model family {model_type!r} (architectures: {architectures}) is not supported yet",
        where=where or getattr(config, "_name_or_path", None) or None,
        hint=f"supported model types: {', '.join(FAMILIES)}",
    )
