"""A sweep skips what is finished, survives what fails, calibrates once, and ends in order."""

import json
import os
import shutil
import signal
import stat
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from masquant_cli import launchers, pipeline
from masquant_cli import plan as plan_package
from masquant_cli import sweep as sweeps
from masquant_cli.cli import app
from masquant_cli.errors import ArtifactError, EnvironmentProblem, RecipeError
from masquant_cli.rundir import Manifest, read_manifest, write_manifest

PLAN = pipeline.plan
# In place of `masquant`: does what BEHAVE says of its recipe, and leaves its command line.
STUB = """
import json, os, pathlib, signal, sys, time
argv = sys.argv[1:]
run_dir = pathlib.Path(argv[argv.index("--run-dir") + 1])
behave = json.loads(os.environ["BEHAVE"]).get(run_dir.name, "ok")
run_dir.mkdir(parents=True, exist_ok=True)
(run_dir / "argv.json").write_text(json.dumps({"argv": argv, "at": time.time()}))
print("on stderr", file=sys.stderr, flush=True)
def finish(stage):
    (run_dir / stage).mkdir(exist_ok=True)
    manifest = {"schema": 1, "stage": stage, "fingerprint": "now", "outputs": {}, "seed": 0,
                "seconds": 1.0, "peak_bytes": 1, "peak_gpu_bytes": 0}
    (run_dir / stage / "manifest.json").write_text(json.dumps(manifest))
if behave == "hang":
    try:
        (run_dir / "hangs").touch()
        time.sleep(60)
    except KeyboardInterrupt:
        (run_dir / "interrupted").touch()
        sys.exit(130)
if behave == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if behave == "fail":
    error = {"message": "the recipe\\nis wrong", "where": "x", "hint": None, "exit_code": 2}
    print(json.dumps({"error": error}))
    sys.exit(2)
if behave == "crash":
    sys.exit(70)
time.sleep(float(behave) if behave[0].isdigit() else 0)
if "--reuse" not in argv:
    finish("calibrate")
if behave == "calibrate":
    sys.exit(4)
if behave.startswith("stay until "):
    for _ in range(600):
        if (run_dir.parent / behave.split()[-1] / "argv.json").exists():
            break
        time.sleep(0.05)
    else:
        sys.exit(1)
finish("export")
print(json.dumps({"export_dir": str(run_dir / "export" / "model"), "stages": {}}))
"""


@pytest.fixture
def place(monkeypatch, tmp_path):
    """Recipes a to e of which a, b, c calibrate alike, the stub, and a plan that knows it."""
    monkeypatch.chdir(tmp_path)
    for name in "abcde":
        more = "seed: 1\n" if name == "d" else "seed: 2\n" if name == "e" else ""
        Path(f"{name}.yaml").write_text(f"extends: tiny-omni-w4a8\nname: {name}\n{more}")
    (tmp_path / "stub.py").write_text(STUB)

    def plan(recipe, run_dir, reuse=(), *, download=True):
        assert not download

        def step(stage):
            lent = reuse if stage == "calibrate" else ()
            folders = [run_dir / stage, *(Path(r) / stage for r in lent)]
            read = [read_manifest(f) for f in folders]
            now = [m is not None and m.fingerprint == "now" for m in read]
            found = [f for f, good in zip(folders, now, strict=True) if good]
            state = "cached" if found else "todo"
            return SimpleNamespace(stage=stage, state=state, folder=(found or folders)[0])

        return [step("calibrate"), step("export")]

    monkeypatch.setattr(sweeps.pipeline, "plan", plan)
    monkeypatch.setenv("BEHAVE", "{}")
    program = (sys.executable, str(tmp_path / "stub.py"))

    def go(names="abcde", behave=None, **options):
        monkeypatch.setenv("BEHAVE", json.dumps(behave or {}))
        chosen = sweeps.members([f"{n}.yaml" for n in names], Path("runs"))
        return sweeps.sweep(chosen, program=program, **options)

    monkeypatch.setattr(sweeps, "PROGRAM", program)
    cost = {"peak_bytes": 3e9, "disk_bytes": 5e9}
    prediction = {
        "seconds": 7.5, "stages": {"a": cost, "b": cost}, "written_bytes": 0, "problems": [],
    }  # fmt: skip
    monkeypatch.setattr(plan_package, "predict", lambda *_, **__: prediction)
    monkeypatch.setitem(launchers.LAUNCHERS, "elsewhere", Elsewhere)
    return go


