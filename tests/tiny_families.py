"""A tiny random model of every family in the table, from its real class, and inputs for it.

Hidden 64, two decoder layers, one tower layer; the MLP's 96 is no multiple of 64 or 128. `CASES`
is model type -> Case; inputs need no processor: one medium of each kind per row, row 1 padded.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from tiny_quantized import solved_site

from masquant_cli.models.families import FAMILIES
from masquant_cli.progress import NullProgress
from masquant_cli.recipe import Recipe
from masquant_cli.stages.job import Job

IMAGE, AUDIO, VIDEO, PAD, START, END = 120, 121, 122, 0, 123, 124
HIDDEN, INTERMEDIATE, VOCABULARY = 64, 96, 128
PATCH, SIDE = 14, 56  # 4 x 4 patches to a picture

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "out_hidden_size": HIDDEN,
}
EARS = {  # a Whisper encoder: 40 frames of 16 bands, halved once
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


@dataclass(frozen=True)
class Case:
    """`config()` of the family's class; `media(batch)`: what comes beside the ids, and how many
    placeholder tokens each kind takes in a row."""

    config: Callable
    media: Callable[[int], dict]
    tokens: dict[int, int]  # placeholder id -> how many per row


def mrope(*sections: int, **more) -> dict:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}
    return {"rope_parameters": rope}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def pictures(batch: int) -> dict:
    return {"pixel_values": noise(batch, 3, SIDE, SIDE)}


def pictures_of_size(batch: int) -> dict:
    return {**pictures(batch), "image_sizes": torch.tensor([[SIDE, SIDE]] * batch)}


def tiles(batch: int) -> dict:
    """A small copy of the picture, then the picture in one tile."""
    sizes = torch.tensor([[SIDE, SIDE]] * batch)
    return {"pixel_values": noise(batch, 2, 3, SIDE, SIDE), "image_sizes": sizes}


def nested_pictures(batch: int) -> dict:
    return {"pixel_values": noise(batch, 1, 3, SIDE, SIDE)}


def grids(batch: int) -> dict:
    """Patches of one picture a row, as Qwen's and GLM's towers take them; frames doubled."""
    return {
        "pixel_values": noise(batch * 16, 3 * 2 * PATCH * PATCH),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * batch),
    }


def strips(batch: int) -> dict:
    """8 x 8 patches of 4 x 4 pixels a row, all in one strip, as MiniCPM's tower takes them."""
    return {
        "pixel_values": noise(1, 3, 4, 4 * 64 * batch),
        "target_sizes": torch.tensor([[8, 8]] * batch, dtype=torch.int32),
    }


def sounds(batch: int) -> dict:
    return {"input_features": noise(batch, 16, 40)}


def masked_sounds(batch: int) -> dict:
    return {**sounds(batch), "feature_attention_mask": torch.ones(batch, 40, dtype=torch.long)}


def omni_media(batch: int) -> dict:
    return {**grids(batch), **masked_sounds(batch)}


def phi_media(batch: int) -> dict:
    return {
        "image_pixel_values": noise(batch, 2, 3, SIDE, SIDE),
        "image_sizes": torch.tensor([[SIDE, SIDE]] * batch),
        "image_attention_mask": torch.ones(batch, 2, 4, 4),
        "audio_input_features": noise(batch, 40, 16),
        "audio_embed_sizes": torch.tensor([5] * batch),
    }


def no_media(batch: int) -> dict:
    return {}


def composed(config: str, vision: dict, text: dict | None = None, **more) -> Callable:
    """A vision tower before a text model of another family (Llama's, unless `text` says)."""

    def make():
        return getattr(transformers, config)(
            vision_config=vision,
            text_config={"model_type": "llama", **TEXT, **(text or {})},
            **more,
        )

    return make


def qwen_vl(config: str, text: dict, **vision) -> Callable:
    def make():
        tower = {**QWEN_TOWER, **vision}
        return getattr(transformers, config)(
            text_config={**TEXT, **text}, vision_config=tower, **QWEN_TOKENS
        )

    return make


