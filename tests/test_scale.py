"""What the scale benchmark computes from its measurements, and memory of a tree of processes."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from scale import document, lowrank, measure, models, peers, run, vision


def one(seconds: float, peak: int, calibrate: float | None = None) -> dict:
    stages = {} if calibrate is None else {"stages": {"calibrate": calibrate}}
    return {"seconds": seconds, "peak_bytes": peak, "import_seconds": 1.0, **stages}


def test_ratios_are_of_medians_and_misses_are_named():
    found = peers.summary(
        {
            "forward": [one(20.0, 9), one(10.0, 9), one(11.0, 9)],
            "masquant": [one(30.0, 6, 12.0), one(18.0, 8, 13.0), one(20.0, 7, 99.0)],
            "llm-compressor": [one(21.0, 10), one(25.0, 10), one(22.0, 11)],
            "masquant gptq": [one(40.0, 8, 16.5)],
            "llm-compressor gptq": [one(79.0, 16)],
        }
    )
    is_now = {name: ratio["is"] for name, ratio in found["ratios"].items()}
    assert is_now == {
        "calibrate / forward": 1.182,  # 13 / 11
        "calibrate with Grams / forward": 1.5,
        "run / llm-compressor": 0.909,  # 20 / 22
        "run with GPTQ / llm-compressor with GPTQ": 0.506,  # 40 / 79
        "peak / llm-compressor": 0.7,
        "peak with GPTQ / llm-compressor with GPTQ": 0.5,
    }
    missed = [line for line in run.verdicts(found) if line.startswith("MISS")]
    assert missed == ["MISS run with GPTQ / llm-compressor with GPTQ: 0.506 (at most 0.5)"]


def test_the_low_rank_part_compares_with_the_optimum():
    sites = (
        *((48, 80, None, 4.0, 1), (80, 48, None, 4.0, 1), (40, 96, 30, None, 1)),
        (40, 96, None, 1.0, 2),
    )
    found = lowrank.lowrank(lambda _: None, sites=sites)["sites"]
    assert [one["rank"] for one in found.values()] == [2, 2, 2, 2]
    for one in found.values():
        assert 0.99999 < one["error_over_optimum"] < 1.001
    for name in ("48x80", "80x48"):  # the equations themselves reach it
        assert found[name]["literal_error_over_optimum"] == pytest.approx(1, rel=1e-5)
    assert "speedup" not in found["40x96, 30 rows"]
    # That of a part is extrapolated, and has no error of the whole.
    whole = found["40x96"]
    assert whole["literal_part"] == 2 and "literal_error_over_optimum" not in whole
    assert whole["speedup"] > 0


def test_a_worse_correction_is_seen():
    torch.manual_seed(0)
    delta, given = lowrank.site(40, 64, None)
    l1, l2 = lowrank.literal(delta, given["gram"], 3)
    optimum = float(lowrank.spectrum(delta, given)[3:].sum())
    assert lowrank.left(delta, given, l1, l2) == pytest.approx(optimum, rel=1e-5)
    assert lowrank.left(delta, given, 0.9 * l1, l2) > 1.005 * optimum


def test_memory_of_a_tree_counts_children(tmp_path):
    child = "b = bytearray(200_000_000); import time; time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = measure.watched([sys.executable, "-c", parent])
    assert 200e6 < found["rss_peak_bytes"] < found["tree_peak_bytes"] < 300e6
    assert found["wall_seconds"] >= 1


def test_an_interruption_is_sent_once_and_a_failure_is_told():
    began = time.perf_counter()
    found = measure.watched(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        interrupt=lambda: time.perf_counter() - began > 0.5,
    )
    assert found["interrupted"] and found["code"] != 0 and found["wall_seconds"] < 20
    with pytest.raises(measure.Failed, match="ended with 3:\nwhy"):
        code = "import sys; print('why', file=sys.stderr); sys.exit(3)"
        measure.watched([sys.executable, "-c", code])


def test_texts_become_as_many_tokens_as_asked():
    words = models.tokenizer()
    for text in models.texts(3, 40):
        chat = [{"role": "user", "content": text}]
        assert len(words(words.apply_chat_template(chat, tokenize=False))["input_ids"]) == 40


def test_a_made_checkpoint_is_the_familys_and_loads(tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    from masquant_cli.models.loading import load_processor

    asked = {"images": 2, "texts": 1, "side": 56, "words": 5}
    folder = vision.qwen2_5_vl(tmp_path / "mini", "mini", **asked)
    assert len(list(folder.glob("*.safetensors"))) == 3
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    made = load_processor(folder).tokenizer
    for attribute, name in (
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
    ):
        assert made.convert_tokens_to_ids(name) == getattr(model.config, attribute)
    before = (folder / "config.json").stat().st_mtime_ns
    vision.qwen2_5_vl(folder, "mini", **asked)  # made once
    assert (folder / "config.json").stat().st_mtime_ns == before
    rows = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    assert [len(row["text"]) for row in rows] == [5, 5]


def test_the_three_billion_are_qwens(tmp_path):
    config = vision.config_of(vision.SIZES["3b"])
    weights = sum(torch.Size(shape).numel() for _, shape in vision.shapes(config))
    assert weights == 3_754_622_976  # Qwen2.5-VL-3B-Instruct's own count, its head being tied
    assert config.image_token_id == 151655


def test_the_document_is_made_of_what_was_measured(tmp_path):
    page = tmp_path / "scale.md"
    page.write_text(f"above\n{document.BEGIN}\nold\n{document.END}\nbelow\n")
    document.write(tmp_path / "none", page)
    assert "old" not in page.read_text() and "Nothing has been measured" in page.read_text()
    facts = {
        "machine": {"cpu": "A CPU", "cpus": 2, "memory_gb": 23.4},
        "versions": {"masquant": {"torch": "2.13.0"}},
        "date": "2026-01-02T03:04:05",
        "command": "python run.py ranks",
    }
    stages = {"calibrate": 5.0, "smooth": 3.0}
    measured = {
        "about": facts,
        "seconds": {"1": 8.0, "2": 4.7},
        "stage_seconds": {"1": stages, "2": stages},
        "speedup": 1.702,
        "at_least": 1.6,
        "largest_relative_difference": 2e-8,
    }
    (tmp_path / "ranks.json").write_text(json.dumps(measured))
    document.write(tmp_path, page)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n")
    assert "**1.70x** (asked: 1.6x)" in text and "| 2 | 4.7 | 5.0 | 3.0 |" in text