class Elsewhere(launchers.Local):
    """A fleet of any size."""

    width = None


def argv(name: str) -> list[str]:
    return json.loads((Path("runs") / name / "argv.json").read_text())["argv"]


def started(name: str) -> float:
    return json.loads((Path("runs") / name / "argv.json").read_text())["at"]


def test_what_fails_does_not_stop_the_rest_and_the_next_call_tries_only_that(place):
    found = place(behave={"a": "die", "b": "fail", "c": "crash"})
    rows = {run["recipe"]: run for run in found["runs"]}
    assert list(rows) == list("abcde")
    assert [run["state"] for run in found["runs"]] == ["failed"] * 3 + ["done"] * 2
    assert rows["a"]["error"] == "killed by SIGKILL: was it out of memory?"
    assert rows["b"]["error"] == "the recipe is wrong"  # one line of a table
    assert [rows[n]["exit_code"] for n in "abcde"] == [3, 2, 70, 0, 0]
    assert found["exit_code"] == 3  # the first failure's
    assert rows["d"]["export_dir"] == "runs/d/export/model"
    for name in "de":
        Path(f"runs/{name}/argv.json").unlink()
    again = place()
    assert [run["state"] for run in again["runs"]] == ["done"] * 3 + ["cached"] * 2
    assert again["exit_code"] == 0
    assert not Path("runs/d/argv.json").exists()  # a finished run is not even started
    assert {run["state"] for run in place()["runs"]} == {"cached"}


def test_a_calibration_is_made_once_and_read_by_those_that_share_it(place):
    place("abd", behave={"a": "calibrate"})  # it fails after its calibration, which is good
    assert "--reuse" not in argv("a")
    assert argv("b")[-2:] == ["--reuse", "runs/a"]
    assert "--reuse" not in argv("d")  # another seed
    place("ac")
    assert "--reuse" not in argv("a")  # its own
    assert argv("c")[-2:] == ["--reuse", "runs/a"]


def test_others_start_as_soon_as_the_calibration_that_they_share_is_made(place):
    """`a` lasts until `b` has begun; the stale calibration that lay there is not the one."""
    stale = Manifest("calibrate", "before", {}, 0, 1.0, 1, 0)
    write_manifest(Path("runs/a/calibrate"), stale)
    found = place("abc", {"a": "stay until b"}, launcher="elsewhere")
    assert [run["state"] for run in found["runs"]] == ["done"] * 3
    assert argv("b")[-2:] == argv("c")[-2:] == ["--reuse", "runs/a"]
    shutil.rmtree("runs")
    write_manifest(Path("runs/a/calibrate"), stale)
    place("ab", {"a": "0.5"}, launcher="elsewhere")
    assert started("b") > started("a") + 0.5
    assert argv("b")[-2:] == ["--reuse", "runs/a"]


