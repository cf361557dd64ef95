"""What people do with a finished run: eval, bench, the demo, and loading it somewhere else."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import SMALL, small
from safetensors.torch import load_file, save_file

from masquant_cli import demo, load_quantized, pipeline, recipe_yaml
from masquant_cli.errors import RecipeError
from masquant_cli.models.resolve import resolve
from masquant_cli.runtime import modality_ids

NO_VERIFY = "export.verify=false"
QUICK = (
    *(f"evaluation.tasks.{i}.samples=3" for i in range(5)),
    *(f"bench.{name}" for name in ("prompt_tokens=24", "new_tokens=2", "batch_size=1")),
    "evaluation.fidelity_samples=8",
    "bench.repeats=2",
)
MODALITIES = {"text", "vision", "audio"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("judged")
    pipeline.run(small(NO_VERIFY), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def judged(finished) -> dict:
    return pipeline.evaluate(small(*QUICK, NO_VERIFY), finished)


@pytest.fixture
def other_float(tmp_path) -> Path:
    """The float model with one projection of its first layer turned around."""
    folder = Path(shutil.copytree(resolve(small().model), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = next(k for k in tensors if k.endswith("layers.0.self_attn.o_proj.weight"))
    tensors[name] = -tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_eval_scores_the_runs_export(finished, judged):
    tasks = small().evaluation.tasks
    assert {n: t["metric"] for n, t in judged["tasks"].items()} == {t.name: t.metric for t in tasks}
    assert {t["n"] for t in judged["tasks"].values()} == {3}
    assert judged["model"] == str(finished / "export/model")
    for key in ("sqnr_db", "sqnr_end_db", "kl", "flip_rate"):
        assert set(judged[key]) == MODALITIES and None not in judged[key].values(), key
    assert all(10 < db < 60 for db in judged["sqnr_db"].values())
    by_linear = judged["sqnr_db_by_linear"]
    assert sum(name.endswith("layers.0.self_attn.q_proj") for name in by_linear) == 1
    mean = sum(found["audio"] for found in by_linear.values()) / len(by_linear)
    assert mean == pytest.approx(judged["sqnr_db"]["audio"])
    assert json.loads((finished / "eval/result.json").read_text()) == judged
    assert {t["overlap"] for t in judged["tasks"].values()} == {0}
    # Correct answers survive W4A8; wrong scales or a wrong prompt would lose them.
    accuracies = [t["value"] for t in judged["tasks"].values() if t["metric"] == "accuracy"]
    assert sum(accuracies) / len(accuracies) > 60


def test_eval_of_a_float_folder_has_nothing_to_compare(tmp_path):
    folder = resolve(small().model)
    found = pipeline.evaluate(small(*QUICK), tmp_path / "no-run", model=folder)
    assert "sqnr_db" not in found and len(found["tasks"]) == 5
    assert os.listdir(tmp_path / "no-run") == ["eval"]
    with pytest.raises(RecipeError, match="no finished export"):
        pipeline.evaluate(small(*QUICK), tmp_path)


def test_eval_compares_with_the_folder_it_is_given(finished, judged, other_float):
    found = pipeline.evaluate(small(*QUICK, NO_VERIFY), finished, against=other_float)
    assert found["tasks"] == judged["tasks"]  # of the quantized model alone
    for name in MODALITIES:
        assert found["sqnr_db"][name] < judged["sqnr_db"][name]
        assert found["kl"][name] > judged["kl"][name]


def test_bench_times_the_runs_export(finished, other_float, tmp_path):
    found = pipeline.bench(small(*QUICK, NO_VERIFY), finished)
    assert found["prompt_tokens"] >= 24
    for phase in ("prefill", "decode"):
        assert len(found[phase]["quantized"]["all_seconds"]) == 2
        assert found[phase]["speedup"] > 0
    assert found["argmax_agreement"] > 0.5
    sizes = json.loads((finished / "export/manifest.json").read_text())["summary"]["bytes"]
    took = found["weight_bytes"]
    assert (took["bf16"], took["quantized"]) == (sizes["float"], sizes["quantized"])
    against = pipeline.bench(small(*QUICK, NO_VERIFY), finished, against=other_float)
    assert against["argmax_agreement"] < found["argmax_agreement"]
    with pytest.raises(RecipeError, match="holds a float model"):
        pipeline.bench(small(*QUICK), tmp_path, model=other_float)


ELSEWHERE = """
import json, sys
import masquant_cli
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32)
content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
messages = [{"role": "user", "content": content}]
text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
picture = Image.new("RGB", (56, 56), (200, 30, 30))
inputs = processor(text=[text], images=[picture], return_tensors="pt")
print(json.dumps({name: tensor.tolist() for name, tensor in inputs.items()}))
print(model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist())
"""


def test_an_export_generates_elsewhere_after_a_plain_import(finished, tmp_path):
    folder = finished / "export/model"
    command = [sys.executable, "-c", ELSEWHERE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    asked, said = map(json.loads, done.stdout.splitlines())
    model = load_quantized(folder, dtype=torch.float32)
    inputs = {name: torch.tensor(values) for name, values in asked.items()}
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert said == expected.tolist() and len(said[0]) > inputs["input_ids"].shape[1]
    with torch.no_grad():  # the picture's tokens are not taken for text
        right = model(**inputs).logits
        with modality_ids(model, torch.zeros_like(inputs["input_ids"])):
            assert not torch.allclose(model(**inputs).logits, right, atol=1e-2)


def test_the_demo_compares_its_methods_on_one_calibration(monkeypatch, tmp_path):
    honest = recipe_yaml.load
    quick = (*SMALL, "evaluation.fidelity_samples=4")

    def load(name, overrides=()):
        return honest(name, [*quick, *overrides])

    monkeypatch.setattr(demo.recipe_yaml, "load", load)
    # Verification is pipeline's to test; here it would double the time.
    unverified = small(NO_VERIFY).export
    monkeypatch.setattr(
        demo, "_verified_if_ours", lambda r: r.model_copy(update={"export": unverified})
    )
    found = demo.demo(tmp_path, samples=2)
    methods = ("rtn", "smoothquant", "masquant", "masquant-joint")
    expected = [("float", ""), *((m, b) for b in ("W4A8", "W4A6") for m in methods)]
    assert [(row["method"], row["bits"]) for row in found["rows"]] == expected
    assert all(set(row["tasks"]) == set(found["metrics"]) for row in found["rows"])
    assert found["rows"][0]["sqnr_db"] is None
    by = {(row["method"], row["bits"]): row for row in found["rows"]}
    for bits in ("W4A8", "W4A6"):
        assert by["rtn", bits]["bytes"] == by["smoothquant", bits]["bytes"]
        assert by["rtn", bits]["bytes"] < by["masquant", bits]["bytes"]  # its low-rank part
    for method, m in itertools.product(methods, MODALITIES):
        assert by[method, "W4A8"]["sqnr_db"][m] > by[method, "W4A6"]["sqnr_db"][m]
    states = [run["stages"]["calibrate"]["state"] for run in found["runs"].values()]
    assert states == ["done"] + 7 * ["cached"]
    assert found["export_dir"] == str(tmp_path / "tiny-omni-w4a8-masquant-joint/export/model")
