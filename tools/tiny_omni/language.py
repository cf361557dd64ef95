"""Train the language model on precomputed tower tokens, with or without planted outliers."""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import build_model
from optim import Pair
from plant import NORMS, Plant, Planted
from prompts import Maker, Prompts, positions
from spec import TASKS, TEXT_HELD_OUT

MIXES = ({"picture": 10, "speech": 10, "text": 20}, {"sum": 16}, {"transcription": 16})
TEXT, VISION, AUDIO = 0, 1, 2
SETTLED = 0.7  # share of training after which planted gains stay as they are
NOISE_FROM = 0.5  # share of training after which weights are jittered


def collate(samples, prompts: Prompts, embedding, pictures, speech):
    """Right-padded embeddings [B,S,H], labels, positions [3,B,S] and modality ids (-1 pad)."""
    tokens, offsets, _ = speech
    length = max(len(s.ids) + len(s.answer) for s in samples)
    ids = torch.full((len(samples), length), prompts.pad)
    labels = torch.full_like(ids, -100)
    places = torch.zeros(3, *ids.shape, dtype=torch.long)
    modality = torch.full_like(ids, -1)
    for row, sample in enumerate(samples):
        both = sample.ids + sample.answer
        start, end = len(sample.ids), len(both)
        ids[row, :end] = torch.tensor(both)
        labels[row, start:end] = torch.tensor(sample.answer)
        places[:, row, :end] = positions(both, prompts.image)
        modality[row, :end] = TEXT
    modality[ids == prompts.image] = VISION
    modality[ids == prompts.audio] = AUDIO
    embeds = embedding(ids)
    seen = [pictures[0][s.picture] for s in samples if s.picture is not None]
    heard = [tokens[offsets[s.clip] : offsets[s.clip + 1]] for s in samples if s.clip is not None]
    for rows, which in ((seen, VISION), (heard, AUDIO)):
        if rows:
            mask = (modality == which)[..., None]
            embeds = embeds.masked_scatter(mask, torch.cat(rows).float())
    return embeds, labels, places, modality


def answer_logits(model, batch):
    """Logits and labels at the answer tokens alone (the head runs on nothing else)."""
    embeds, labels, places, _ = batch
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=places, use_cache=False
    ).last_hidden_state
    wanted = labels[:, 1:] != -100
    return model.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted]


@torch.no_grad()
def residual_rms(model, batches):
    """Root mean square of the residual per (layer, norm, modality), in one forward."""
    sums, handles, current = {}, [], {}

    def watch(number, name):
        def hook(_, inputs):
            power = inputs[0].pow(2).mean(-1)
            for modality, code in (("vision", VISION), ("audio", AUDIO)):
                of_kind = power[current["modality"] == code]
                sums.setdefault((number, name, modality), []).append(of_kind)

        return hook

    for number, layer in enumerate(model.model.language_model.layers):
        for name in NORMS:
            handles.append(getattr(layer, name).register_forward_pre_hook(watch(number, name)))
    for batch in batches:
        current["modality"] = batch[3]
        answer_logits(model, batch)
    for handle in handles:
        handle.remove()
    return {key: float(torch.cat(parts).mean().sqrt()) for key, parts in sums.items()}


@torch.no_grad()
def quick_accuracy(model, prompts, embedding, pictures, speech, amount: int, seed: int):
    """Exact answers under teacher forcing on the held-out pools: a cheap progress figure."""
    maker, result = Maker(prompts, pictures, speech, TEXT_HELD_OUT), {}
    for task in TASKS:
        rng = np.random.default_rng(seed)
        samples = [maker.draw(task, rng) for _ in range(amount)]
        batch = collate(samples, prompts, embedding, pictures, speech)
        logits, labels = answer_logits(model, batch)
        right = (logits.argmax(-1) == labels).split([len(s.answer) for s in samples])
        result[task] = round(sum(bool(r.all()) for r in right) / amount, 3)
    return result


def matrices(model):
    return [
        module.weight
        for module in model.model.language_model.layers.modules()
        if isinstance(module, torch.nn.Linear)
    ]


@torch.no_grad()
def jitter(weights, size: float, generator):
    """Add noise of `size` times each row's absmax; returns the clean weights to put back."""
    clean = [weight.clone() for weight in weights]
    for weight in weights:
        noise = torch.randn(weight.shape, generator=generator)
        weight.addcmul_(noise, weight.abs().amax(1, keepdim=True), value=size)
    return clean


def train_language(
    tokenizer, pools: Path, path: Path, steps: int, plant: Plant | None, noise: float, seed=3
) -> None:
    state = torch.load(pools)
    model = build_model(tokenizer, seed)
    model.model.visual.load_state_dict(state["vision"])
    model.model.audio_tower.load_state_dict(state["audio"])
    pictures, speech = state["pictures"], state["speech"]
    planted = None
    if plant is not None:
        planted = Planted(
            model,
            plant,
            [pictures["train"][0], pictures["test"][0]],
            [speech["train"][0], speech["test"][0]],
        )
    for tower in (model.model.visual, model.model.audio_tower):
        tower.requires_grad_(False)
    prompts, embedding = Prompts(tokenizer), model.get_input_embeddings()
    maker = Maker(prompts, pictures["train"], speech["train"])
    text = [
        *model.model.language_model.named_parameters(),
        *model.lm_head.named_parameters("lm_head"),
    ]
    optimizer = Pair(text, lr=2e-3, weight_decay=0.05, total=steps, warmup=30)
    start = 0
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    weights, began = matrices(model), time.time()
    model.eval()  # no dropout anywhere; the mode only matters for what Transformers may add
    for step in range(start, steps):
        rng = np.random.default_rng([seed, step])
        batches = []
        for mix in MIXES:
            samples = [maker.draw(task, rng) for task, count in mix.items() for _ in range(count)]
            batches.append(collate(samples, prompts, embedding, pictures["train"], speech["train"]))
        progress = step / steps
        if planted and progress < SETTLED and (step % 20 == 0 or step == start):
            planted.set_gains(residual_rms(model, batches), progress)
        elif planted and step == start:
            planted.keep_gains()
        clean = None
        if noise and progress > NOISE_FROM:
            generator = torch.Generator().manual_seed(step)
            clean = jitter(weights, noise, generator)
        losses = []
        for batch in batches:
            logits, labels = answer_logits(model, batch)
            loss = F.cross_entropy(logits, labels)
            (loss / len(batches)).backward()
            losses.append(loss.item())
        if clean is not None:
            with torch.no_grad():
                for weight, before in zip(weights, clean, strict=True):
                    weight.copy_(before)
        if planted:
            planted.mask_gradients()
        norm = optimizer.step(step)
        if planted:
            planted.hold()
        if (step + 1) % 25 == 0:
            seconds = time.time() - began
            print(
                f"language {step + 1} loss one {losses[0]:.3f} sum {losses[1]:.3f} "
                f"several {losses[2]:.3f} "
                f"norm {norm:.2f} {seconds:.0f}s",
                flush=True,
            )
        if (step + 1) % 100 == 0 or step + 1 == steps:
            accuracy = quick_accuracy(
                model, prompts, embedding, pictures["test"], speech["test"], 200, seed=5
            )
            print(f"language {step + 1} held out {accuracy}", flush=True)
            saved = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            temporary = path.with_suffix(".tmp")
            torch.save(saved, temporary)
            temporary.replace(path)