def test_a_head_without_the_gpu_of_its_nodes_knows_what_they_finished(place, monkeypatch):
    """`device: auto` is asked of this machine's torch, and the runs were made on the other kind."""
    monkeypatch.setattr(sweeps.pipeline, "plan", PLAN)
    chosen = sweeps.members(["a.yaml", "b.yaml"], Path("runs"), ["export.verify=false"])
    (here,) = {pipeline.device_of(member.recipe) for member in chosen}
    theirs = chosen[0].recipe.model_copy(update={"device": {"cpu": "cuda", "cuda": "cpu"}[here]})
    for step in PLAN(theirs, chosen[0].run_dir):
        manifest = Manifest(step.stage, step.fingerprint, {}, 0, 1.0, 1, 0, reads=step.reads)
        write_manifest(step.folder, manifest)
    assert [step.state for step in sweeps.steps(chosen)[0]] == ["stale"] * 4
    far = sweeps.steps(chosen, here=False)
    assert [step.state for step in far[0]] == ["cached"] * 4
    assert [step.state for step in far[1]] == ["cached", "todo", "todo", "todo"]
    found = sweeps.sweep(chosen, launcher="elsewhere", program=sweeps.PROGRAM)
    assert [run["state"] for run in found["runs"]] == ["cached", "done"]
    assert argv("b")[-2:] == ["--reuse", "runs/a"]


