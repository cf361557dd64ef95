"""Rows that a model was calibrated on are not for judging it."""

import hashlib
import json

import pytest
from jobs import small

from masquant_cli import pipeline
from masquant_cli.cli import app
from masquant_cli.data.samples import content_hashes, load_samples
from masquant_cli.errors import ArtifactError, CheckError
from masquant_cli.models.resolve import resolve
from masquant_cli.recipe import Source
from masquant_cli.rundir import RunDir, calibration_of
from masquant_cli.stages.leak import calibrated_on

MODALITIES = ("text", "vision", "audio")
CALIBRATION = ("vision", "audio", "sum", "text")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leak")
    pipeline.run(small(), folder, until="calibrate")
    return folder


def test_calibrate_leaves_the_hashes_of_its_samples(run_dir):
    kept = json.loads((run_dir / "calibrate/samples.json").read_text())["samples"]
    expected = [
        sorted(content_hashes(sample))
        for source in small().calibration.sources
        for sample in load_samples(source, seed=0, modalities=MODALITIES)
    ]
    assert kept == sorted(expected) and len(kept) == 40
    assert sorted(len(hashes) for hashes in kept) == [1] * 30 + [2] * 10  # sums show two media
    manifest = json.loads((run_dir / "calibrate/manifest.json").read_text())
    assert "samples.json" in manifest["outputs"]
    assert calibrated_on(run_dir / "calibrate") == {h for hashes in kept for h in hashes}


def test_no_finished_calibration_no_hashes(tmp_path, run_dir):
    assert calibrated_on(tmp_path) is None
    for name in ("manifest.json", "samples.json"):
        (tmp_path / name).write_bytes((run_dir / "calibrate" / name).read_bytes())
    assert calibrated_on(tmp_path) is not None
    (tmp_path / "samples.json").write_text('{"samples": []}')
    with pytest.raises(ArtifactError, match="gone or were changed"):
        calibrated_on(tmp_path)


def test_a_reused_calibration_is_asked(run_dir, tmp_path, capsys):
    pipeline.run(small(), tmp_path / "other", until="calibrate", reuse=[run_dir])
    other = RunDir(tmp_path / "other")
    assert not other.stage("calibrate").exists()
    assert calibration_of(other) == (run_dir / "calibrate").resolve()
    assert app.main(command(other.path, tmp_path)) == 1
    assert "10 of 12" in capsys.readouterr().err
    pipeline.run(small("seed=5"), other.path, until="calibrate", reuse=[run_dir])
    assert calibration_of(other) == other.stage("calibrate")


def samples(path, rows: list[dict], *messages) -> list:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(dataset=str(path), messages=messages, shuffle=False)
    return list(load_samples(source, seed=0, modalities=MODALITIES))


def test_texts_are_told_apart_by_what_the_user_says(tmp_path):
    system = {"role": "system", "content": [{"text": "{s}"}]}
    user = {"role": "user", "content": [{"text": "{q}"}]}
    answer = {"role": "assistant", "content": [{"text": "{a}"}]}
    rows = [
        {"s": "x", "q": "Who is it?", "a": "me"},
        {"s": "y", "q": " who  is it", "a": "you"},
        {"s": "x", "q": "Who was it?", "a": "me"},
    ]
    first, second, third = samples(tmp_path / "a.jsonl", rows, system, user, answer)
    assert content_hashes(first) == content_hashes(second) != content_hashes(third)
    by_hand = hashlib.sha256(b"text\0who is it").hexdigest()
    assert content_hashes(first) == (by_hand,)


def test_media_are_told_apart_by_their_content(tmp_path):
    import numpy as np
    import soundfile
    from PIL import Image

    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.bmp")  # the same pixels in another file
    Image.fromarray(pixels.reshape(3, 2, 3)).save(tmp_path / "c.png")  # the same bytes
    soundfile.write(tmp_path / "s.wav", np.linspace(-0.5, 0.5, 800), 16000)
    content = [{"image": "i"}, {"audio": "s"}, {"text": "{q}"}]
    rows = [{"i": name, "s": "s.wav", "q": name} for name in ("a.png", "b.bmp", "c.png")]
    a, b, c = samples(tmp_path / "m.jsonl", rows, {"role": "user", "content": content})
    assert content_hashes(a) == content_hashes(b)  # the words do not count
    assert content_hashes(a)[0] != content_hashes(c)[0]
    assert content_hashes(a)[1] == content_hashes(c)[1]
    by_hand = hashlib.sha256(b"(3, 2)\0" + pixels.tobytes()).hexdigest()
    assert content_hashes(a)[0] == by_hand


