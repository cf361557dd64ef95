"""Pre-train the two towers with throw-away linear heads, the language model left out.

Both towers loop over samples in Transformers (attention per chunk); the batched forwards here
compute the same numbers with the same weights and are several times faster on a CPU.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import (
    BLANK,
    compose,
    frame_labels,
    jitter_pictures,
    load_pictures,
    load_speech,
    mel,
    patches,
    speed_variants,
)
from optim import Pair
from spec import HIDDEN, audio_tokens
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_rotary_pos_emb_vision

H_POSITIONS = torch.tensor([0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2)
W_POSITIONS = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3] * 2)


def vision_forward(tower, pixels):
    """pixel_values [B,16,294] -> merged tokens [B,4,HIDDEN], all attention full."""
    batch = pixels.shape[0]
    x = tower.patch_embed(pixels.reshape(-1, 294)).view(batch, 16, -1)
    cos, sin = tower.rotary_pos_emb(x, torch.stack([H_POSITIONS, W_POSITIONS], dim=1))
    for block in tower.blocks:
        attn, y = block.attn, block.norm1(x)
        q, k, v = (
            proj(y).view(batch, 16, attn.num_heads, attn.head_dim)
            for proj in (attn.q, attn.k, attn.v)
        )
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + attn.proj(out.transpose(1, 2).reshape(batch, 16, -1))
        x = x + block.mlp(block.norm2(x))
    return tower.merger(x.reshape(batch * 16, -1)).view(batch, 4, -1)


def audio_forward(tower, features, frames):
    """Mel [B,80,T] with `frames` valid columns each -> tokens [B,T//4,HIDDEN], padded."""
    batch = features.shape[0]
    features = features[:, :, : int(frames.max())]
    valid = torch.arange(features.shape[2]) < frames[:, None]
    x = F.gelu(tower.conv1(features * valid[:, None])) * valid[:, None]
    x = F.gelu(tower.conv2(x)).transpose(1, 2)
    steps = x.shape[1]
    x = x + tower.positional_embedding(steps)
    after = (frames - 1) // 2 + 1
    mask = (torch.arange(steps) < after[:, None])[:, None, None]
    for layer in tower.layers:
        attn, y = layer.self_attn, layer.self_attn_layer_norm(x)
        q, k, v = (
            proj(y).view(batch, steps, attn.num_heads, attn.head_dim).transpose(1, 2)
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + attn.out_proj(out.transpose(1, 2).reshape(batch, steps, -1))
        x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
    pooled = (x[:, 0 : steps // 2 * 2 : 2] + x[:, 1::2]) / 2
    return tower.proj(tower.ln_post(pooled))


def checkpoint(path: Path, tower, head, optimizer, step: int) -> None:
    state = dict(tower=tower.state_dict(), head=head.state_dict(), step=step)
    temporary = path.with_suffix(".tmp")
    torch.save(state | dict(optimizer=optimizer.state_dict()), temporary)
    temporary.replace(path)


def resume(path: Path, tower, head, optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path)
    tower.load_state_dict(state["tower"])
    head.load_state_dict(state["head"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def train_vision(tower, path: Path, steps: int, batch: int = 128, seed: int = 1) -> None:
    """Classify the mean of the four tokens, so that the digit is linear in what the LM will see."""
    pictures, labels = load_pictures("train")
    test, test_labels = load_pictures("test")
    test = patches(test.float() / 255)
    torch.manual_seed(seed)
    head = torch.nn.Linear(HIDDEN, 10)
    named = [*tower.named_parameters(), *((f"head.{n}", p) for n, p in head.named_parameters())]
    optimizer = Pair(named, lr=2e-3, weight_decay=0.05, total=steps)
    start, began = resume(path, tower, head, optimizer), time.time()
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(labels), (batch,), generator=generator)
        seen = jitter_pictures(pictures[rows].float() / 255, generator)
        logits = head(vision_forward(tower, patches(seen)).mean(1))
        loss = F.cross_entropy(logits, labels[rows])
        loss.backward()
        optimizer.step(step)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            with torch.no_grad():
                guess = head(vision_forward(tower, test).mean(1)).argmax(1)
            accuracy = (guess == test_labels).float().mean()
            seconds = time.time() - began
            print(
                f"vision {step + 1} loss {loss:.3f} test {accuracy:.4f} {seconds:.0f}s", flush=True
            )
            checkpoint(path, tower, head, optimizer, step + 1)


def greedy_ctc(logits, count: int):
    best = logits[:count].argmax(-1).tolist()
    return [d for d, before in zip(best, [BLANK, *best], strict=False) if d not in (BLANK, before)]


def spoken_batch(speech, variants, extractor, counts, rng, augment=True):
    """Mel features and everything a loss needs for freshly composed clips."""
    clips = [compose(speech, variants, int(count), rng, augment) for count in counts]
    features, frames = mel(extractor, [wave for wave, _, _ in clips])
    digits = [digits for _, digits, _ in clips]
    labels = [
        frame_labels(spans, spoken, int(n), extractor.hop_length)
        for (_, spoken, spans), n in zip(clips, frames, strict=True)
    ]
    return features, frames, digits, labels


def mask_spectrum(features, generator):
    """Blank one band of mel channels and one stretch of time per clip."""
    batch, bands, length = features.shape
    floor = features.amin((1, 2), keepdim=True)
    for axis, limit, size in ((1, 12, bands), (2, 8, length)):
        width = torch.randint(0, limit, (batch, 1), generator=generator)
        first = (torch.rand(batch, 1, generator=generator) * (size - width)).long()
        place = torch.arange(size)
        hidden = (place >= first) & (place < first + width)
        shape = (batch, size, 1) if axis == 1 else (batch, 1, size)
        features = torch.where(hidden.view(shape), floor, features)
    return features


def train_audio(tower, extractor, path: Path, steps: int, batch: int = 48, seed: int = 2) -> None:
    """CTC on whole clips plus the digit at each token, on clips composed afresh every step."""
    speech, test = load_speech("train"), load_speech("test")
    variants = speed_variants(speech)
    rng = np.random.default_rng(99)
    sets = {n: spoken_batch(test, None, extractor, [n] * 300, rng, augment=False) for n in (1, 3)}
    torch.manual_seed(seed)
    head = torch.nn.ModuleDict(
        dict(ctc=torch.nn.Linear(HIDDEN, 11), frame=torch.nn.Linear(HIDDEN, 11))
    )
    named = [*tower.named_parameters(), *((f"head.{n}", p) for n, p in head.named_parameters())]
    optimizer = Pair(named, lr=2e-3, weight_decay=0.05, total=steps)
    start, began = resume(path, tower, head, optimizer), time.time()
    for step in range(start, steps):
        rng = np.random.default_rng([seed, step])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        counts = rng.choice([1, 2, 3, 4], batch, p=[0.4, 0.2, 0.2, 0.2])
        features, frames, digits, labels = spoken_batch(speech, variants, extractor, counts, rng)
        tokens = audio_forward(tower, mask_spectrum(features, generator), frames)
        lengths = torch.tensor([audio_tokens(int(n)) for n in frames])
        target = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        framewise = F.cross_entropy(
            head["frame"](tokens).flatten(0, 1), target.flatten(), ignore_index=-100
        )
        log_probs = head["ctc"](tokens).log_softmax(-1).transpose(0, 1)
        flat = torch.tensor([d for spoken in digits for d in spoken])
        counts = torch.tensor([len(spoken) for spoken in digits])
        ctc = F.ctc_loss(log_probs, flat, lengths, counts, blank=BLANK, zero_infinity=True)
        loss = framewise + 0.5 * ctc
        loss.backward()
        optimizer.step(step)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            exact = {}
            for count, (features, frames, digits, _) in sets.items():
                with torch.no_grad():
                    logits = head["ctc"](audio_forward(tower, features, frames))
                guesses = [
                    greedy_ctc(row, audio_tokens(int(n)))
                    for row, n in zip(logits, frames, strict=True)
                ]
                exact[count] = np.mean([g == d for g, d in zip(guesses, digits, strict=True)])
            seconds = time.time() - began
            print(
                f"audio {step + 1} frame {framewise:.3f} ctc {ctc:.3f} exact singles "
                f"{exact[1]:.3f} triples {exact[3]:.3f} {seconds:.0f}s",
                flush=True,
            )
            checkpoint(path, tower, head, optimizer, step + 1)
