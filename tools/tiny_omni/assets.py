"""Write the packaged calibration and evaluation sets as small parquet files.

Calibration rows come from the training split, evaluation rows from the test split. Sound is FLAC
at the recordings' own 8 kHz; number words are the answers.
"""

import io
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from data import compose, load_speech
from spec import ASSETS, DATA, QUESTIONS, TEXT_HELD_OUT, TEXT_TRAIN, WORDS, digits_answer

STORED_RATE = 8000


def read_pictures(split: str):
    rows = pq.read_table(DATA / f"images-{split}.parquet").to_pylist()
    return [(row["image"]["bytes"], row["image"]["path"], row["digit"]) for row in rows]


def flac(wave) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(
        buffer, wave, STORED_RATE, format="FLAC", subtype="PCM_16", compression_level=1.0
    )
    return buffer.getvalue()


def question(task: str, rng) -> str:
    return QUESTIONS[task][int(rng.integers(len(QUESTIONS[task])))]


def padded(wave, rng):
    """A recording between two stretches of silence, at most 0.3 s each."""
    before, after = (int(STORED_RATE * s) for s in (rng.uniform(0, 0.3), rng.uniform(0.05, 0.3)))
    return np.concatenate([np.zeros(before, np.float32), wave, np.zeros(after, np.float32)])


def picture_rows(split: str, wanted, rng):
    pictures = read_pictures(split)
    for data, path, digit in (pictures[i] for i in wanted):
        yield dict(
            image=dict(bytes=data, path=path),
            question=question("picture", rng),
            answer=WORDS[digit],
            digit=digit,
        )


def single_rows(speech, wanted, rng):
    for take, row in enumerate(wanted):
        digit, speaker = speech.digits[row], speech.speakers[row]
        name = f"{digit}_{speaker}_{take:04d}.flac"
        yield dict(
            audio=dict(bytes=flac(padded(speech.waves[row], rng)), path=name),
            question=question("speech", rng),
            answer=WORDS[digit],
            speaker=speaker,
        )


def sequence_rows(speech, counts, rng):
    for take, count in enumerate(counts):
        digits = []
        while len(digits) != count:  # four seconds do not hold every draw
            wave, digits, _ = compose(speech, None, int(count), rng, False, STORED_RATE, 0.0)
        name = f"{'_'.join(map(str, digits))}_{take:04d}.flac"
        yield dict(
            audio=dict(bytes=flac(wave), path=name),
            question=question("transcription", rng),
            answer=digits_answer(digits),
        )


def sum_rows(split: str, speech, pictures_wanted, clips_wanted, rng):
    pictures = read_pictures(split)
    pairs = zip(pictures_wanted, clips_wanted, strict=True)
    for take, (picture, row) in enumerate(pairs):
        data, path, seen = pictures[picture]
        heard = speech.digits[row]
        wave = padded(speech.waves[row], rng)
        yield dict(
            image=dict(bytes=data, path=path),
            audio=dict(bytes=flac(wave), path=f"{heard}_{take:04d}.flac"),
            question=question("sum", rng),
            answer=WORDS[seen + heard],
        )


def text_rows(templates, pairs):
    for template, (a, b) in zip(templates, pairs, strict=True):
        asked = template.format(a=WORDS[a], b=WORDS[b])
        yield dict(question=asked[0].upper() + asked[1:], answer=WORDS[a + b])


def write(name: str, rows) -> None:
    rows = list(rows)
    path = ASSETS / "data" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
    print(f"{name}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB", flush=True)


def write_calibration() -> None:
    rng = np.random.default_rng(21)
    speech = load_speech("train", STORED_RATE)
    singles = rng.permutation(len(speech.waves))
    pictures = rng.permutation(10_000)
    write("calibration-vision", picture_rows("train", pictures[:256], rng))
    counts = rng.choice([2, 3, 4], 96, p=[0.4, 0.3, 0.3])
    audio = [*single_rows(speech, singles[:160], rng), *sequence_rows(speech, counts, rng)]
    keys = ("audio", "question", "answer")
    write("calibration-audio", [{k: row[k] for k in keys} for row in audio])
    write(
        "calibration-sum",
        sum_rows("train", speech, pictures[256:384], singles[160:288], rng),
    )
    templates = [TEXT_TRAIN[i % len(TEXT_TRAIN)] for i in range(256)]
    write("calibration-text", text_rows(templates, rng.integers(0, 10, (256, 2)).tolist()))


def write_evaluation() -> None:
    rng = np.random.default_rng(22)
    speech = load_speech("test", STORED_RATE)
    pictures = rng.permutation(2000)
    everything = list(range(len(speech.waves)))
    write("eval-picture", picture_rows("test", pictures[:1000], rng))
    write("eval-speech", single_rows(speech, everything * 2, rng))
    counts = rng.permutation([2] * 250 + [3] * 150 + [4] * 100)
    write("eval-transcription", sequence_rows(speech, counts, rng))
    clips = [*rng.permutation(300), *rng.permutation(300)[:200]]
    write("eval-sum", sum_rows("test", speech, pictures[1000:1500], clips, rng))
    grid = list(itertools.product(TEXT_HELD_OUT, itertools.product(range(10), repeat=2)))
    write("eval-text", text_rows(*zip(*grid, strict=True)))


if __name__ == "__main__":
    write_calibration()
    write_evaluation()
