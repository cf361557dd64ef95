"""A byte-level Qwen2.5-Omni processor and random models with its token ids, built in memory."""

from functools import cache

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from masquant_cli.models.omni_processor import MasquantOmniProcessor

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif c['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMED = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


def tokenizer(template: str = TEMPLATE) -> Qwen2Tokenizer:
    """Bytes are the vocabulary (0-255), special tokens follow."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=dict(NAMED),
    )
    made.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)])
    made.chat_template = template
    return made


def processor(template: str = TEMPLATE) -> MasquantOmniProcessor:
    """Pictures up to 56x56 (patch 14, merged 2x2), sounds up to one second at 16 kHz."""
    return MasquantOmniProcessor(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=14,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56},
        ),
        feature_extractor=WhisperFeatureExtractor(
            feature_size=16, chunk_length=1, return_attention_mask=True
        ),
        tokenizer=tokenizer(template),
        chat_template=template,
    )


@cache
def omni(seed: int = 0) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """A random thinker of width 64 with two layers. Cached: do not change it, copy it."""
    made, text = processor(), tokenizer()
    named = made.tokenizer.convert_tokens_to_ids
    torch.manual_seed(seed)
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": len(text),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": text.pad_token_id,
            "eos_token_id": text.eos_token_id,
            "bos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "rope_theta": 1e4,
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [0],
            "window_size": 56,
        },
        audio_config={
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "num_mel_bins": 16,
            "output_dim": 64,
            "max_source_positions": 100,
            "n_window": 50,
        },
        image_token_index=named("<|IMAGE|>"),
        audio_token_index=named("<|AUDIO|>"),
        video_token_index=named("<|VIDEO|>"),
        vision_start_token_id=named("<|vision_bos|>"),
        vision_end_token_id=named("<|vision_eos|>"),
        audio_start_token_id=named("<|audio_bos|>"),
        audio_end_token_id=named("<|audio_eos|>"),
    )
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # the default leaves activations, and differences, near zero
                parameter.normal_(0, parameter.shape[1] ** -0.5)
        # A generated placeholder without media behind it would be an error of its own.
        for token in set(range(256, len(text))) - {text.eos_token_id}:
            model.lm_head.weight[token] = 0
    model.generation_config.eos_token_id = text.eos_token_id
    model.generation_config.pad_token_id = text.pad_token_id
    return model
