"""The command line's contract: stdout is data, stderr is talk, exit codes mean something.

The work behind the commands is faked here; that it is called rightly is what is tested.
"""

import errno
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import masquant_cli
from masquant_cli import errors
from masquant_cli.cli import app, console, render

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'kernels'}", "COLUMNS": "100"}


@pytest.fixture
def pipeline(monkeypatch, tmp_path):
    """A stand-in for masquant_cli.pipeline that records how it was called."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def run(recipe, run_dir, *, until, reuse, progress):
        calls.append(("run", recipe, run_dir, until, list(reuse)))
        print("a library prints something")
        progress.stage(until, 2, "layers")
        progress.advance(2, tokens=10)
        progress.warn("few tokens")
        stages = {until: {"state": "done", "seconds": 1.5, "peak_bytes": 2_000_000}}
        return {
            "recipe": recipe.name, "run_dir": run_dir, "export_dir": run_dir / "export",
            "stages": stages,
        }  # fmt: skip

    def plan(recipe, run_dir, reuse, *, download):
        assert not download  # a dry run changes nothing, the hub's cache included
        return [
            SimpleNamespace(stage="calibrate", state="cached", why=""),
            SimpleNamespace(stage="smooth", state="stale", why="smoothing.beta was 0.5"),
            SimpleNamespace(stage="compensate", state="todo", why=""),
            SimpleNamespace(stage="export", state="todo", why=""),
        ]

    def evaluate(recipe, run_dir, *, model, against, fresh, allow_overlap, progress):
        calls.append(("eval", recipe, run_dir, model, against))
        return {
            "tasks": {
                t.name: {"metric": t.metric, "value": 97.0, "n": 9, "ci": [90.0, 100.0]}
                for t in recipe.evaluation.tasks
            },
            "sqnr_db": {"text": float("inf"), "vision": 20.5},
            "kl": {"text": 0.0, "vision": float("nan")},
            "flip_rate": {"text": 0.0, "vision": 0.01},
        }

    def bench(recipe, run_dir, *, model, against, progress):
        speeds = {"float": {"tokens_per_second": 5e3}, "quantized": {"tokens_per_second": 1e4}}
        return {
            "prefill": {**speeds, "speedup": 2.0}, "threads": 2, "verdict": ["prefill: faster"],
            "weight_bytes": {
                "float": 4_000_000, "quantized": 1_000_000, "ratio": 0.25,
                "float_dtype": "float32", "bf16": 2_000_000, "ratio_bf16": 0.5,
            },
        }  # fmt: skip

    fake = SimpleNamespace(run=run, plan=plan, evaluate=evaluate, bench=bench, calls=calls)
    monkeypatch.setitem(sys.modules, "masquant_cli.pipeline", fake)
    monkeypatch.setattr(masquant_cli, "pipeline", fake, raising=False)
    prediction = SimpleNamespace(predict=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "masquant_cli.plan", prediction)
    monkeypatch.setattr(masquant_cli, "plan", prediction, raising=False)
    return fake


def call(capsys, *argv) -> tuple[int, str, str]:
    code = app.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def masquant(*argv, **more):
    return subprocess.run(
        [sys.executable, "-m", "masquant_cli", *argv], capture_output=True, text=True,
        env=ENV, timeout=120, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "content"), [("--version", masquant_cli.__version__), ("--help", "calibrate")]
)
def test_help_and_version_answer_in_under_half_a_second(argv, content):
    def processor_seconds():  # not elapsed time: that measures what else the machine does
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = processor_seconds()
    done = masquant(argv)
    assert done.returncode == 0 and content in done.stdout and not done.stderr
    assert processor_seconds() - before < 0.5


@pytest.mark.parametrize("until", ["run", "calibrate", "smooth", "compensate", "export"])
def test_stage_commands_run_up_to_themselves(pipeline, capsys, until):
    code, out, err = call(
        capsys, until, "-c", "tiny-omni-w4a8", "--set", "seed=3", "--set", "weights.bits=8",
        "--reuse", "runs/a", "--reuse", "runs/b", "--json",
    )  # fmt: skip
    assert code == 0
    [(_, recipe, run_dir, stage, reuse)] = pipeline.calls
    assert stage == ("export" if until == "run" else until)
    assert (recipe.seed, recipe.weights.bits) == (3, 8)
    assert run_dir == Path("runs/tiny-omni-w4a8")
    assert reuse == [Path("runs/a"), Path("runs/b")]
    document = json.loads(out)
    assert document["export_dir"] == "runs/tiny-omni-w4a8/export"
    assert document["stages"][stage] == {"state": "done", "seconds": 1.5, "peak_bytes": 2_000_000}
    assert "a library prints something" in err and "warning: few tokens" in err


def test_tables_for_people(pipeline, capsys):
    code, out, err = call(capsys, "run", "-c", "tiny-omni-w4a8", "--run-dir", "elsewhere")
    assert code == 0
    assert "1.5 s" in out and "2 MB" in out and "checkpoint: elsewhere/export" in out
    assert "tokens/s" in err and "tokens/s" not in out


def test_quiet_leaves_only_warnings(pipeline, capsys):
    _, _, err = call(capsys, "run", "-c", "tiny-omni-w4a8", "--quiet")
    assert err == "a library prints something\nwarning: few tokens\n"


def test_dry_run_says_what_is_cached_stale_or_to_do(pipeline, capsys):
    code, out, err = call(capsys, "smooth", "-c", "tiny-omni-w4a8", "--dry-run", "--json")
    assert code == 0 and not pipeline.calls
    assert "note: there is no prediction, as nothing of builtin:tiny-omni is here" in err
    assert json.loads(out)["plan"] == [
        {"stage": "calibrate", "state": "cached", "why": ""},
        {"stage": "smooth", "state": "stale", "why": "smoothing.beta was 0.5"},
    ]
    _, out, _ = call(capsys, "eval", "-c", "tiny-omni-w4a8", "--dry-run", "--task", "sum")
    assert "smoothing.beta was 0.5" in out and "tasks: sum" in out


def test_eval_narrows_tasks_and_samples(pipeline, capsys, tmp_path):
    code, out, _ = call(
        capsys, "eval", "-c", "tiny-omni-w4a8", "--model", str(tmp_path), "--against", "m",
        "--task", "sum", "--task", "transcription", "--samples", "7", "--json",
    )  # fmt: skip
    assert code == 0
    [(_, recipe, _, model, against)] = pipeline.calls
    assert (model, against) == (tmp_path, Path("m"))
    assert [t.name for t in recipe.evaluation.tasks] == ["transcription", "sum"]
    assert {t.samples for t in recipe.evaluation.tasks} == {7}
    assert recipe.evaluation.fidelity_samples == 7
    document = json.loads(out)
    assert document["tasks"]["sum"] == {
        "metric": "accuracy", "value": 97.0, "n": 9, "ci": [90.0, 100.0],
    }  # fmt: skip
    # JSON has no infinity and no NaN
    assert document["sqnr_db"] == {"text": None, "vision": 20.5}
    assert document["kl"]["vision"] is None


def test_eval_table(pipeline, capsys):
    _, out, _ = call(capsys, "eval", "-c", "tiny-omni-w4a8")
    assert "97.0%" in out and "90.0% - 100.0%" in out and "20.5" in out and "1.00%" in out


def test_eval_refuses_an_unknown_task(pipeline, capsys):
    code, out, err = call(capsys, "eval", "-c", "tiny-omni-w4a8", "--task", "smu")
    assert code == 2 and not out
    assert "no task 'smu'" in err and "--> --task smu" in err and "sum" in err


def test_bench_table_and_json(pipeline, capsys):
    assert json.loads(call(capsys, "bench", "-c", "tiny-omni-w4a8", "--json")[1])["threads"] == 2
    out = call(capsys, "bench", "-c", "tiny-omni-w4a8")[1]
    for cell in ("5,000 tokens/s", "2.00x", "1 MB", "0.250x the bytes of float32, 0.500x of bf16"):
        assert cell in out
    for cell in ("threads: 2", "prefill: faster"):
        assert cell in out


def test_demo_table(monkeypatch, capsys):
    def task(value):
        return {"metric": "accuracy", "value": value, "ci": [value - 1, value + 1], "n": 5}

    def demo(run_root, *, progress, samples):
        assert (run_root, samples) == (Path("runs/demo"), 5)
        return {
            "rows": [
                {"method": "float", "tasks": {"sum": task(95.0), "transcription": task(2.0)}},
                {"method": "masquant", "bits": "W4A8", "tasks": {"sum": task(94.0)},
                 "sqnr_db": {"vision": 21.26}, "bytes": 1_500_000},
            ],
            "metrics": {"transcription": "wer"}, "export_dir": "runs/demo/x", "load": "import x",
        }  # fmt: skip

    fake = SimpleNamespace(demo=demo)
    monkeypatch.setitem(sys.modules, "masquant_cli.demo", fake)
    monkeypatch.setattr(masquant_cli, "demo", fake, raising=False)
    code, out, _ = call(capsys, "demo", "--samples", "5")
    assert code == 0
    for cell in ("transcription WER", "vision dB", "95.0%", "21.3", "1.5 MB", "runs/demo/x"):
        assert cell in out


def test_recipes_lists_and_prints(capsys):
    listing = json.loads(call(capsys, "recipes", "--json")[1])["recipes"]
    assert listing["tiny-omni-w4a8"]["weights"] == 4
    assert listing["qwen-vl-w8a8"]["modalities"] == ["text", "vision"]
    assert "W4A16" in call(capsys, "recipes")[1]
    assert call(capsys, "recipes", "tiny-omni-w4a8")[1].startswith("#")


def test_doctor_reports_versions_and_problems(capsys):
    code, out, _ = call(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == (3 if report["problems"] else 0)
    assert {"masquant", "python", "torch", "torch build", "GPU"} <= set(report["facts"])


FAILURES = [
    (errors.MasquantError("what", where="a:1:2"), 2, "error: what\n  --> a:1:2\n"),
    (errors.RecipeError("what", hint="next"), 2, "error: what\n  hint: next\n"),
    (errors.CheckError("what"), 1, "error: what\n"),
    (errors.EnvironmentProblem("what"), 3, "error: what\n"),
    (errors.ArtifactError("what"), 4, "error: what\n"),
    (OSError(errno.ENOSPC, "No space left", "/x/y"), 3, "error: the disk is full\n  --> /x/y\n"),
    (PermissionError(errno.EACCES, "no", "/x"), 3, "--> /x"),
    (MemoryError(), 3, "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 3, "out of memory"),
    (ConnectionError("no route"), 3, "hub cannot be used: no route"),
    (ModuleNotFoundError("no", name="jiwer"), 3, "'jiwer' is missing"),
    (ModuleNotFoundError("no", name="masquant_cli.x"), 70, "this is a bug"),
    (ZeroDivisionError("division"), 70, "Traceback"),
    (KeyboardInterrupt(), 130, "run the same command again"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "code", "text"), FAILURES, ids=lambda v: type(v).__name__)
def test_every_failure_has_its_exit_code(pipeline, capsys, error, code, text):
    def fail(*_, **__):
        raise error

    pipeline.run = fail
    got, out, err = call(capsys, "run", "-c", "tiny-omni-w4a8")
    assert got == code and not out
    assert text in err
    assert ("Traceback" in err) == (code == 70)
    got, out, _ = call(capsys, "run", "-c", "tiny-omni-w4a8", "--json")
    assert got == code
    assert json.loads(out)["error"]["exit_code"] == code


@pytest.mark.parametrize(
    "argv",
    [
        ["run"],
        ["run", "-c"],
        ["nonsense"],
        ["run", "-c", "x", "--nope"],
        ["eval", "-c", "x", "--samples", "0"],
    ],
)
def test_usage_errors_exit_2_on_stderr(capsys, argv):
    code, out, err = call(capsys, *argv)
    assert code == 2 and not out and err.startswith("error: ") and "--help" in err
    code, out, _ = call(capsys, *argv, "--json")
    assert code == 2 and json.loads(out)["error"]["message"]


def test_no_command_shows_the_help_and_fails(capsys):
    code, out, err = call(capsys)
    assert code == 2 and not out and err.startswith("Usage: masquant")


def test_recipe_errors_reach_the_user_with_their_place(tmp_path, capsys):
    file = tmp_path / "r.yaml"
    file.write_text("extends: tiny-omni-w4a8\nname: x\nweights: {bist: 4}\n")
    code, out, err = call(capsys, "run", "-c", str(file), "--dry-run")
    assert code == 2 and not out
    assert f"--> {file}:3:11" in err and "did you mean `bits`?" in err


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "masquant_cli", "recipes"], stdout=write, stderr=subprocess.PIPE,
        env=ENV, text=True, timeout=120,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("argv", [["recipes"], ["recipes", "--json"]])
def test_output_on_a_full_disk(argv):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "masquant_cli", *argv], stdout=full, stderr=subprocess.PIPE,
            env=ENV, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.startswith("error: the disk is full") and "Traceback" not in done.stderr


@pytest.mark.parametrize("json_wanted", [False, True])
def test_a_terminal_that_lacks_the_letters(json_wanted):
    argv = ["recipes", "nö✓.yaml", *(["--json"] if json_wanted else [])]
    done = subprocess.run(
        [sys.executable, "-m", "masquant_cli", *argv], capture_output=True,
        env={**ENV, "PYTHONIOENCODING": "ascii"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and rb"--> n\xf6\u2713.yaml" in done.stderr
    if json_wanted:
        assert json.loads(done.stdout)["error"]["where"] == "nö✓.yaml"


def test_plain_progress_speaks_now_and_then():
    now = [0.0]
    stream = io.StringIO()
    with console.PlainProgress(stream, clock=lambda: now[0]) as progress:
        progress.stage("smooth", 4, "layers")
        for _ in range(4):
            now[0] += 3.0
            progress.advance(1, tokens=30)
        progress.stage("export", None, "tensors")
        progress.advance()
    assert stream.getvalue().splitlines() == [
        "smooth: 4 layers",
        "smooth: 2/4 layers, 10 tokens/s, 6.0 s left",
        "smooth: done in 12.0 s, 10 tokens/s",
        "export",
        "export: done in 0.0 s",
    ]


def test_plain_progress_does_not_call_a_failed_stage_done():
    stream = io.StringIO()
    with pytest.raises(ValueError), console.PlainProgress(stream) as progress:
        progress.stage("smooth", 4, "layers")
        raise ValueError
    assert stream.getvalue() == "smooth: 4 layers\n"


def test_live_progress_runs_without_a_terminal():
    with console.LiveProgress() as progress:
        progress.stage("a", None, "samples")
        progress.advance(3, tokens=5)
        progress.stage("b", 2, "layers")
        progress.advance()
        progress.note("[not markup]")


def test_numbers_for_people():
    assert [console.clock_face(s) for s in (1.25, 61, 7384)] == ["1.2 s", "1:01", "2:03:04"]
    assert [render.size(n) for n in (10, 1500, 5_700_000)] == ["10 B", "1.5 kB", "5.7 MB"]
    assert render.plain({1: (Path("a"), float("-inf"), True)}) == {"1": ["a", None, True]}
