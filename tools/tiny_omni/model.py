"""Build the tokenizer, the processor and a freshly initialised thinker."""

import json

import torch
from spec import HIDDEN, HOP, LAYERS, QUESTIONS, RATE, TEXT_TRAIN, VOCAB, WORDS
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from masquant_cli.models.omni_processor import MasquantOmniProcessor, register

SPECIAL = {
    "pad": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "audio": "<|AUDIO|>",
    "audio_bos": "<|audio_bos|>",
    "audio_eos": "<|audio_eos|>",
    "vision_bos": "<|vision_bos|>",
    "vision_eos": "<|vision_eos|>",
    "image": "<|IMAGE|>",
    "video": "<|VIDEO|>",
}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_bos|><|IMAGE|><|vision_eos|>' -}}
{%- elif part['type'] == 'audio' or 'audio' in part or 'audio_url' in part -%}
{{- '<|audio_bos|><|AUDIO|><|audio_eos|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def training_text():
    """Everything the tokenizer may learn from; number words are repeated so each gets a token."""
    for role in ("user\n", "assistant\n", "system\n"):
        yield from [role] * 400
    for word in WORDS:
        yield from [word, " " + word, " " + word + ","] * 400
    for word in WORDS[:10]:
        yield from [word.capitalize()] * 200
    for questions in QUESTIONS.values():
        for question in questions:
            yield from [question] * 100
    for template in TEXT_TRAIN:
        yield from [template.format(a="one", b="two")] * 40


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen2's pre-tokenizer, so unseen words still have tokens."""
    reference = Qwen2Tokenizer()._tokenizer
    bpe = Tokenizer(models.BPE(fuse_unk=False, byte_fallback=False))
    bpe.normalizer = reference.normalizer
    bpe.pre_tokenizer = reference.pre_tokenizer
    bpe.decoder = reference.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    bpe.train_from_iterator(training_text(), trainer)
    state = json.loads(bpe.to_str())["model"]
    named = ("image", "audio", "video", "vision_bos", "vision_eos", "audio_bos", "audio_eos")
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        eos_token=SPECIAL["im_end"],
        pad_token=SPECIAL["pad"],
        unk_token=SPECIAL["pad"],
        extra_special_tokens={f"{name}_token": SPECIAL[name] for name in named},
    )
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL.values()]
    )
    return tokenizer


def build_processor() -> MasquantOmniProcessor:
    register()
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=7,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28},
    )
    feature_extractor = WhisperFeatureExtractor(
        feature_size=80,
        sampling_rate=RATE,
        hop_length=HOP,
        n_fft=400,
        chunk_length=4,
        return_attention_mask=True,
    )
    return MasquantOmniProcessor(
        image_processor=image_processor,
        feature_extractor=feature_extractor,
        tokenizer=build_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer) -> Qwen2_5OmniThinkerConfig:
    ids = {name: tokenizer.convert_tokens_to_ids(text) for name, text in SPECIAL.items()}
    return Qwen2_5OmniThinkerConfig(
        text_config=dict(
            vocab_size=(len(tokenizer) + 15) // 16 * 16,
            hidden_size=HIDDEN,
            intermediate_size=768,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
            pad_token_id=ids["pad"],
            eos_token_id=ids["im_end"],
            bos_token_id=None,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=128,
            intermediate_size=384,
            num_heads=4,
            patch_size=7,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=56,
            out_hidden_size=HIDDEN,
            fullatt_block_indexes=[0, 1],
            in_channels=3,
        ),
        audio_config=dict(
            num_mel_bins=80,
            encoder_layers=3,
            encoder_attention_heads=4,
            encoder_ffn_dim=384,
            d_model=128,
            max_source_positions=200,
            n_window=100,
            output_dim=HIDDEN,
        ),
        audio_token_index=ids["audio"],
        image_token_index=ids["image"],
        video_token_index=ids["video"],
        audio_start_token_id=ids["audio_bos"],
        audio_end_token_id=ids["audio_eos"],
        vision_start_token_id=ids["vision_bos"],
        vision_end_token_id=ids["vision_eos"],
        user_token_id=tokenizer.convert_tokens_to_ids("user"),
        pad_token_id=ids["pad"],
        eos_token_id=ids["im_end"],
        tie_word_embeddings=False,
    )


@torch.no_grad()
def fan_in_init(model, seed: int) -> None:
    """Variance-preserving init; the default 0.02 leaves both towers 30x below their positions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(weight, std):
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    depth = {"language_model": LAYERS, "visual": 2, "audio_tower": 3}
    closing = ("o_proj", "down_proj", "out_proj", "fc2", "attn.proj")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            std = module.in_features**-0.5
            if name.endswith(closing):
                tower = next(layers for part, layers in depth.items() if part in name)
                std /= (2 * tower) ** 0.5
            normal(module.weight, std)
            if module.bias is not None:
                module.bias.zero_()
    normal(model.lm_head.weight, 0.02)
    normal(model.get_input_embeddings().weight, 0.5)
    audio, vision = model.model.audio_tower, model.model.visual
    normal(audio.conv1.weight, (2 / 240) ** 0.5)
    normal(audio.conv2.weight, 2 * (2 / 384) ** 0.5)
    audio.conv1.bias.zero_()
    audio.conv2.bias.zero_()
    normal(vision.patch_embed.proj.weight, 294**-0.5)


def build_model(tokenizer, seed: int) -> Qwen2_5OmniThinkerForConditionalGeneration:
    model = Qwen2_5OmniThinkerForConditionalGeneration(build_config(tokenizer))
    fan_in_init(model, seed)
    return model
