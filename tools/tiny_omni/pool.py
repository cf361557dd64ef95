"""Run the frozen towers once over many augmented samples; the LM then trains on the results."""

import time
from pathlib import Path

import numpy as np
import torch
from data import (
    compose,
    jitter_pictures,
    load_pictures,
    load_speech,
    mel,
    patches,
    speed_variants,
)
from spec import audio_tokens
from towers import audio_forward, vision_forward

EMBEDDING_RMS = 0.5  # of both towers' outputs and of the token embeddings at the start


@torch.no_grad()
def picture_pool(tower, split: str, copies: int, seed: int):
    """fp16 tokens [copies*N,4,HIDDEN] and labels; copy 0 is the pictures as they are."""
    pictures, labels = load_pictures(split)
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    for copy in range(copies):
        for chunk in pictures.float().div(255).split(250):
            seen = jitter_pictures(chunk, generator) if copy else chunk
            tokens.append(vision_forward(tower, patches(seen)).half())
    return torch.cat(tokens), labels.repeat(copies)


@torch.no_grad()
def speech_pool(tower, extractor, split: str, amounts: dict, seed: int):
    """fp16 tokens of every clip, one after another, with offsets and digits.

    amounts[n] clips of n digits each (fewer digits where four seconds do not hold n).
    """
    augment = split == "train"
    speech = load_speech(split)
    variants = speed_variants(speech) if augment else None
    rng = np.random.default_rng(seed)
    tokens, digits, counts = [], [], []
    for amount, total in amounts.items():
        for first in range(0, total, 40):
            clips = [
                compose(speech, variants, amount, rng, augment and i % 4 != 0)
                for i in range(first, min(first + 40, total))
            ]
            features, frames = mel(extractor, [wave for wave, _, _ in clips])
            out = audio_forward(tower, features, frames).half()
            for row, n, (_, spoken, _) in zip(out, frames, clips, strict=True):
                count = audio_tokens(int(n))
                tokens.append(row[:count].clone())
                digits.append(spoken)
                counts.append(count)
    offsets = np.concatenate([[0], np.cumsum(counts)]).tolist()
    return torch.cat(tokens), offsets, digits


@torch.no_grad()
def normalise(linear, tokens) -> float:
    """Scale a tower's last linear so that its tokens have EMBEDDING_RMS; returns the factor."""
    factor = EMBEDDING_RMS / float(tokens.float().pow(2).mean().sqrt())
    linear.weight.mul_(factor)
    linear.bias.mul_(factor)
    return factor


def build_pools(model, extractor, path: Path) -> None:
    began = time.time()
    vision, audio = model.model.visual, model.model.audio_tower
    with torch.no_grad():
        normalise(vision.merger.mlp[2], picture_pool(vision, "test", 1, 0)[0])
        normalise(audio.proj, speech_pool(audio, extractor, "test", {2: 200}, 0)[0])
    state = dict(vision=vision.state_dict(), audio=audio.state_dict())
    state["pictures"] = dict(
        train=picture_pool(vision, "train", 3, seed=11), test=picture_pool(vision, "test", 1, 0)
    )
    print(f"pictures {time.time() - began:.0f}s", flush=True)
    state["speech"] = dict(
        train=speech_pool(audio, extractor, "train", {1: 4000, 2: 2500, 3: 2500, 4: 2500}, seed=12),
        test=speech_pool(audio, extractor, "test", {1: 400, 2: 100, 3: 100, 4: 100}, seed=13),
    )
    print(f"speech {time.time() - began:.0f}s", flush=True)
    torch.save(state, path)