def omni_thinker():
    return transformers.Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, **mrope(2, 3, 3)},
        vision_config={**QWEN_TOWER, **QWEN_WINDOWS, "embed_dim": 32},
        audio_config={**EARS, "output_dim": HIDDEN, "n_window": 20},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        audio_start_token_id=125,
        audio_end_token_id=126,
        pad_token_id=PAD,
    )


def qwen2_audio():
    return transformers.Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **TEXT}, audio_config=EARS, audio_token_index=AUDIO
    )


def voxtral():
    ears = {
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "hidden_size": 32,
        "intermediate_size": 128,  # four frames of 32 become one token
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return transformers.VoxtralConfig(
        text_config={"model_type": "llama", **TEXT}, audio_config=ears, audio_token_id=AUDIO
    )


def phi4_multimodal():
    ears = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "input_size": 16,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 32,
        "audio_token_id": AUDIO,
    }
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    return transformers.Phi4MultimodalConfig(
        **text,
        vision_config={**TOWER, "crop_size": SIDE, "image_token_id": IMAGE},
        audio_config=ears,
    )


def minicpm():
    tower = {**TOWER, "image_size": 32, "patch_size": 4}
    text = {
        "model_type": "qwen3_5_text",
        **TEXT,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        **mrope(2, 1, 1, partial_rotary_factor=0.5),
    }
    return transformers.MiniCPMV4_6Config(
        text_config=text,
        vision_config=tower,
        insert_layer_id=0,
        image_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def text(config: str, **more) -> Case:
    return Case(lambda: getattr(transformers, config)(**{**TEXT, **more}), no_media, {})


QWEN_WINDOWS = {"fullatt_block_indexes": [0], "window_size": SIDE}
QWEN2_VL_TOWER = {"embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2}
_GEMMA = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_IMAGES = {IMAGE: 4}

CASES: dict[str, Case] = {
    "qwen2_vl": Case(qwen_vl("Qwen2VLConfig", mrope(2, 3, 3), **QWEN2_VL_TOWER), grids, _IMAGES),
    "qwen2_5_vl": Case(qwen_vl("Qwen2_5_VLConfig", mrope(2, 3, 3), **QWEN_WINDOWS), grids, _IMAGES),
    "qwen3_vl": Case(
        qwen_vl(
            "Qwen3VLConfig",
            mrope(2, 3, 3),
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
        grids,
        _IMAGES,
    ),
    "qwen2_5_omni_thinker": Case(omni_thinker, omni_media, {IMAGE: 4, AUDIO: 10}),
    "qwen2_audio": Case(qwen2_audio, masked_sounds, {AUDIO: 10}),
    "voxtral": Case(voxtral, sounds, {AUDIO: 5}),
    "phi4_multimodal": Case(phi4_multimodal, phi_media, {IMAGE: 13, AUDIO: 5}),
    "llava": Case(
        composed(
            "LlavaConfig", {"model_type": "clip_vision_model", **TOWER}, image_token_index=IMAGE
        ),
        pictures,
        {IMAGE: 16},
    ),
    "llava_next": Case(
        composed(
            "LlavaNextConfig",
            {"model_type": "clip_vision_model", **TOWER},
            {"model_type": "mistral", "sliding_window": None},
            image_token_index=IMAGE,
            image_grid_pinpoints=[[SIDE, SIDE]],
        ),
        tiles,
        {IMAGE: 16 + 4 * 5},
    ),
    "llava_onevision": Case(
        composed(
            "LlavaOnevisionConfig",
            {"model_type": "siglip_vision_model", **TOWER},
            {"model_type": "qwen2"},
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[SIDE, SIDE]],
        ),
        tiles,
        {IMAGE: 16 + 4 * 5},
    ),
    "internvl": Case(
        composed(
            "InternVLConfig",
            {**TOWER, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
            {"model_type": "qwen3"},
            image_token_id=IMAGE,
        ),
        pictures,
        _IMAGES,
    ),
    "gemma3": Case(
        composed(
            "Gemma3Config",
            {"model_type": "siglip_vision_model", **TOWER},
            {"model_type": "gemma3_text", **_GEMMA},
            image_token_index=IMAGE,
            mm_tokens_per_image=4,
        ),
        pictures,
        _IMAGES,
    ),
    "mistral3": Case(
        composed(
            "Mistral3Config",
            {"model_type": "pixtral", **TOWER},
            {"model_type": "mistral", "sliding_window": None},
            image_token_index=IMAGE,
        ),
        pictures_of_size,
        _IMAGES,
    ),
    "idefics3": Case(
        composed("Idefics3Config", TOWER, image_token_id=IMAGE, scale_factor=2),
        nested_pictures,
        _IMAGES,
    ),
    "smolvlm": Case(
        composed("SmolVLMConfig", TOWER, image_token_id=IMAGE, scale_factor=2),
        nested_pictures,
        _IMAGES,
    ),
    "glm4v": Case(
        qwen_vl("Glm4vConfig", mrope(1, 1, 2, partial_rotary_factor=0.5), image_size=SIDE),
        grids,
        _IMAGES,
    ),
    "minicpmv4_6": Case(minicpm, strips, _IMAGES),
    "qwen2": text("Qwen2Config"),
    "qwen3": text("Qwen3Config"),
    "llama": text("LlamaConfig", tie_word_embeddings=True),
    "mistral": text("MistralConfig", sliding_window=5),
    "ministral3": text("Ministral3Config"),
    "gemma2": text("Gemma2Config", **_GEMMA),
    "gemma3_text": text("Gemma3TextConfig", **_GEMMA),
    "phi3": text("Phi3Config"),
    "glm4": text("Glm4Config"),
    "smollm3": text("SmolLM3Config", no_rope_layers=[1, 0]),
}


@functools.cache
def model(model_type: str, seed: int = 0):
    """The float model, fp32, in eval mode; shared, so leave it as it is."""
    torch.manual_seed(seed)
    config = CASES[model_type].config()
    model = getattr(transformers, FAMILIES[model_type].model_class)(config).eval()
    with torch.no_grad():
        # The default initialisation leaves activations near zero; errors would hide there.
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


def inputs(model_type: str, batch: int = 2, pad: int = 3) -> dict:
    """Row 0 has `pad` words more than the others, which are padded on the left."""
    case = CASES[model_type]
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> torch.Tensor:
        return torch.randint(3, 100, (count,), generator=generator)

    parts = [words(5)]
    for token, count in case.tokens.items():
        parts += [torch.tensor([START, *[token] * count, END]), words(3)]
    row = torch.cat([*parts, words(4)])
    ids = torch.cat([torch.full((batch, pad), PAD), row.expand(batch, -1)], 1)
    mask = torch.ones_like(ids)
    ids[0, :pad] = words(pad)
    mask[1:, :pad] = 0
    made = {"input_ids": ids, "attention_mask": mask, **case.media(batch)}
    if model_type in TYPED:
        made[TYPED[model_type]] = (ids == IMAGE).long()
    return made


# These derive positions or masks from a type per token.
TYPED = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"), "mm_token_type_ids"),
    "gemma3": "token_type_ids",
}


class Solved(Job):
    """A job whose stages before the export are made up, as tiny_quantized makes them up."""

    def read(self, stage: str, layer: int, prefix="", suffix="") -> dict[str, torch.Tensor]:
        found = {}
        for site in self.layers[layer].sites:
            scale, low_rank = solved_site(site, self.scheme, seed=layer)
            if stage == "smooth":
                found[f"{site.key}.scale"] = scale
            else:
                for modality, (a, b) in low_rank.items():
                    found[f"{site.key}.{modality}.lr_a"] = a
                    found[f"{site.key}.{modality}.lr_b"] = b
        return found


def job_of(name: str, folder) -> Solved:
    known = FAMILIES[name].modalities
    modalities = ["text", *(m for m in ("vision", "audio") if m in known)]
    source = {"dataset": "builtin:tiny-omni/calibration-text", "messages": [
        {"role": "user", "content": [{"text": "{question}"}]},
    ]}  # fmt: skip
    recipe = {
        "name": "made-up",
        "model": {"path": str(folder), "dtype": "float32"},
        "modalities": modalities,
        "calibration": {"sources": [source]},
        "device": "cpu",
        "export": {"verify": False},
    }
    calibrated = types.SimpleNamespace(summary={"tokens": dict.fromkeys(modalities, 7)})
    return Solved(
        Recipe.model_validate(recipe), NullProgress(), {"calibrate": (folder, calibrated)}
    )
