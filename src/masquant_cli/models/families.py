"""Supported model families, as one table. To add a family, add a row and a tiny model to the tests.

A row states what cannot be discovered. The decoder is what `model.get_decoder()` returns, sites
are found by the names below (`sites.py`), placeholder tokens by the config's usual attributes
(`modality.py`), names on disk by Transformers' own tables (`names.py`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from masquant_cli.errors import RecipeError

# site kind -> the ways in which decoder layers name the linears that share one input, relative to
# the layer. The first name's parent is the block in which the exported site module is placed.
SITES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "attn_in": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.qkv_proj",),
    ),
    "attn_out": (("self_attn.o_proj",),),
    "mlp_in": (("mlp.gate_proj", "mlp.up_proj"), ("mlp.gate_up_proj",)),
    "mlp_out": (("mlp.down_proj",),),
}
KINDS = tuple(SITES)
# site kind -> the norm whose output is read by that site's linears and by nothing else: the first
# of these that the layer has. Gemma's post_attention_layernorm stands behind the attention.
NORMS: Mapping[str, tuple[str, ...]] = {
    "attn_in": ("input_layernorm",),
    "mlp_in": ("pre_feedforward_layernorm", "post_attention_layernorm"),
}
# The block that computes down_proj(act(gate_proj(x)) * up_proj(x)), in every family.
MLP = "mlp"
EXPERTS = "mlp.experts"  # in layers with experts: one such block for each
# Where decoder layers lie in the files of supported families, old layouts and new ones.
DECODERS = frozenset(
    prefix + path
    for path in ("model.layers", "model.language_model.layers", "model.text_model.layers")
    for prefix in ("", "language_model.", "thinker.")
)
_EXPERT = re.compile(r"\.experts\.\d+\.")
_MIXTRAL = {  # what its files call an expert's linears
    "block_sparse_moe.w1": "mlp.gate_proj",
    "block_sparse_moe.w3": "mlp.up_proj",
    "block_sparse_moe.w2": "mlp.down_proj",
}
# linear -> its site kind, in the order in which sites list them
KIND_OF = {name: kind for kind, ways in SITES.items() for names in ways for name in names}


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    model_type: str  # config.model_type
    model_class: str  # the Transformers class that is loaded and quantized
    modalities: tuple[str, ...] = ()  # besides text, if the config names a placeholder token
    root: str = ""  # module that receives input_ids, "" for the model itself
    subconfig: str = ""  # config attribute that `model_class` is built from, "" for the whole
    between: str | None = None  # "deepstack": visual features are added after the first layers
    floats: tuple[str, ...] = ()  # blocks of other layers in the place of self_attn, kept float
    unfed: tuple[str, ...] = ()  # modalities that calibration cannot give its processor yet


_IMAGE, _VIDEO, _AUDIO = ("vision",), ("vision", "video"), ("audio",)
_OMNI = ("vision", "video", "audio")

FAMILIES: Mapping[str, Family] = {
    f.model_type: f
    for f in (
        Family("qwen2_vl", "Qwen2VLForConditionalGeneration", _VIDEO),
        Family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", _VIDEO),
        Family("qwen3_vl", "Qwen3VLForConditionalGeneration", _VIDEO, between="deepstack"),
        Family("qwen2_5_omni_thinker", "Qwen2_5OmniThinkerForConditionalGeneration", _OMNI),
        # A full Omni checkpoint also holds a speaking half; the thinker alone is loaded.
        Family(
            "qwen2_5_omni",
            "Qwen2_5OmniThinkerForConditionalGeneration",
            _OMNI,
            root="thinker",
            subconfig="thinker_config",
        ),
        Family("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", _VIDEO, between="deepstack"),
        Family(
            "qwen3_omni_moe_thinker",
            "Qwen3OmniMoeThinkerForConditionalGeneration",
            _OMNI,
            between="deepstack",
        ),
        Family(
            "qwen3_omni_moe",
            "Qwen3OmniMoeThinkerForConditionalGeneration",
            _OMNI,
            root="thinker",
            subconfig="thinker_config",
            between="deepstack",
        ),
        Family("qwen2_audio", "Qwen2AudioForConditionalGeneration", _AUDIO),
        Family("voxtral", "VoxtralForConditionalGeneration", _AUDIO, unfed=_AUDIO),
        Family("phi4_multimodal", "Phi4MultimodalForCausalLM", ("vision", "audio")),
        Family("llava", "LlavaForConditionalGeneration", _IMAGE),
        Family("llava_next", "LlavaNextForConditionalGeneration", _IMAGE),
        Family("llava_onevision", "LlavaOnevisionForConditionalGeneration", _VIDEO),
        Family("internvl", "InternVLForConditionalGeneration", _IMAGE),
        Family("gemma3", "Gemma3ForConditionalGeneration", _IMAGE),
        Family("mistral3", "Mistral3ForConditionalGeneration", _IMAGE),
        Family("idefics3", "Idefics3ForConditionalGeneration", _IMAGE),
        Family("smolvlm", "SmolVLMForConditionalGeneration", _IMAGE),
        # Its processor marks video with the token of pictures.
        Family("glm4v", "Glm4vForConditionalGeneration", _VIDEO, unfed=("video",)),
        Family(
            "minicpmv4_6",
            "MiniCPMV4_6ForConditionalGeneration",
            _VIDEO,
            floats=("linear_attn",),
        ),
        Family("qwen2", "Qwen2ForCausalLM"),
        Family("qwen3", "Qwen3ForCausalLM"),
        Family("qwen2_moe", "Qwen2MoeForCausalLM"),
        Family("qwen3_moe", "Qwen3MoeForCausalLM"),
        Family("mixtral", "MixtralForCausalLM"),
        Family("llama", "LlamaForCausalLM"),
        Family("mistral", "MistralForCausalLM"),
        Family("ministral3", "Ministral3ForCausalLM"),
        Family("gemma2", "Gemma2ForCausalLM"),
        Family("gemma3_text", "Gemma3ForCausalLM"),
        Family("phi3", "Phi3ForCausalLM"),  # and Phi-4, which has its layout and model type
        Family("glm4", "Glm4ForCausalLM"),
        Family("smollm3", "SmolLM3ForCausalLM"),
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
        hint="`masquant doctor --model` shows what was found in it; supported model types: "
        + ", ".join(FAMILIES),
    )


def model_class(family: Family) -> type:
    """The family's Transformers class. Raises RecipeError where this release has none."""
    import transformers

    found = getattr(transformers, family.model_class, None)
    if found is None:
        raise RecipeError(
            f"model family {family.model_type!r} needs a newer transformers: "
            f"{transformers.__version__} has no {family.model_class}",
            hint="pip install -U transformers",
        )
    return found


def dense_name(linear: str) -> str:
    """An expert's linear as a layer without experts has it: "mlp.down_proj"; others as they are."""
    name = _EXPERT.sub(".", linear)
    return _MIXTRAL.get(name, name)


def kind_of(linear: str) -> str | None:
    """The site kind of a linear named relative to its decoder layer; None for any other."""
    return KIND_OF.get(dense_name(linear))
