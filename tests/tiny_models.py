"""Tiny random models from the real Transformers classes, and inputs for them.

Widths are small on purpose and one of them (the MLP's 200) is no multiple of 128, so
that the tail of a packing block is exercised everywhere.
"""

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

IMAGE, VIDEO, AUDIO = 90, 91, 92
VISION_START, VISION_END, AUDIO_START, AUDIO_END = 93, 94, 95, 96
PAD = 0
HIDDEN, INTERMEDIATE, VOCABULARY = 96, 200, 128

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 4, 4], "rope_theta": 1e4},
}
_VISION_MARKS = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}


def _seeded(model_class, config, seed: int):
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        # The default initialisation leaves activations near zero; errors would hide there.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = PAD
    return model


def omni_thinker(seed: int = 0, **overrides):
    """Qwen2.5-Omni thinker: text, vision and audio; two decoder layers."""
    config = Qwen2_5OmniThinkerConfig(
        text_config={**_TEXT, **overrides},
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "embed_dim": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [0],
            "window_size": 56,
        },
        audio_config={
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "num_mel_bins": 16,
            "output_dim": HIDDEN,
            "max_source_positions": 100,
            "n_window": 20,
        },
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        pad_token_id=PAD,
        **_VISION_MARKS,
    )
    return _seeded(Qwen2_5OmniThinkerForConditionalGeneration, config, seed)


def qwen2_5_vl(seed: int = 0):
    """Qwen2.5-VL: text and vision."""
    config = Qwen2_5_VLConfig(
        text_config=_TEXT,
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [0],
            "window_size": 56,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **_VISION_MARKS,
    )
    return _seeded(Qwen2_5_VLForConditionalGeneration, config, seed)


def qwen2_vl(seed: int = 0):
    """Qwen2-VL: text and vision."""
    config = Qwen2VLConfig(
        text_config=_TEXT,
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": HIDDEN,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **_VISION_MARKS,
    )
    return _seeded(Qwen2VLForConditionalGeneration, config, seed)


def qwen2(seed: int = 0):
    """A plain text decoder."""
    text = {k: v for k, v in _TEXT.items() if k != "rope_parameters"}
    return _seeded(Qwen2ForCausalLM, Qwen2Config(**text), seed)


def omni_inputs(batch: int = 2, seed: int = 0, pad: int = 3) -> dict:
    """One picture (4 tokens) and one sound (10 tokens) per row; row 0 has `pad` words more,
    so the other rows are padded on the left."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int):
        return torch.randint(3, 80, (count,), generator=generator)

    row = torch.cat(
        [
            words(5),
            torch.tensor([VISION_START, *[IMAGE] * 4, VISION_END]),
            words(3),
            torch.tensor([AUDIO_START, *[AUDIO] * 10, AUDIO_END]),
            words(4),
        ]
    )
    input_ids = torch.cat([torch.full((batch, pad), PAD), row.expand(batch, -1)], 1)
    attention_mask = torch.ones_like(input_ids)
    input_ids[0, :pad] = words(pad)
    attention_mask[1:, :pad] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(batch * 16, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * batch),
        "input_features": torch.randn(batch, 16, 40, generator=generator),
        "feature_attention_mask": torch.ones(batch, 40, dtype=torch.long),
    }


def vision_inputs(batch: int = 2, seed: int = 0, pad: int = 3) -> dict:
    """`omni_inputs` without the sound."""
    inputs = omni_inputs(batch, seed, pad)
    keep = inputs["input_ids"][0] != AUDIO
    inputs["input_ids"] = inputs["input_ids"][:, keep]
    inputs["attention_mask"] = inputs["attention_mask"][:, keep]
    # Qwen-VL derives its 3-D positions from these; Omni from the ids themselves.
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    del inputs["input_features"], inputs["feature_attention_mask"]
    return inputs


def text_inputs(batch: int = 2, length: int = 9, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 80, (batch, length), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
