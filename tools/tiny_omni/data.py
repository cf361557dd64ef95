"""Read the digits, compose spoken sequences, and augment pictures."""

import io
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import soundfile
import soxr
import torch
import torch.nn.functional as F
from PIL import Image
from spec import CLIP, DATA, RATE, audio_tokens

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])  # of the picture processor
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
SPEEDS = (0.85, 0.92, 1.0, 1.08, 1.16)
BLANK = 10  # the class of a token on which no digit sounds


@dataclass(frozen=True)
class Recordings:
    """Spoken digits as 16 kHz float waves; `index[speaker][digit]` lists rows."""

    waves: list
    digits: list
    speakers: list
    index: dict


def load_pictures(split: str):
    """uint8 [N,28,28] and int64 [N]."""
    rows = pq.read_table(DATA / f"images-{split}.parquet").to_pylist()
    pixels = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows]
    return torch.tensor(np.stack(pixels)), torch.tensor([row["digit"] for row in rows])


def load_speech(split: str, rate: int = RATE) -> Recordings:
    waves, digits, speakers, index = [], [], [], {}
    for row in pq.read_table(DATA / f"speech-{split}.parquet").to_pylist():
        wave, stored_rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        if rate != stored_rate:
            wave = soxr.resample(wave, stored_rate, rate)
        index.setdefault(row["speaker"], {}).setdefault(row["digit"], []).append(len(waves))
        waves.append(wave)
        digits.append(row["digit"])
        speakers.append(row["speaker"])
    return Recordings(waves, digits, speakers, index)


def speed_variants(speech: Recordings) -> list:
    """Every recording at every speed, so that composing a clip costs no resampling."""
    return [
        [wave if speed == 1.0 else soxr.resample(wave, RATE * speed, RATE) for speed in SPEEDS]
        for wave in speech.waves
    ]


def compose(
    speech: Recordings,
    variants,
    count: int,
    rng: np.random.Generator,
    augment: bool,
    rate: int = RATE,
    hiss: float = 1e-4,
):
    """One speaker says `count` digits: wave [<= 4 s], digits, and each digit's sample span.

    `hiss` is the noise of clips that are not augmented; augmented ones draw theirs, or none.
    """
    speaker = list(speech.index)[rng.integers(len(speech.index))]
    gap = (0.05, 0.4) if augment else (0.1, 0.3)
    wave = np.zeros(CLIP * rate // RATE, np.float32)
    at = int(rate * rng.uniform(0.0, 0.3))
    digits, spans = [], []
    for _ in range(count):
        digit = int(rng.integers(10))
        row = int(rng.choice(speech.index[speaker][digit]))
        part = variants[row][rng.integers(len(SPEEDS))] if augment else speech.waves[row]
        if at + len(part) > len(wave):
            if digits:
                break
            part = part[: len(wave) - at]
        gain = 10 ** rng.uniform(-0.4, 0.4) if augment else 1.0
        wave[at : at + len(part)] = part * np.float32(gain)
        spans.append((at, at + len(part)))
        digits.append(digit)
        at += len(part) + int(rate * rng.uniform(*gap))
    wave = wave[:at]
    level = hiss
    if augment:
        level = 10 ** rng.uniform(-4, -2.3) if rng.random() < 0.7 else 0.0
    if level:
        wave = wave + rng.standard_normal(len(wave), dtype=np.float32) * np.float32(level)
    return wave, digits, spans


def mel(extractor, waves):
    """Log-mel features [B,80,200] and frame counts [B], as the processor computes them."""
    padded = np.zeros((len(waves), CLIP), np.float32)
    for row, wave in enumerate(waves):
        padded[row, : len(wave)] = wave[:CLIP]
    features = extractor._torch_extract_fbank_features(padded)
    frames = torch.tensor([-(-min(len(wave), CLIP) // extractor.hop_length) for wave in waves])
    return torch.as_tensor(features), frames


def frame_labels(spans, digits, frames: int, hop: int):
    """For each audio token, the digit that sounds at its centre, or BLANK."""
    labels = torch.full((audio_tokens(frames),), BLANK)
    centres = (torch.arange(len(labels)) * 4 + 2) * hop
    for (start, end), digit in zip(spans, digits, strict=True):
        labels[(centres >= start) & (centres < end)] = digit
    return labels


def patches(pictures):
    """Grey pictures [B,28,28] in 0..1 -> pixel_values [B,16,294], as the processor lays them."""
    batch = pictures.shape[0]
    colour = (pictures[:, None] - MEAN[:, None, None]) / STD[:, None, None]
    grid = colour.reshape(batch, 3, 2, 2, 7, 2, 2, 7).permute(0, 2, 5, 3, 6, 1, 4, 7)
    grid = grid.reshape(batch, 16, 3, 1, 49).expand(-1, -1, -1, 2, -1)
    return grid.reshape(batch, 16, 294)


def jitter_pictures(pictures, generator):
    """Rotate, scale, shear and shift [B,28,28] a little, each picture on its own."""
    batch = pictures.shape[0]

    def uniform(limit):
        return (torch.rand(batch, generator=generator) * 2 - 1) * limit

    angle, shear = uniform(0.26), uniform(0.2)
    scale_x, scale_y = 1 + uniform(0.15), 1 + uniform(0.15)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([cos * scale_x, (shear - sin) * scale_y, uniform(0.18)], 1),
            torch.stack([sin * scale_x, cos * scale_y, uniform(0.18)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, (batch, 1, 28, 28), align_corners=False)
    return F.grid_sample(pictures[:, None], grid, align_corners=False)[:, 0]