def test_the_command_line_of_a_run(place, tmp_path):
    (member,) = sweeps.members(["a.yaml"], Path("runs"), ["seed=3"])
    assert member.recipe.seed == 3
    line = sweeps.command(member, ["seed=3"], [Path("x")], 4, True, ("py", "-m", "masquant_cli"))
    assert line[:4] == ["py", "-m", "torch.distributed.run", "--standalone"]
    assert line[4:8] == ["--nproc-per-node=4", "-m", "masquant_cli", "run"]
    assert line[8:] == [
        *("-c", str(tmp_path / "a.yaml"), "--run-dir", "runs/a", "--json"),
        *("--set", "seed=3", "--reuse", "x", "--quiet"),
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_reaches_the_run_and_the_next_call_goes_on(place, number):
    def interrupt():
        while not Path("runs/b/hangs").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        place("abc", behave={"b": "hang"})
    assert signal.getsignal(number) is before
    assert Path("runs/b/interrupted").exists()
    assert not Path("runs/c").exists()
    assert [run["state"] for run in place("abc")["runs"]] == ["cached", "done", "done"]


def test_what_is_wrong_with_recipes_is_said_before_anything_starts(place, tmp_path, monkeypatch):
    Path("twin.yaml").write_text("extends: a.yaml\nname: b\n")
    Path("bad.yaml").write_text("extends: a.yaml\nname: x\nseed: -1\n")
    with pytest.raises(RecipeError, match=r"two recipes are called b: .*b\.yaml and .*twin\.yaml"):
        sweeps.members(["a.yaml", "b.yaml", "twin.yaml"], Path("runs"))
    with pytest.raises(RecipeError, match="two recipes are called a"):
        sweeps.members(["a.yaml", "a.yaml"], Path("runs"))
    both = r"2 recipes cannot be run\nnone.yaml: no such recipe.*\n.*bad.yaml:3:1: `seed`"
    with pytest.raises(RecipeError, match=both):
        sweeps.members(["a.yaml", "none.yaml", "bad.yaml"], Path("runs"))
    Path("runs").mkdir()
    Path("runs/d").mkdir()
    Path("runs/e").symlink_to(tmp_path / "runs" / "d")
    with pytest.raises(RecipeError, match="are one folder"):
        sweeps.members(["d.yaml", "e.yaml"], Path("runs"))

    def plan(recipe, run_dir, reuse=(), *, download=True):
        raise RecipeError("no such model folder", where="model.path")

    monkeypatch.setattr(sweeps.pipeline, "plan", plan)
    with pytest.raises(RecipeError, match="no such model folder"):
        place("ab")
    assert not Path("runs/a").exists()


def test_a_damaged_run_fails_alone(place, monkeypatch):
    plan = sweeps.pipeline.plan

    def damaged(recipe, run_dir, *rest, **more):
        if recipe.name == "a":
            raise ArtifactError("this manifest is damaged")
        return plan(recipe, run_dir, *rest, **more)

    monkeypatch.setattr(sweeps.pipeline, "plan", damaged)
    found = place("ad", behave={"a": "fail"})
    assert [run["state"] for run in found["runs"]] == ["failed", "done"]


def test_a_dry_run_says_what_the_run_would_refuse(place, capsys):
    Path("runs/a/calibrate").mkdir(parents=True)
    Path("runs/a/calibrate/manifest.json").write_text("{")
    assert app.main(["sweep", "a.yaml", "b.yaml", "--dry-run", "--json"]) == 4
    out, err = capsys.readouterr()
    rows = json.loads(out)["plan"]
    assert [row["state"] for row in rows] == ["damaged", "todo"]  # b could have read a's
    assert "error: a: " in err and "this manifest is damaged" in err and "error: b" not in err


def test_a_dry_run_adds_up_the_disk(place, capsys, monkeypatch):
    line = ["sweep", "a.yaml", "d.yaml", "--dry-run"]
    free = SimpleNamespace(free=19e9)  # either run takes 10 GB
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert app.main(line) == 3
    assert "error: the runs together write 20.0 GB, " in capsys.readouterr().err
    free.free = 21e9
    assert app.main(line) == 0
    free.free = 19e9
    predicted = plan_package.predict() | {"written_bytes": 1e9}
    monkeypatch.setattr(plan_package, "predict", lambda *_, **__: predicted)
    assert app.main(line) == 0  # 2 GB are there from an earlier start


def test_a_dry_run_of_runs_elsewhere_tells_what_this_machine_can_know(place, capsys, monkeypatch):
    predict, asked = plan_package.predict, []
    found = predict() | {"problems": ["this machine is small"]}
    monkeypatch.setattr(plan_package, "predict", lambda *_, **more: asked.append(more) or found)
    line = ["sweep", "a.yaml", "--dry-run", "--launcher", "submitit"]
    assert app.main([*line, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = document["plan"]
    assert row["seconds"] is row["peak_bytes"] is document["seconds"] is None
    assert row["disk_bytes"] == document["disk_bytes"] == 10e9
    assert asked == [{"processes": 1, "on": "h200"}]  # nothing is timed here, nor looked for
    assert app.main(line) == 0
    assert "one after the other" not in capsys.readouterr().out


def test_a_run_that_cannot_have_its_folder_fails_alone(place):
    Path("runs").mkdir()
    Path("runs/b").write_text("in the way")
    found = place("abd")
    assert [run["state"] for run in found["runs"]] == ["done", "failed", "done"]
    assert found["exit_code"] == 3 and "runs/b" in found["runs"][1]["error"]
    Path("runs/b").unlink()
    assert [run["state"] for run in place("abd")["runs"]] == ["cached", "done", "cached"]


def test_sigterm_ends_a_sweep_as_it_ends_any_command(place, capsys, monkeypatch):
    monkeypatch.setenv("BEHAVE", json.dumps({"a": "hang"}))

    def end():
        while not Path("runs/a/hangs").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end).start()
    assert app.main(["sweep", "a.yaml"]) == 143
    assert "ended by SIGTERM" in capsys.readouterr().err
    assert Path("runs/a/interrupted").exists()


def test_the_command(place, capsys, monkeypatch):
    monkeypatch.setenv("BEHAVE", json.dumps({"b": "fail"}))
    line = ["sweep", "a.yaml", "b.yaml", "d.yaml", "--set", "weights.bits=8"]
    assert app.main([*line, "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [r["state"] for r in document["plan"]] == ["todo"] * 3
    assert (document["seconds"], document["disk_bytes"]) == (22.5, 30e9)
    assert app.main(line) == 2
    out, err = capsys.readouterr()
    assert [row.split()[:2] for row in out.splitlines()[2:5]] == [
        ["a", "done"], ["b", "failed"], ["d", "done"],
    ]  # fmt: skip
    assert "the recipe is wrong" in out and "1 of 3 failed" in out
    assert "warning: b failed: the recipe is wrong" in err
    assert argv("a")[-2:] == ["--set", "weights.bits=8"]
    assert app.main([*line, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert [row.split()[1] for row in out.splitlines()[2:5]] == ["cached", "todo", "cached"]
    assert "one after the other: 7.5 s, 10 GB" in out and "3 GB" in out
    monkeypatch.setattr(plan_package, "predict", lambda *_, **__: {
        "seconds": 1.0, "stages": {"a": {"peak_bytes": 1, "disk_bytes": 1}},
        "written_bytes": 0, "problems": ["too big"],
    })  # fmt: skip
    assert app.main([*line, "--dry-run"]) == 3
    assert "error: b: too big" in capsys.readouterr().err
    assert app.main([*line, "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert [r["state"] for r in document["runs"]] == ["cached", "failed", "cached"]


def test_a_dry_run_counts_a_shared_calibration_once_and_goes_on_after_a_bad_recipe(
    place, capsys, monkeypatch
):
    asked = {}

    def predict(recipe, run_dir, todo, *, processes):
        asked[recipe.name] = todo
        assert processes == 3
        if recipe.name == "d":
            raise RecipeError("its shard is truncated")
        cost = {"peak_bytes": 1, "disk_bytes": 1}
        return {"seconds": 1.0, "stages": {"x": cost}, "written_bytes": 0, "problems": []}

    monkeypatch.setattr(plan_package, "predict", predict)
    line = ["sweep", *(f"{n}.yaml" for n in "adbe"), "--dry-run", "--json", "--processes", "3"]
    assert app.main(line) == 2
    out, err = capsys.readouterr()
    rows = {row["recipe"]: row for row in json.loads(out)["plan"]}
    assert [rows[n]["state"] for n in "adbe"] == ["todo", "refused", "todo", "todo"]
    assert "error: d: its shard is truncated" in err
    assert asked["a"] == asked["e"] == ["calibrate", "export"] and asked["b"] == ["export"]
    assert rows["b"]["why"] == "from export on, calibrated by a"


def test_options_that_the_launcher_does_not_take(place, capsys):
    line = ["sweep", "a.yaml"]
    assert app.main([*line, "--launcher-set", "partition=x"]) == 2
    assert "local does not take these options" in capsys.readouterr().err
    assert app.main([*line, "--launcher-set", "partition"]) == 2
    assert "key=value" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["submitit", "ray"])
@pytest.mark.parametrize("width", [0, -1, "two", 1.5, True])
def test_at_once_is_a_number_of_runs(place, launcher, width):
    with pytest.raises(RecipeError, match="is not a number of runs"):
        place("a", launcher=launcher, options={"at_once": width})


@pytest.mark.parametrize("option", ["nodes", "tasks_per_node", "local_nodes", "ntasks_per_node"])
def test_a_run_is_one_task(place, option):
    options = {"cluster": "local", option: 2}
    with pytest.raises(RecipeError, match=f"{option}=2: a run is one task on one node"):
        place("a", launcher="submitit", options=options)


@pytest.mark.parametrize(("launcher", "extra"), [("submitit", "slurm"), ("ray", "ray")])
def test_a_missing_extra_is_named(place, monkeypatch, launcher, extra):
    monkeypatch.setitem(sys.modules, launcher, None)
    with pytest.raises(EnvironmentProblem) as caught:
        place("a", launcher=launcher)
    assert caught.value.exit_code == 3 and caught.value.hint == f"pip install 'masquant[{extra}]'"
    assert not Path("runs/a").exists()


def test_submitit_here(place):
    options = {"cluster": "local", "timeout_min": 5}
    found = place("abd", {"a": "1.5", "b": "fail"}, launcher="submitit", options=options)
    rows = {run["recipe"]: run for run in found["runs"]}
    assert [rows[n]["state"] for n in "abd"] == ["done", "failed", "done"]
    assert rows["b"]["error"] == "the recipe is wrong" and rows["b"]["exit_code"] == 2
    assert started("b") > started("a") + 1.5  # it waits for the calibration that it shares
    assert started("d") < started("a") + 1.5  # another one's does not
    assert argv("b")[-2:] == ["--reuse", "runs/a"]
    assert Path("runs/d/run.log").read_text() == "on stderr\n"
    with pytest.raises(RecipeError, match="does not take these options"):
        place("c", launcher="submitit", options={"cluster": "local", "timeout_min": "soon"})


def test_submitit_without_slurm(place, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EnvironmentProblem, match="no Slurm here"):
        place("a", launcher="submitit", options={"partition": "gpu"})


# Slurm as submitit sees it, on this machine: sbatch runs its script at once.
SLURM = {
    "sbatch": """
        #!/bin/bash
        if grep -q -e --partition=none "${@: -1}"; then
          echo "sbatch: error: Batch job submission failed: Invalid partition name specified" >&2
          exit 1
        fi
        cp "${@: -1}" "$SLURM_ROOT/last.sh"
        id=$(( $(cat "$SLURM_ROOT/id") + 1 )); echo $id > "$SLURM_ROOT/id"
        export SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
        export SLURM_JOB_NUM_NODES=1 SLURM_NNODES=1 SLURM_JOB_NODELIST=here
        (bash "${@: -1}"; echo $id >> "$SLURM_ROOT/over") > "$SLURM_ROOT/$id.out" 2>&1 &
        echo "Submitted batch job $id"
        """,
    "srun": """
        #!/bin/bash
        while [[ "$1" == -* ]]; do case "$1" in --output|--error) shift 2;; *) shift;; esac; done
        exec "$@"
        """,
    "sacct": """
        #!/bin/bash
        echo "JobID|State|NodeList"
        for id in $(seq 1 $(cat "$SLURM_ROOT/id")); do
          grep -qx $id "$SLURM_ROOT/over" && s=COMPLETED || s=RUNNING; echo "$id|$s|here"
        done
        """,
    "scancel": """
        #!/bin/bash
        echo "$@" >> "$SLURM_ROOT/cancelled"
        """,
}


def test_submitit_on_a_stand_in_for_slurm(place, monkeypatch, tmp_path):
    from submitit.core.utils import DelayedSubmission

    root = tmp_path / "slurm"
    root.mkdir()
    (root / "id").write_text("0\n")
    (root / "over").touch()
    for name, text in SLURM.items():
        (root / name).write_text(textwrap.dedent(text).lstrip())
        (root / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("SLURM_ROOT", str(root))
    monkeypatch.setenv("PATH", f"{root}:{os.environ['PATH']}")
    options = {"partition": "gpu", "gpus_per_node": 2, "timeout_min": 90}
    found = place("a", launcher="submitit", options=options)
    assert [run["state"] for run in found["runs"]] == ["done"], found
    script = (root / "last.sh").read_text()
    assert "#SBATCH --partition=gpu\n" in script
    assert "#SBATCH --gpus-per-node=2\n" in script and "#SBATCH --time=90\n" in script
    with pytest.raises(RecipeError, match="does not take these options"):
        place("b", launcher="submitit", options={"partitoin": "gpu"})
    found = place("bd", launcher="submitit", options={"partition": "none"})
    assert [run["state"] for run in found["runs"]] == ["failed", "failed"]
    assert found["exit_code"] == 3 and "Invalid partition name" in found["runs"][0]["error"]
    place("d", launcher="submitit")  # a day at a time, as often as it takes
    assert "#SBATCH --time=1440\n" in (root / "last.sh").read_text()
    job = DelayedSubmission.load(Path("runs/.sweep/2/2_submitted.pkl"))
    assert job._timeout_countdown == 1000


def test_ray_here(place):
    pytest.importorskip("ray")
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    found = place("abd", {"b": "fail", "d": "die"}, launcher="ray", options={"num_cpus": 1})
    assert [run["state"] for run in found["runs"]] == ["done", "failed", "failed"]
    assert [run["exit_code"] for run in found["runs"]] == [0, 2, 3]
    assert argv("b")[-2:] == ["--reuse", "runs/a"]
    with pytest.raises(RecipeError, match="does not take these options"):
        place("c", launcher="ray", options={"cpus": 1})
