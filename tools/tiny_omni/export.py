"""Turn a training checkpoint into a normal Hugging Face folder with bf16 weights."""

from pathlib import Path

import torch
from model import build_model, build_processor
from transformers import GenerationConfig


def export(checkpoint: Path, folder: Path) -> None:
    processor = build_processor()
    tokenizer = processor.tokenizer
    model = build_model(tokenizer, seed=0)
    model.load_state_dict(torch.load(checkpoint)["model"])
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=16,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB", flush=True)
