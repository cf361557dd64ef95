"""`make gpu-check` without a GPU: its plan, its one error, and all of it on a CPU, tiny."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from masquant_cli.bench import gpu_check
from masquant_cli.errors import CheckError

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "gpu_check.py"
# What a bare GPU machine may lack.
MISSING = ("typer", "pydantic", "datasets", "soundfile", "wrapt", "rich", "jiwer")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_clear_error(capsys):
    assert gpu_check.main([]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: no CUDA GPU that torch can use")
    assert not list((ROOT / "benchmarks" / "results").glob("*.part*"))


def test_the_plan_fits_into_ten_minutes(capsys):
    assert gpu_check.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    for name in ("correctness triton", "correctness hopper", "kernels", "layers", "model"):
        assert f"{name}: at most" in out
    budgets = gpu_check.sections(torch.device("cuda"))
    assert list(budgets)[:2] == ["correctness triton", "correctness hopper"]
    assert sum(budgets.values()) + gpu_check.GRACE < gpu_check.LIMIT < 600


def test_cpu_results_do_not_land_among_those_of_gpus(capsys):
    assert gpu_check.main(["--device", "cpu", "--small"]) == 2
    assert "--output" in capsys.readouterr().err


def test_every_section_runs_from_a_bare_checkout(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nfor name in {MISSING!r}: sys.modules[name] = None\n"
    )
    file = tmp_path / "result.json"
    command = [sys.executable, str(TOOL), "--device", "cpu", "--small", "--output", str(file)]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    assert document["machine"]["device"] == "cpu" and document["machine"]["command"]
    assert document["backends"][-1] == "reference"
    found = document["sections"]
    assert list(found) == ["correctness onednn", "correctness cpu", "kernels", "layers", "model"]
    for name in ("kernels", "layers", "model"):
        assert found[name]["status"] == "ok" and found[name]["rows"] and found[name]["verdict"]
    for name in ("correctness onednn", "correctness cpu"):
        assert found[name]["status"] in ("ok", "nothing")  # nothing where it cannot be built
        assert all(row["check"]["ok"] for row in found[name]["rows"])
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


# --- the parent, with sections that misbehave


@pytest.fixture
def given(monkeypatch, tmp_path):
    """Options of a CPU trial whose sections are run by `section(name, out)` in a child."""
    monkeypatch.setattr(gpu_check, "GRACE", 1.0)
    monkeypatch.setattr(gpu_check, "TIMED", {"kernels": 3.0, "layers": 3.0})
    monkeypatch.setattr(gpu_check, "CORRECTNESS", {"cpu": 3.0, "onednn": 3.0})
    return SimpleNamespace(device="cpu", small=True, output=tmp_path / "r.json")


def behave(monkeypatch, tmp_path, **bodies: str):
    """Replace the tool by one whose sections run a line of Python; `_` stands for a space."""
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "tools").mkdir(exist_ok=True)
    lines = [
        "import json, os, sys, time",
        "name = sys.argv[sys.argv.index('--section') + 1].replace(' ', '_')",
        "out = open(sys.argv[sys.argv.index('--output') + 1], 'w')",
        "def row(ok=True, **rest):",
        "    check = {'ok': ok, 'what': 'off'}",
        "    part = {'rows': [{'name': name, 'check': check, **rest}]}",
        "    out.write(json.dumps(part) + chr(10)); out.flush()",
        f"exec({bodies!r}.get(name, 'row()'))",
    ]
    (tmp_path / "tools" / "gpu_check.py").write_text("\n".join(lines))


def result(given) -> dict:
    return json.loads(given.output.read_text())["sections"]


def test_one_that_hangs_or_crashes_loses_nothing_of_the_others(given, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "TIMED", {"kernels": 0.5, "layers": 3.0})
    behave(
        monkeypatch, tmp_path,
        kernels="row(); out.write('{cut'); out.flush(); time.sleep(60)",
        layers="row(); raise RuntimeError('boom')",
    )  # fmt: skip
    began = time.monotonic()
    with pytest.raises(CheckError, match="kernels, layers"):
        gpu_check._check(given)
    assert time.monotonic() - began < 30
    found = result(given)
    assert [s["status"] for s in found.values()] == ["ok", "ok", "hung", "crashed"]
    assert all(len(s["rows"]) == 1 for s in found.values())
    assert "boom" in found["layers"]["log"]


def test_a_backend_found_wrong_is_not_used_afterwards(given, monkeypatch, tmp_path):
    body = "row(asked=os.environ.get('MASQUANT_BACKEND'))"
    behave(
        monkeypatch, tmp_path,
        correctness_cpu="row(ok=False)", correctness_onednn=body, kernels=body, layers=body,
    )  # fmt: skip
    with pytest.raises(CheckError, match="correctness cpu"):
        gpu_check._check(given)
    found = result(given)
    assert found["correctness cpu"]["status"] == "failed"
    assert found["correctness cpu"]["failed"] == ["correctness_cpu: off"]
    assert found["correctness onednn"]["rows"][0]["asked"] == "onednn"
    assert found["kernels"]["rows"][0]["asked"] == "onednn"  # not cpu


def test_all_in_order_asks_for_no_backend_and_succeeds(given, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("MASQUANT_BACKEND", raising=False)
    behave(monkeypatch, tmp_path, kernels="row(asked=os.environ.get('MASQUANT_BACKEND'))")
    assert gpu_check._check(given) == 0
    assert result(given)["kernels"]["rows"][0]["asked"] is None
    assert capsys.readouterr().out.strip() == str(given.output)


def test_when_time_is_up_the_rest_is_left_out(given, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "LIMIT", 2.0)
    behave(monkeypatch, tmp_path, correctness_onednn="row(); time.sleep(1.2)")
    assert gpu_check._check(given) == 0
    assert result(given)["layers"]["status"] == "no time left"


def test_a_timed_section_stops_before_a_table_that_may_not_end(monkeypatch):
    def tables(*_):
        for name in "abcdef":
            time.sleep(0.2)
            yield [{"name": name, "check": {"ok": True}, "shape": "8x8", "tokens": 1}]

    monkeypatch.setattr(gpu_check, "_tables", tables)
    parts = []
    gpu_check._timed("layers", torch.device("cpu"), time.time() + 0.7, parts.append, True)
    assert 2 <= sum(len(p.get("rows", [])) for p in parts) <= 3
    assert {"stopped": True} in parts and "verdict" in parts[-1]


def test_correctness_keeps_what_a_backend_does_not_cover_apart(monkeypatch):
    """Under a forced backend the reference serves the rest; that says nothing about it."""
    from masquant_kernels import dispatch, reference

    only = {"onednn": {"gemm_w8a8": reference.OPS["gemm_w8a8"]}, "reference": reference.OPS}
    monkeypatch.setattr(dispatch, "_load", lambda name: only.get(name, {}))
    monkeypatch.setattr(gpu_check, "check_op", lambda op, given, exact: (
        ("onednn" if op == "gemm_w8a8" else "reference"), gpu_check.measure.Check(True, 0.0, 0.0)
    ))  # fmt: skip
    parts = []
    gpu_check._correctness(torch.device("cpu"), "onednn", time.time() + 60, parts.append, True)
    rows = [row for part in parts for row in part.get("rows", [])]
    assert rows and all(row["name"].startswith("gemm_w8a8") for row in rows)
    assert parts[-1]["not_covered"] > len(rows)


def test_files_are_named_after_the_gpu_and_the_day():
    name = gpu_check.file_name("NVIDIA H200 (SXM)")
    assert name.startswith("nvidia-h200-sxm-20") and name.endswith(".json")
