"""Measure a saved folder the way a user runs it: processor, chat template, greedy generate.

python tools/tiny_omni/evaluate.py [FOLDER] [--limit N] [--json FILE]
"""

import argparse
import io
import json
import time
from pathlib import Path

import jiwer
import pyarrow.parquet as pq
import soundfile
import soxr
import torch
from PIL import Image
from spec import ASSETS, RATE, TASKS
from transformers import AutoModelForImageTextToText, AutoProcessor

from masquant_cli.models.omni_processor import register


def messages(row: dict) -> list:
    content = []
    if row.get("image"):
        picture = Image.open(io.BytesIO(row["image"]["bytes"]))
        content.append({"type": "image", "image": picture})
    if row.get("audio"):
        wave, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        content.append({"type": "audio", "audio": soxr.resample(wave, rate, RATE)})
    content.append({"type": "text", "text": row["question"]})
    return [{"role": "user", "content": content}]


@torch.no_grad()
def answers(model, processor, rows: list, batch: int = 50) -> list:
    replies = []
    for first in range(0, len(rows), batch):
        inputs = processor.apply_chat_template(
            [messages(row) for row in rows[first : first + batch]],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=dict(padding=True),
        )
        out = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        new = out[:, inputs["input_ids"].shape[1] :]
        replies += [
            reply.strip() for reply in processor.batch_decode(new, skip_special_tokens=True)
        ]
    return replies


def score(rows: list, replies: list) -> dict:
    """Exact-match accuracy, and the word error rate where answers have several words."""
    expected = [row["answer"] for row in rows]
    exact = sum(e == r for e, r in zip(expected, replies, strict=True)) / len(rows)
    result = {"samples": len(rows), "accuracy": round(100 * exact, 2)}
    if any(" " in answer for answer in expected):
        heard = [reply or "<nothing>" for reply in replies]
        result["wer"] = round(100 * jiwer.wer(expected, heard), 2)
    return result


def load(folder: Path):
    register()
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return processor, model


def evaluate(folder: Path, limit: int | None = None) -> dict:
    processor, model = load(folder)
    result = {}
    for task in TASKS:
        rows = pq.read_table(ASSETS / "data" / f"eval-{task}.parquet").to_pylist()[:limit]
        began = time.time()
        result[task] = score(rows, answers(model, processor, rows))
        print(f"{task}: {result[task]} {time.time() - began:.0f}s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ASSETS / "model")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = evaluate(args.folder, args.limit)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
