"""Random Qwen2.5-VL checkpoints of any size, written a tensor at a time, and data for them."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

from scale.models import LETTERS, TEMPLATE, keep_stamp, made_once, write_rows

# The special tokens of Qwen2.5-VL in the order of their ids, the first behind the vocabulary.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SIZES = {
    # Qwen/Qwen2.5-VL-3B-Instruct's own numbers
    "3b": {
        "shards": 3,
        "dtype": "bfloat16",
        "words": 151643,
        "text": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "mrope_section": (16, 24, 24),
        },
        "vision": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
        },
    },
    # Qwen/Qwen2.5-VL-7B-Instruct's and 72B-Instruct's, of which only config.json is written
    "7b": {
        "dtype": "bfloat16",
        "words": 151643,
        "tied": False,
        "text": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "mrope_section": (16, 24, 24),
        },
        "vision": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
        },
    },
    "72b": {
        "dtype": "bfloat16",
        "words": 151643,
        "tied": False,
        "text": {
            "vocab_size": 152064,
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "mrope_section": (16, 24, 24),
        },
        "vision": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3456,
            "num_heads": 16,
            "out_hidden_size": 8192,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
        },
    },
    # qwen2-100m as the text half of a vision-language model
    "100m": {
        "shards": 1,
        "dtype": "float32",
        "words": 256,
        "text": {
            "vocab_size": 4096,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "mrope_section": (8, 12, 12),
        },
        "vision": {
            "depth": 4,
            "hidden_size": 320,
            "intermediate_size": 856,
            "num_heads": 4,
            "out_hidden_size": 1024,
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
        },
    },
    # two layers, to try the flow
    "mini": {
        "shards": 3,
        "dtype": "bfloat16",
        "words": 300,
        "text": {
            "vocab_size": 320,
            "hidden_size": 96,
            "intermediate_size": 200,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "mrope_section": (4, 4, 4),
        },
        "vision": {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "out_hidden_size": 96,
            "fullatt_block_indexes": [1],
            "window_size": 112,
        },
    },
}


def qwen2_5_vl(folder: Path, size: str, *, images: int, texts: int, side: int, words: int) -> Path:
    """A checkpoint laid out as Qwen's are on disk, its processor, and `images.jsonl` and
    `texts.jsonl`: `images` pictures of `side` pixels with `words` letters each, `texts` texts."""
    shape = SIZES[size]
    asked = {"images": images, "texts": texts, "side": side, "words": words}
    stamp = json.loads(json.dumps({"kind": "qwen2_5_vl", "version": 1, **shape, **asked}))
    if made_once(folder, stamp):
        return folder
    config = config_of(shape)
    config.save_pretrained(folder)
    write_processor(folder, shape["words"])
    write_weights(folder, config, shape)
    write_data(folder, **asked)
    keep_stamp(folder, stamp)
    return folder


def config_of(shape: dict):
    """The family's config; everything that `shape` does not name is as Qwen's 3B has it."""
    from transformers import Qwen2_5_VLConfig

    text = dict(shape["text"])
    section = list(text.pop("mrope_section"))
    ids = {name: shape["words"] + i for i, name in enumerate(SPECIAL)}
    config = Qwen2_5_VLConfig(
        text_config={
            **text,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 128000,
            "tie_word_embeddings": shape.get("tied", True),
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": section,
                "rope_theta": 1e6,
            },
        },
        vision_config={"patch_size": 14, "spatial_merge_size": 2, **shape["vision"]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=shape.get("tied", True),
        dtype=shape["dtype"],
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


def write_processor(folder: Path, words: int) -> None:
    """A byte-level tokenizer of `words` words, most never used, and Qwen's pictures."""
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import Qwen2Tokenizer

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"[unused {i}]": i for i in range(len(vocabulary), words)}
    for i, name in enumerate(SPECIAL):
        vocabulary[name] = words + i
    made = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    made.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    content = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2))


def write_data(folder: Path, *, images: int, texts: int, side: int, words: int) -> None:
    import numpy as np
    from PIL import Image

    draw, numbers = random.Random(0), np.random.default_rng(0)
    pictures = folder / "pictures"
    pictures.mkdir()
    rows = []
    for i in range(images):
        coarse = numbers.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        smooth.save(pictures / f"{i:03d}.png")
        letters = "".join(draw.choices(LETTERS, k=words))
        rows.append({"image": str(pictures / f"{i:03d}.png"), "text": letters})
    write_rows(folder / "images.jsonl", rows)
    only = ["".join(draw.choices(LETTERS, k=4 * words)) for _ in range(texts)]
    write_rows(folder / "texts.jsonl", [{"text": text} for text in only])


def write_weights(folder: Path, config, shape: dict) -> None:
    """Every tensor in turn, drawn from its own seed, into shards of equal size and an index."""
    import torch

    dtype = getattr(torch, shape["dtype"])
    size = dtype.itemsize
    tensors = list(shapes(config))
    whole = sum(math.prod(s) for _, s in tensors) * size
    files: list[list[tuple[str, tuple]]] = [[]]
    filled = 0
    for name, one in tensors:
        if filled >= whole / shape["shards"] and len(files) < shape["shards"]:
            files.append([])
            filled = 0
        files[-1].append((name, one))
        filled += math.prod(one) * size
    single = len(files) == 1
    index = {}
    for i, content in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        name = "model.safetensors" if single else name
        write_shard(folder / name, content, dtype)
        index |= {tensor: name for tensor, _ in content}
    if not single:
        said = {"metadata": {"total_size": whole}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(said, indent=2))


def shapes(config) -> Iterator[tuple[str, tuple]]:
    """(name on disk, shape) of every tensor; the tied head is not one of them."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    for name, parameter in model.named_parameters():  # a tied one once, by its first name
        if name == "lm_head.weight":
            continue
        disk = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        yield disk, tuple(parameter.shape)


def write_shard(path: Path, content: list[tuple[str, tuple]], dtype) -> None:
    import torch

    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in content:
        end = start + math.prod(shape) * dtype.itemsize
        said = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
        header[name] = {"dtype": said, "shape": shape, "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in content:
            tensor = draw(name, shape).to(dtype).contiguous()
            file.write(tensor.view(torch.uint8 if tensor.ndim else dtype).numpy().tobytes())


def draw(name: str, shape: tuple):
    """A tensor from a seed of its own: weights keep activations of order one, norms have a few
    loud channels as those of trained models do."""
    import torch

    seed = int.from_bytes(name.encode(), "little") % (2**63)
    generator = torch.Generator().manual_seed(seed)
    if len(shape) >= 2:
        return torch.empty(shape).normal_(0, math.prod(shape[1:]) ** -0.5, generator=generator)
    if "norm" in name or name.endswith("ln_q.weight"):
        made = torch.ones(shape)
        made[torch.randperm(shape[0], generator=generator)[: max(1, shape[0] // 128)]] = 8.0
        return made
    return 0.1 * torch.randn(shape, generator=generator)
