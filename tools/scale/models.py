"""Models and calibration data of the scale benchmark: random, of real classes, from one seed.

Every folder is made once and recognised by a stamp of what made it.
"""

import json
import random
import shutil
import string
from pathlib import Path

LETTERS = string.ascii_letters + string.digits + " .,;"
SAMPLES, TOKENS = 64, 256
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMED = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
MARKS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>")
AROUND = len("user\n") + 3  # tokens that the template adds to a sample: both marks and a newline


def tokenizer():
    """Bytes are the vocabulary (0-255), special tokens follow."""
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Qwen2Tokenizer(
        vocab={c: i for i, c in enumerate(alphabet)},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=dict(NAMED),
    )
    made.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    made.chat_template = TEMPLATE
    return made


def texts(samples: int = SAMPLES, tokens: int = TOKENS, seed: int = 0) -> list[str]:
    """Random letters that become exactly `tokens` tokens each, the template's included."""
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS, k=tokens - AROUND)) for _ in range(samples)]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def made_once(folder: Path, stamp: dict) -> bool:
    """Whether `folder` is already what `stamp` describes; else it is emptied."""
    note = folder / ".stamp.json"
    if note.is_file() and json.loads(note.read_text()) == stamp:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return False


def keep_stamp(folder: Path, stamp: dict) -> None:
    (folder / ".stamp.json").write_text(json.dumps(stamp))


def text_config(layers: int = 8) -> dict:
    """qwen2-100m: 90 million weights in 8 layers."""
    return {
        "vocab_size": 4096,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
    }


def qwen2(folder: Path, layers: int = 8) -> Path:
    """A random Qwen2 with `layers` layers, fp32, and `calibration.jsonl` beside its files."""
    stamp = {"kind": "qwen2", "version": 1, **text_config(layers)}
    if made_once(folder, stamp):
        return folder
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    words = tokenizer()
    torch.manual_seed(0)
    ids = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    model = Qwen2ForCausalLM(Qwen2Config(**text_config(layers), **ids))
    with torch.no_grad():
        randomise(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    write_rows(folder / "calibration.jsonl", [{"text": text} for text in texts()])
    keep_stamp(folder, stamp)
    return folder


def randomise(model) -> None:
    """Weights that keep activations of order one, and norms with a few loud channels, as trained
    models have: without them there is nothing to smooth."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            fan_in = parameter.shape[1:].numel()
            parameter.normal_(0, fan_in**-0.5, generator=generator)
        elif name.endswith("norm.weight"):
            parameter.fill_(1.0)
            loud = torch.randperm(len(parameter), generator=generator)[: len(parameter) // 128]
            parameter[loud] = 8.0