def command(run_dir, tmp_path, *more: str) -> list[str]:
    """eval on rows of which the first ten of `calibration-vision` were calibrated on."""
    model = str(resolve(small().model))
    first = tmp_path / "leaky.yaml"
    first.write_text(
        """
extends: tiny-omni-w4a8
name: leaky
evaluation:
  fidelity_samples: 0
  tasks:
    - name: text
      metric: accuracy
      answer: "{answer}"
      samples: 4
      max_new_tokens: 2
      source:
        dataset: builtin:tiny-omni/eval-text
        messages: [{role: user, content: [{text: "{question}"}]}]
    - name: seen
      metric: perplexity
      samples: 12
      source:
        dataset: builtin:tiny-omni/calibration-vision
        messages: [{role: user, content: [{image: image}, {text: "Describe it please."}]}]
"""
    )
    return [
        *("eval", "-c", str(first), "--run-dir", str(run_dir), "--model", model, "--json"),
        *more,
    ]


def test_eval_refuses_rows_that_were_calibrated_on(run_dir, tmp_path, capsys):
    assert app.main(command(run_dir, tmp_path)) == 1
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert error["message"] == "10 of 12 rows of task 'seen' were calibrated on"
    assert "task seen" in error["where"] and "--allow-overlap" in error["hint"]
    assert "10 of 12" in err


def test_eval_shouts_when_overlap_is_allowed(run_dir, tmp_path, capsys):
    assert app.main(command(run_dir, tmp_path, "--allow-overlap", "--quiet")) == 0
    out, err = capsys.readouterr()
    tasks = json.loads(out)["tasks"]
    assert {name: task["overlap"] for name, task in tasks.items()} == {"text": 0, "seen": 10}
    assert "10 of 12 rows of task 'seen' were calibrated on" in err


def test_without_a_calibration_there_is_nothing_to_compare_with(tmp_path, capsys):
    argv = command(tmp_path / "elsewhere", tmp_path, "--task", "text")
    assert app.main(argv) == 0
    assert "overlap" not in json.loads(capsys.readouterr().out)["tasks"]["text"]


def test_shipped_evaluations_are_clear_of_the_calibration(run_dir):
    """Every row of them, for none may be among the first few by luck."""
    seen = {
        h
        for source in small(
            *(f"calibration.sources.{i}.limit=null" for i in range(4))
        ).calibration.sources
        for sample in load_samples(source, seed=0, modalities=MODALITIES)
        for h in content_hashes(sample)
    }
    for task in small().evaluation.tasks:
        for sample in load_samples(task.source, seed=0, modalities=MODALITIES):
            assert not seen & set(content_hashes(sample)), task.name


def test_paragraphs_of_running_text_are_compared_row_by_row(tmp_path):
    import tiny_chat
    from benchmark_rows import write

    from masquant_cli.data.samples import text_hash
    from masquant_cli.progress import NullProgress
    from masquant_cli.recipe import Task
    from masquant_cli.stages.leak import overlap
    from masquant_cli.stages.prepare import prepare

    long = "there are quite a few words in this row"
    rows = [{"text": t} for t in ("", " = Reception = ", long, long.upper(), long + " too")]
    path = write(tmp_path / "w.parquet", "wikitext2", rows)
    task = Task(benchmark="wikitext2", dataset=str(path), window=16)
    words = {"modalities": MODALITIES, "seed": 0, "batch_size": 2}
    ready = prepare(task, tiny_chat.processor(), **words)
    calm = {"allow": False, "progress": NullProgress()}
    assert overlap(ready, {text_hash("= Reception ="), text_hash("")}, **calm) == 0
    with pytest.raises(CheckError, match="2 of 3 rows of task 'wikitext2'"):
        overlap(ready, {text_hash(long)}, **calm)
