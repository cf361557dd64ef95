"""Small local data sets with the columns and types that the benchmarks have on the hub."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from datasets import Audio, Features, Image, Sequence, Value
from PIL import Image as Pictures

TEXT, INT, TEXTS = Value("string"), Value("int64"), Sequence(Value("string"))
SPEECH = Audio(sampling_rate=16000)


def picture(seed: int) -> dict:
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Pictures.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def sound(seed: int) -> dict:
    wave = np.random.default_rng(seed).standard_normal(3200).astype(np.float32) * 0.1
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 16000, format="FLAC")
    return {"bytes": buffer.getvalue(), "path": f"{seed}.flac"}


FEATURES = {
    "librispeech-test-other": {
        "file": TEXT, "audio": SPEECH, "text": TEXT, "speaker_id": INT, "chapter_id": INT,
        "id": TEXT,
    },
    "wenetspeech-test-net": {"audio": SPEECH, "text": TEXT},
    "ocrbench": {
        "dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": TEXTS, "image": Image(),
    },
    "textvqa": {
        "image_id": TEXT, "question_id": Value("int32"), "question": TEXT, "question_tokens": TEXTS,
        "image": Image(), "image_width": Value("int32"), "image_height": Value("int32"),
        "flickr_original_url": TEXT, "flickr_300k_url": TEXT, "answers": TEXTS,
        "image_classes": TEXTS, "set_name": TEXT, "ocr_tokens": TEXTS,
    },
    "vizwiz": {
        "question_id": TEXT, "image": Image(), "question": TEXT, "answers": TEXTS, "category": TEXT,
    },
    "scienceqa": {
        "image": Image(), "question": TEXT, "choices": TEXTS, "answer": Value("int8"), "hint": TEXT,
        "task": TEXT, "grade": TEXT, "subject": TEXT, "topic": TEXT, "category": TEXT,
        "skill": TEXT, "lecture": TEXT, "solution": TEXT,
    },
    "mmmu": {
        "id": TEXT, "question": TEXT, "options": TEXT, "explanation": TEXT,
        **{f"image_{i}": Image() for i in range(1, 8)},
        "img_type": TEXT, "answer": TEXT, "topic_difficulty": TEXT, "question_type": TEXT,
        "subfield": TEXT,
    },
    "omnibench": {
        "index": INT, "task type": TEXT, "audio type": TEXT, "question": TEXT, "answer": TEXT,
        "audio": SPEECH, "image": Image(), "options": TEXTS, "audio content": TEXT,
        "image content": TEXT,
    },
    "wikitext2": {"text": TEXT},
}  # fmt: skip


def write(path: Path, benchmark: str, rows: list[dict]) -> Path:
    """A parquet file of the benchmark's columns; what a row leaves out is empty."""
    features = Features(FEATURES[benchmark])
    columns = {name: [row.get(name) for row in rows] for name in features}
    path.parent.mkdir(parents=True, exist_ok=True)
    # The schema carries the features; encoding them with `datasets` would need torchcodec.
    pq.write_table(pa.Table.from_pydict(columns, schema=features.arrow_schema), path)
    return path
