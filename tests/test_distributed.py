"""Several processes: what they exchange, how they end, and that they get what one gets."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import rank_jobs
from rank_world import launch

from masquant_cli import distributed
from masquant_cli.distributed import World, deal

RUN = ("run", "-c", "tiny-omni-w4a8")


def test_costs_are_dealt_evenly_and_alike_everywhere():
    assert deal([5, 1, 1, 1, 1, 1], 2) == [0, 1, 1, 1, 1, 1]
    assert deal([1] * 8, 3) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert deal([], 4) == [] and deal([7.5], 4) == [0]
    costs = [((i * 37) % 101) ** 2 for i in range(60)]
    for size in (2, 7):
        ranks = deal(costs, size)
        loads = [sum(c for c, r in zip(costs, ranks, strict=True) if r == k) for k in range(size)]
        assert max(loads) <= 1.02 * sum(costs) / size


def test_one_process_is_a_world_of_its_own(tmp_path, monkeypatch):
    world = distributed.world()
    assert (world.rank, world.size, world.main) == (0, 1, True)
    assert world.from_main(lambda: 3) == 3 and world.all_gather("x") == ["x"]
    assert list(World().collect(0, {"a": 1})) == [{"a": 1}]
    world.check_shared(tmp_path / "absent"), world.barrier(), world.leave()
    failure = {"message": "no", "where": None, "hint": None, "exit_code": 4}
    assert world.ending(failure) == (failure, True)
    assert not distributed.launched()
    monkeypatch.setenv("WORLD_SIZE", "8")  # as cluster images set it, without torchrun
    assert not distributed.launched()


def test_three_ranks_exchange_objects_and_tensors(tmp_path):
    codes = launch(tmp_path, rank_jobs.exchange, str(tmp_path), size=3).wait()
    assert codes == [0, 0, 0]
    got = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(3)]
    for rank, mine in enumerate(got):
        assert mine["main"] == ["of rank", 0]
        assert mine["all"] == [{"r": 0}, {"r": 1}, {"r": 2}]
        assert [len(seen) for seen in mine["collected"]] == [3 * (o == rank) for o in range(3)]
        for peer, found in enumerate(mine["collected"][rank]):  # in the order of ranks
            assert found["rows"] == ["torch.float32", [[float(peer)] * 3] * (2 * peer)]
            assert found["keys"] == ["torch.float64", [float(peer + i) for i in range(2 * peer)]]
            assert found["count"] == ["torch.int64", [10**12 + peer]]
            assert found["half"] == ["torch.bfloat16", [[1.5], [float(peer)]]]
            assert found["turned"][1] == [[p + peer, p + 3 + peer] for p in (0.0, 1.0, 2.0)]
        assert mine["threads"] == 1
    assert not (tmp_path / ".shared").exists()


def test_a_failing_rank_ends_all_with_its_error_printed_once(tmp_path):
    ranks = launch(tmp_path, rank_jobs.failing, "error", 0, *RUN, "--json")
    assert ranks.wait() == [4, 4]
    assert ranks.said(0).startswith("error: layer 3 is damaged\n  --> rank 1 on ")
    assert ranks.said(0).endswith("layers/003.safetensors\n  hint: delete it\n")
    assert json.loads(ranks.printed(0))["error"]["exit_code"] == 4
    assert ranks.said(1) == ranks.printed(1) == ""


def test_the_failing_rank_speaks_where_rank_0_is_busy(tmp_path):
    ranks = launch(tmp_path, rank_jobs.failing, "error", 2.5, *RUN)
    assert ranks.wait() == [4, 4]
    assert ranks.said(0) == "" and ranks.said(1).startswith("error: layer 3 is damaged\n")


def test_a_bug_shows_the_traceback_of_its_rank(tmp_path):
    ranks = launch(tmp_path, rank_jobs.failing, "bug", 0, *RUN)
    assert ranks.wait() == [70, 70]
    assert ranks.said(0) == ""
    assert "in _end" in ranks.said(1) and "error: AssertionError: an odd number" in ranks.said(1)


def test_a_killed_rank_is_named_without_a_traceback(tmp_path):
    ranks = launch(tmp_path, rank_jobs.failing, "killed", 0, *RUN)
    assert ranks.wait() == [3, -signal.SIGKILL]
    said = ranks.said(0).splitlines()
    assert said[0] == "error: rank 1 died" and len(said) == 3
    assert f"process {ranks.processes[1].pid} on " in said[1]
    assert "run the same command again" in said[2]


def test_a_rank_killed_while_another_computes(tmp_path):
    ranks = launch(tmp_path, rank_jobs.failing, "killed", 9, *RUN)
    ranks.processes[1].join(20)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)  # what torchrun does then
    assert ranks.wait() == [3, -signal.SIGKILL]
    assert ranks.said(0).splitlines()[0] == "error: rank 1 died"


def test_a_rank_that_dies_while_it_sends(tmp_path):
    ranks = launch(tmp_path, rank_jobs.sending_to_the_dead, str(tmp_path))
    assert ranks.wait() == [5, -signal.SIGKILL]
    assert ranks.said(0).splitlines()[:2] == ["EnvironmentProblem", "rank 1 died"]


def test_a_silent_rank_is_not_waited_for_for_ever(tmp_path):
    began = time.monotonic()
    ranks = launch(tmp_path, rank_jobs.failing, "hung", 0, *RUN, MASQUANT_RANK_TIMEOUT="2")
    ranks.processes[0].join(30)
    ranks.processes[1].kill()
    assert ranks.wait()[0] == 3 and time.monotonic() - began < 20
    assert "error: rank 1 has given no sign of life for 2 seconds" in ranks.said(0)
    assert "MASQUANT_RANK_TIMEOUT" in ranks.said(0)


def test_a_rank_that_downloads_for_long_is_not_given_up(tmp_path):
    ranks = launch(tmp_path, rank_jobs.downloading, 4.5, MASQUANT_RANK_TIMEOUT="2")
    assert ranks.wait() == [0, 0], ranks.said(1)


def test_sigterm_to_all_is_one_line_and_143(tmp_path):
    ranks = launch(tmp_path, rank_jobs.failing, "terminated", 0, *RUN)
    assert ranks.wait() == [143, 143]
    lines = (ranks.said(0) + ranks.said(1)).splitlines()
    assert [x for x in lines if x.startswith("error")] == ["error: ended by SIGTERM"]


def test_commands_for_one_process_are_refused_once(tmp_path):
    ranks = launch(tmp_path, rank_jobs.command, "recipes")
    assert ranks.wait() == [2, 2]
    assert "error: masquant recipes runs in one process" in ranks.said(0)
    assert ranks.said(1) == ranks.printed(0) == ranks.printed(1) == ""


def test_a_wrong_recipe_is_one_error(tmp_path):
    ranks = launch(tmp_path, rank_jobs.command, *RUN, "--set", "weights.bist=4")
    assert ranks.wait() == [2, 2]
    assert "did you mean" in ranks.said(0) + ranks.said(1)
    assert (ranks.said(0) + ranks.said(1)).count("error:") == 1


def test_a_run_directory_that_is_not_shared_is_an_error(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    ranks = launch(tmp_path, rank_jobs.blind, str(tmp_path / "here"), str(tmp_path / "there"))
    assert ranks.wait() == [3, 3]
    assert "rank 1 on " in ranks.said(0) and "does not see the run directory" in ranks.said(0)
    assert str(tmp_path / "here") in ranks.said(0)


def test_the_timeout_must_be_a_number(monkeypatch):
    monkeypatch.setenv("MASQUANT_RANK_TIMEOUT", "soon")
    with pytest.raises(distributed.RecipeError, match="'soon' is not a number of seconds"):
        distributed._timeout()


def test_sigterm_ends_one_process_with_143(tmp_path, monkeypatch, capsys):
    from masquant_cli import pipeline
    from masquant_cli.cli.app import main

    def run(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(pipeline, "run", run)
    before = signal.getsignal(signal.SIGTERM)
    assert main([*RUN, "--run-dir", str(tmp_path), "--json"]) == 143
    said = capsys.readouterr()
    assert said.err.startswith("error: ended by SIGTERM\n  hint: run the same command again")
    assert json.loads(said.out)["error"]["exit_code"] == 143
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    ranks = launch(folder, rank_jobs.whole_runs, str(folder / "run"), size=1)
    assert ranks.wait() == [0], ranks.said(0)
    return folder / "run"


def artifacts(run: Path) -> dict[str, bytes]:
    """All that a run leaves behind but what tells of its time and its processes."""
    files = (p for p in sorted(run.rglob("*")) if p.is_file() and p.name != "manifest.json")
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in files}


def test_ranks_choose_the_samples_that_one_process_chooses(tmp_path):
    for name, size in (("one", 1), ("three", 3)):
        ranks = launch(tmp_path / name, rank_jobs.choosing, str(tmp_path / name), size=size)
        assert ranks.wait(100) == [0] * size, ranks.said(0)
    one = json.loads((tmp_path / "one" / "0.json").read_text())
    many = [json.loads((tmp_path / "three" / f"{r}.json").read_text()) for r in range(3)]
    assert len(set(one[0])) > 8
    assert [found[:3] for found in many] == [one[:3]] * 3
    assert many[0][3] > one[3]  # they had read further, and into the broken sample


def test_one_rank_alone_may_work_with_whole_layers(tmp_path):
    ranks = launch(tmp_path, rank_jobs.blocks_alone)
    assert ranks.wait(100) == [0, 0], ranks.said(0)


def test_two_processes_make_what_one_makes_to_the_byte(tmp_path, alone):
    runs = [tmp_path / name for name in ("first", "second")]
    ranks = launch(tmp_path / "said", rank_jobs.whole_runs, *map(str, runs))
    assert ranks.wait(200) == [0, 0], ranks.said(0) + ranks.said(1)
    first, second = map(artifacts, runs)
    assert first == second
    expected = artifacts(alone)
    assert len(expected) > 20 and first.keys() == expected.keys()
    # Sums of batches are rounded but once, so not even these differ (docs/distributed.md).
    assert [name for name in expected if first[name] != expected[name]] == []
    written = json.loads((runs[0] / "smooth" / "manifest.json").read_text())
    single = json.loads((alone / "smooth" / "manifest.json").read_text())
    assert (written["processes"], single["processes"]) == (2, 1)
    assert written["fingerprint"] == single["fingerprint"]


def test_a_run_whose_rank_was_killed_is_finished_by_one_process(tmp_path, alone):
    run = tmp_path / "run"
    ranks = launch(tmp_path / "dying", rank_jobs.dying_run, str(run), 2)
    assert ranks.wait(200) == [3, -signal.SIGKILL]
    said = ranks.said(0)
    assert "error: rank 1 died\n" in said and "Traceback" not in said and ranks.said(1) == ""
    kept = {p: p.stat().st_mtime_ns for p in (run / "calibrate" / "layers").iterdir()}
    assert {p.name for p in kept} >= {"000.safetensors", "001.safetensors"}
    assert not (run / "calibrate" / "manifest.json").exists()
    resumed = launch(tmp_path / "resumed", rank_jobs.whole_runs, str(run), size=1)
    assert resumed.wait(200) == [0], resumed.said(0)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert artifacts(run) == artifacts(alone)
