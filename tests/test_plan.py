"""A plan counts what the code does, and says in bytes what a run then writes and holds."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import rank_jobs
import torch
from jobs import small
from rank_world import launch
from safetensors import safe_open

from masquant_cli import pipeline, plan
from masquant_cli.algo.low_rank import best_low_rank, rank_for
from masquant_cli.algo.site import SiteProblem
from masquant_cli.cli import app
from masquant_cli.data.chat import kinds_of
from masquant_cli.data.sources import count_rows
from masquant_cli.errors import RecipeError
from masquant_cli.methods import find
from masquant_cli.methods.method import Layer
from masquant_cli.models.hidden import Store
from masquant_cli.models.resolve import resolve
from masquant_cli.plan import coverage, rates, work
from masquant_cli.plan import subject as subjects
from masquant_cli.plan.coverage import Coverage, cover
from masquant_cli.plan.machine import CARDS, Elsewhere, elsewhere
from masquant_cli.plan.rates import Bench
from masquant_cli.plan.stages import KEPT, Planner
from masquant_cli.plan.subject import open_subject
from masquant_cli.plan.tape import Call, Shape, Tape, record
from masquant_cli.recipe import Method, Model, Smoothing
from masquant_cli.stages.memory import SPARE

META = torch.device("meta")


def make(*size: int, device="cpu") -> torch.Tensor:
    return torch.rand(*size) + 0.1 if device == "cpu" else torch.empty(*size, device=META)


def problem(out: int, width: int, device: str, rows: int = 40, rank: int = 6) -> SiteProblem:
    return SiteProblem(
        weight=make(out, width, device=device),
        rows=tuple(make(rows, width, device=device) for _ in range(3)),
        heldout=tuple(make(9, width, device=device) for _ in range(3)),
        absmax=make(3, width, device=device),
        mean_abs=make(3, width, device=device),
        tokens=(70, 80, 90),
        weight_bits=4,
        group_size=None,
        symmetric=True,
        activation_bits=8,
        rank=rank,
        loss_weights=(1.0, 1.0, 1.0),
    )


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Matrix products of real numbers, by their shapes."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            key = tuple(tuple(a.shape) for a in args)
            self.seen[key] = self.seen.get(key, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["masquant-joint", "masquant", "awq", "smoothquant"])
def test_a_tape_has_the_products_that_the_method_then_does(method):
    def solve(device):
        sites = {"attn_in": problem(37, 24, device), "mlp_out": problem(24, 56, device)}
        layer = Layer(
            modalities=("text", "vision", "audio"), sites=sites,
            smoothing=Smoothing(epochs=2, batch_rows=16), seeds=dict.fromkeys(sites, 1),
            sensitivity=None, block=None,
        )  # fmt: skip
        find(method).solve(layer)

    with record() as recorder:
        solve("meta")
    counting = Counting()
    with counting:
        solve("cpu")
    found = {}
    for call, n in recorder.tape.calls.items():
        if call.op is torch.ops.aten.mm.default:
            key = tuple(shape.size for shape in call.tensors)
            found[key] = found.get(key, 0) + n
    assert sum(counting.seen.values()) > 4
    flops = {k: n * k[0][0] * k[0][1] * k[1][1] for k, n in counting.seen.items()}
    taped = {k: n * k[0][0] * k[0][1] * k[1][1] for k, n in found.items()}
    # Which candidate wins, only numbers tell: a few products more or less.
    assert sum(taped.values()) == pytest.approx(sum(flops.values()), rel=0.1)


def test_epochs_beyond_the_taped_ones_are_counted_as_often():
    subject = open_subject(small("smoothing.epochs=4", "calibration.rows=16"), "cpu")
    job, layer = subject.job, subject.job.layers[0]
    layer = replace(layer, sites=layer.sites[1:2])
    tokens = {"text": 200, "vision": 90, "audio": 80}
    whole = work._solved(job, layer, tokens, 4)
    assert work.solved(job, layer, tokens).calls == whole.calls


def test_corrections_take_the_blocks_that_they_expect():
    delta, gram = make(700, 600, device="meta"), make(600, 600, device="meta")
    rank = rank_for(0.05, 600, 700)
    with work._without_numbers() as recorder:
        best_low_rank(delta, rank, gram=gram)
    shapes = [c.tensors[0].size for c in recorder.tape.calls if rates.name_of(c) == "linalg_eigh"]
    assert len(shapes) == work.low_rank.BLOCKS  # one more block each time
    assert max(shapes) == (work.low_rank.BLOCKS * (rank + work.low_rank.OVERSAMPLE),) * 2


def test_memory_is_that_of_all_tensors_alive_at_once():
    with record() as recorder:
        a = torch.empty(100, 7, device=META)  # 2800 bytes
        b = a + 1
        view = b.T
        del a
        c = view @ b  # [7, 7]
        del b, view, c
        torch.empty(1000, dtype=torch.int8, device=META)
    assert recorder.tape.peak == 2 * 2800
    assert recorder.alive == 0
    twice = recorder.tape.plus(recorder.tape, 2)
    assert twice.peak == 5600
    assert all(n == 3 * recorder.tape.calls[c] for c, n in twice.calls.items())


def test_an_operation_too_large_to_time_is_timed_in_part(monkeypatch):
    shape = Shape((4096, 4096), (4096, 1), torch.float32)
    column = Shape((4096, 9), (9, 1), torch.float32)
    call = Call(torch.ops.aten.mm.default, ((shape, column), ()))
    assert rates._smaller(call) == (call, 1.0)
    monkeypatch.setattr(rates, "LARGE", 4e6)
    part, factor = rates._smaller(call)
    a, b = part.tensors
    assert a.size[1] == b.size[0] < 4096 and b.size[1] == 9
    assert factor == pytest.approx((4096 / a.size[0]) ** 2)
    part, factor = rates._smaller(Call(torch.ops.aten.mm.default, ((shape, shape), ())))
    side = part.tensors[0].size[0]
    assert all(t.size == (side, side) for t in part.tensors) and side < 4096
    assert factor == pytest.approx((4096 / side) ** 3)
    assert 0.4 < rates._rough(part) / (4e6 / 5e9) <= 1  # as much of it as may be timed
    wide = Shape((18944, 3584), (3584, 1), torch.float32)
    part, factor = rates._smaller(Call(torch.ops.aten.mul.Tensor, ((wide, wide), ())))
    assert part.tensors[0].size[1] == 3584
    assert factor == pytest.approx(18944 / part.tensors[0].size[0])
    square = Call(torch.ops.aten.linalg_eigh.default if hasattr(torch.ops.aten, "linalg_eigh")
                  else torch.ops.aten._linalg_eigh.default, ((shape,), ()))  # fmt: skip
    part, factor = rates._smaller(square)
    assert factor == pytest.approx((4096 / part.tensors[0].size[0]) ** 3)


def test_what_the_budget_does_not_reach_is_estimated():
    shape = Shape((300, 200), (200, 1), torch.float32)
    calls = {Call(torch.ops.aten.mul.Tensor, ((shape, i), ())): 5 for i in range(20)}
    every, none = Bench(torch.device("cpu")), Bench(torch.device("cpu"), budget=0.0)
    taped = Tape()
    taped.calls.update(calls)
    assert every.seconds(taped) > 0 and len(every.known) == 20
    assert none.seconds(taped) > 0 and not none.known


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan of a small job with every feature, and what its run then did."""
    recipe = small("smoothing.epochs=0")
    run_dir = tmp_path_factory.mktemp("plan") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coverage, "PATIENCE", float("inf"))  # of a busy machine too
        found = plan.predict(recipe, run_dir)
    assert not run_dir.exists() and not list(run_dir.parent.iterdir())  # nothing is left behind
    return found, pipeline.run(recipe, run_dir), run_dir, recipe


def tensors(folder: Path) -> int:
    total = 0
    for file in folder.glob("layers/*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            total += sum(shard.get_tensor(name).nbytes for name in shard.keys())
    return total


def test_disk_and_size_are_exact(planned):
    found, done, run_dir, _ = planned
    for stage in ("calibrate", "smooth", "compensate"):
        assert found["stages"][stage]["disk_bytes"] == tensors(run_dir / stage), stage
    model = run_dir / "export" / "model"
    assert found["size"]["files"] == sum(f.stat().st_size for f in model.glob("*.safetensors"))
    exported = done["stages"]["export"]
    for key, value in exported["bytes"].items():
        assert found["size"][key] == value, key
    assert found["size"]["bits_per_weight"] == exported["bits_per_weight"]


def test_memory_is_predicted_within_a_quarter(planned):
    found, done, _, _ = planned
    for stage, costs in found["stages"].items():
        measured = done["stages"][stage]["peak_bytes"]
        assert costs["peak_bytes"] == pytest.approx(measured, rel=0.25), stage


def test_tokens_are_those_that_calibrate_sees(planned):
    found, done, _, _ = planned
    assert found["coverage"]["known"] == "chosen"
    assert found["coverage"]["tokens"] == done["stages"]["calibrate"]["tokens"]
    assert found["coverage"]["samples"] == done["stages"]["calibrate"]["samples"]


def test_hidden_states_on_disk_are_two_generations_and_their_arguments(tmp_path, monkeypatch):
    """What enters a layer stays on disk until all that enters the next one is there."""
    few = (f"calibration.sources.{i}.limit=4" for i in range(4))
    monkeypatch.setattr(coverage, "PATIENCE", float("inf"))  # of a busy machine too
    recipe = small("method=rtn", "resources.max_memory=1MB", *few)
    subject = open_subject(recipe, "cpu")
    planner = Planner(subject, cover(subject), elsewhere("h200"), 10**9, 10**6, False)
    needed, held = planner.calibrate().disk, []
    checkpoint = Store.checkpoint

    def measured(store, *args, **options):
        held.append(sum(file.stat().st_size for file in store.folder.iterdir()))
        checkpoint(store, *args, **options)

    monkeypatch.setattr(Store, "checkpoint", measured)
    pipeline.run(recipe, tmp_path / "run", until="calibrate")
    written = tensors(tmp_path / "run" / "calibrate")
    # A batch whose samples are of one length has no mask, which a plan does not look into.
    assert needed - written == pytest.approx(max(held), rel=0.01)
    planner.limit = 10**12
    assert planner.calibrate().disk == written


def test_a_modality_that_no_hub_source_feeds_is_an_error_as_in_run(monkeypatch):
    monkeypatch.setattr(coverage, "_is_local", lambda source: False)
    subject = open_subject(small(), "cpu")
    found = cover(subject)
    assert found.known == "unknown" and min(found.tokens.values()) > 0
    recipe, calibration = subject.job.recipe, subject.job.recipe.calibration
    silent = tuple(s for s in calibration.sources if "audio" not in kinds_of(s.messages))
    calibration = calibration.model_copy(update={"sources": silent})
    subject.job.recipe = recipe.model_copy(update={"calibration": calibration})
    with pytest.raises(RecipeError, match="no calibration sample has audio tokens"):
        cover(subject)


def test_what_takes_long_to_choose_is_extrapolated_to_all_rows(monkeypatch):
    subject = open_subject(small(), "cpu")
    chosen = cover(subject)
    monkeypatch.setattr(coverage, "PATIENCE", -1.0)  # after the first sample
    found = cover(subject)
    assert found.known == "estimated"
    assert found.samples == pytest.approx(chosen.samples, rel=0.5)
    sources = tuple(
        s.model_copy(update={"limit": None}) for s in subject.job.recipe.calibration.sources
    )
    update = {"sources": sources, "tokens": {}}
    calibration = subject.job.recipe.calibration.model_copy(update=update)
    subject.job.recipe = subject.job.recipe.model_copy(update={"calibration": calibration})
    rows = sum(map(count_rows, sources))
    assert cover(subject).samples == pytest.approx(rows, rel=0.3)
    assert rows > 5 * found.samples


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_has_a_plan(method, tmp_path):
    found = plan.predict(small(f"method={method}"), tmp_path / "run", on="h200")
    compensate, smooth = found["stages"]["compensate"], found["stages"]["smooth"]
    corrected = find(method).corrects or find(method).rounding != "nearest"
    assert (compensate["disk_bytes"] > 0) == (compensate["seconds"] > 0) == bool(corrected)
    assert (smooth["seconds"] > 0 or method in ("rtn", "smoothquant")) and smooth["disk_bytes"] > 0


def test_a_machine_that_nobody_knows_has_the_memory_for_hidden_states(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "resident", lambda: 10**9)
    recipe = small("method=rtn")
    found = plan.predict(recipe, tmp_path / "run", ("calibrate",), on="h200")["stages"]["calibrate"]
    little = small("method=rtn", "resources.max_memory=1MB")
    spilled = plan.predict(little, tmp_path / "run", ("calibrate",), on="h200")["stages"]
    assert spilled["calibrate"]["disk_bytes"] > found["disk_bytes"]
    assert spilled["calibrate"]["peak_bytes"] < found["peak_bytes"]


def test_what_an_interrupted_run_has_written_is_not_asked_of_the_disk_again(tmp_path, monkeypatch):
    recipe = small("method=rtn")
    there = tmp_path / "run" / "calibrate" / "layers" / "000.safetensors"
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = plan.predict(recipe, tmp_path / "run", ("calibrate",))
    needed = found["stages"]["calibrate"]["disk_bytes"]
    assert len(found["problems"]) == 1 and found["written_bytes"] == 0
    there.parent.mkdir(parents=True)
    there.write_bytes(bytes(needed))
    found = plan.predict(recipe, tmp_path / "run", ("calibrate",))
    assert found["problems"] == [] and found["written_bytes"] == needed


def test_a_download_that_was_interrupted_is_planned_from_its_config(tmp_path, monkeypatch):
    config = json.loads((resolve(Model(path="builtin:tiny-omni")) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1-of-2.safetensors").write_bytes(b"")
    monkeypatch.setattr(subjects, "resolve", lambda spec, download: tmp_path)
    recipe = small("method=rtn").model_copy(update={"model": Model(path="an/omni")})
    subject = open_subject(recipe, "cpu")
    assert subject.known_from == "config" and subject.layout.nbytes > 1 << 20
    recipe = recipe.model_copy(update={"model": Model(path=str(tmp_path))})  # is as it is
    with pytest.raises(RecipeError, match=r"model-2-of-2\.safetensors is missing"):
        open_subject(recipe, "cpu")


def test_of_several_ranks_the_first_plans_for_all(tmp_path):
    sets = [x for o in (*small_sets(), "resources.max_memory=20MB") for x in ("--set", o)]
    sets += [x for i in range(4) for x in ("--set", f"calibration.sources.{i}.limit=1")]
    line = ("smooth", "-c", "tiny-omni-w4a8", "--dry-run", "--json", *sets)
    ranks = launch(tmp_path, rank_jobs.command, *line, "--run-dir", str(tmp_path / "run"))
    assert ranks.wait(300) == [3, 3], ranks.said(0)
    found = json.loads(ranks.printed(0))["prediction"]
    assert found["processes"] == 2 and "2 processes of " in found["on"]
    assert len(found["problems"]) == 2 and "by each of the processes" in found["problems"][0]
    assert "error: calibrate needs" in ranks.said(0)
    assert ranks.printed(1) == ranks.said(1) == "" and not (tmp_path / "run").exists()


def test_what_is_quantized_and_what_is_not(planned):
    found = planned[0]
    assert found["matched"]["mlp_in"] == {
        "sites": 4, "linears": ["gate_proj", "up_proj"], "in": 256, "out": [768, 768],
        "weights": 4 * 2 * 256 * 768, "rank": 12, "padded_inputs": 0,
    }  # fmt: skip
    attention = found["matched"]["attn_in"]  # shapes stand beside their linears
    assert attention["linears"] == ["q_proj", "k_proj", "v_proj"]
    assert attention["out"] == [256, 128, 128]
    total = sum(site["weights"] for site in found["matched"].values())
    assert total * 2 == found["size"]["float"]
    left = {row["module"]: row["bytes"] for row in found["ignored"]}
    assert {"model.visual", "model.audio_tower", "lm_head"} <= set(left)
    assert sum(left.values()) + total * 2 == found["size"]["source"]


def test_every_stage_has_a_cost(planned):
    found = planned[0]
    assert list(found["stages"]) == ["calibrate", "smooth", "compensate", "export"]
    for stage in found["stages"].values():
        assert stage["seconds"] > 0 and stage["peak_bytes"] > 1 << 20
        assert stage["peak_gpu_bytes"] == 0
    assert found["problems"] == [] and found["measured"]


def test_what_does_not_fit_is_exit_code_3(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    sets = [x for o in small_sets() for x in ("--set", o)]
    line = ["smooth", "-c", "tiny-omni-w4a8", "--dry-run", "--json", *sets]
    code = app.main([*line, "--set", "resources.max_memory=20MB"])
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert code == 3 and len(document["prediction"]["problems"]) == 3
    assert "error: smooth needs" in err and "0.0 GB may be used" in err
    assert "has 0.0 GB left" in err
    assert list(document["prediction"]["stages"]) == ["calibrate", "smooth"]
    assert not (tmp_path / "runs").exists()
    line = ["run", *line[1:], "--on", "h200", "--set", "resources.max_memory=20MB"]
    assert app.main(line) == 3  # of another machine this limit alone is known
    assert len(json.loads(capsys.readouterr().out)["prediction"]["problems"]) == 4


def small_sets():
    from jobs import SMALL

    return [*SMALL, "method=rtn", "weights.bits=8"]


def test_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sets = [x for o in small_sets() for x in ("--set", o)]
    assert app.main(["run", "-c", "tiny-omni-w4a8", "--dry-run", *sets]) == 0
    out = capsys.readouterr().out
    assert "gate_proj, up_proj" in out and "256 -> 768 + 768" in out and "model.visual" in out
    assert "bits per quantized weight" in out and "text tokens" in out and "in all:" in out
    assert app.main(["run", "-c", "tiny-omni-w4a8", "--on", "h200"]) == 2
    assert "--on is for --dry-run" in capsys.readouterr().err


# Sizes of published models, from their config.json.
QWEN_VL = {
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    "72B": {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064},
}  # fmt: skip


def qwen_vl(folder: Path, size: str) -> Path:
    """config.json of Qwen2.5-VL at a size, without weights."""
    text = QWEN_VL[size]
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
              "out_hidden_size": text["hidden_size"], "patch_size": 14, "window_size": 112,
              "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
    config = {
        **text, "model_type": "qwen2_5_vl", "torch_dtype": "bfloat16",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": vision,
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "rope_theta": 1000000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("size", "weights"), [("7B", 6.525e9)])
def test_a_large_model_from_its_config_alone(tmp_path, size, weights):
    folder = qwen_vl(tmp_path / "model", size)
    recipe = small(
        f"model.path={folder}", "modalities=[text,vision]", "calibration.rows=512",
        "method=smoothquant", "compensation.rank=0.05",
    )  # fmt: skip
    found = plan.predict(recipe, tmp_path / "run", on="h200x8")
    assert found["model"] == {"path": str(folder), "known_from": "config", "dtype": "bfloat16"}
    total = sum(site["weights"] for site in found["matched"].values())
    assert total == pytest.approx(weights, rel=0.002)
    assert found["size"]["float"] == 2 * total
    # 4 bits, one fp32 scale per output channel, no correction with this method.
    assert 4.0 < found["size"]["bits_per_weight"] < 4.05
    assert not found["measured"] and "8 x NVIDIA H200" in found["on"]
    assert all(s["peak_gpu_bytes"] < 141e9 for s in found["stages"].values())
    assert found["coverage"]["known"] == "unknown"


def test_more_cards_are_faster_and_unknown_ones_refused(tmp_path):
    shape = Shape((4096, 4096), (4096, 1), torch.bfloat16)
    taped = Tape()
    taped.calls[Call(torch.ops.aten.mm.default, ((shape, shape), ()))] = 3
    card = elsewhere("h200")
    assert card.seconds(taped) == pytest.approx(3 * 2 * 4096**3 / (989e12 * card.card.share))
    assert elsewhere("h200x8").processes == 8
    for name in ("abacus", "h200x0", "h200x-1", "h200xx", "h200x"):
        with pytest.raises(RecipeError, match=f"no machine is known by the name '{name}'"):
            plan.predict(small(), tmp_path, on=name)


def test_a_runs_processes_share_a_machines_memory_and_its_work(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "Here", lambda *given: Elsewhere(CARDS["h200"], given[-1]))
    monkeypatch.setattr(plan, "resident", lambda: 10**9)
    few = (f"calibration.sources.{i}.limit=1" for i in range(4))
    recipe = small("method=smoothquant", "resources.max_memory=2GB", "device=cpu", *few)
    threads = torch.get_num_threads()
    one, two, apart = (
        plan.predict(recipe, tmp_path, ["smooth", "compensate"], processes=n, machines=machines)
        for n, machines in ((1, 1), (2, 1), (2, 2))
    )
    assert one["problems"] == apart["problems"] == []  # a limit is for one machine
    assert {p[p.index("GB of memory") :] for p in two["problems"]} == {
        "GB of memory, 1.0 GB may be used by each of the processes"
    }
    assert "2 processes of 1 threads" in two["on"] and torch.get_num_threads() == threads
    remote = plan.predict(recipe, tmp_path, ["smooth"], on="h200x8")
    assert "0.2 GB may be used by each" in remote["problems"][0] and remote["processes"] == 8


def test_processes_divide_what_they_share():
    subject = open_subject(small("compensation.rank=0.05"), "cpu")
    tokens = dict.fromkeys(("text", "vision", "audio"), 4000)
    covered = Coverage(tokens, "chosen", 60, ((2, 100),) * 60)

    def planner(processes: int) -> Planner:
        machine = Elsewhere(CARDS["h200"], processes)
        return Planner(subject, covered, machine, 0, 10**12, False)

    one, four = planner(1), planner(4)
    assert four.compensate().seconds == pytest.approx(one.compensate().seconds / 4)
    alone, shared = one.calibrate(), four.calibrate()
    assert alone.seconds / 4 < shared.seconds < alone.seconds
    # Hidden states that one process must put on disk, four may hold: a quarter each.
    held = sum(one._entering())
    assert alone.ram - shared.ram == pytest.approx(0.75 * held, rel=0.01)
    one.limit = four.limit = int((alone.ram - KEPT - held // 2) / (1 - SPARE))
    assert one.calibrate().disk > alone.disk == four.calibrate().disk


def test_machine_memory_is_divided_once(monkeypatch):
    monkeypatch.setattr(plan, "machine_memory", lambda: 800)
    recipe = small("resources.max_memory=null")
    assert [plan._limit(recipe, n) for n in (1, 4)] == [800, 200]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # under torchrun, what is left of it is a share
    assert plan._limit(recipe, 4) == 800


def test_a_group_size_that_does_not_divide_is_said_before_anything(tmp_path):
    with pytest.raises(RecipeError, match="group_size 96 does not divide the 256 inputs"):
        plan.predict(small("weights.group_size=96"), tmp_path)


def test_a_model_on_the_hub_is_not_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", _absent)
    recipe = small("model.path=nobody/nothing")
    assert plan.predict(recipe, tmp_path) is None


def _absent(*_, local_files_only=False, **__):
    assert local_files_only
    raise OSError("not here")


def test_towers_that_do_not_fit_at_once_are_planned_part_by_part():
    """As calibrate reads them: blocks again for every batch, of the word embeddings rows alone."""
    subject = open_subject(small(), "cpu")
    covered = Coverage(dict.fromkeys(("text", "vision", "audio"), 8), "chosen", 2, ((1, 8), (1, 8)))

    def outside(limit: float) -> tuple[int, int]:
        return Planner(subject, covered, elsewhere("h200"), 0, int(limit), False)._outside()

    model = subject.job.float.model
    towers = (*model.model.visual.blocks, *model.model.audio_tower.layers)
    blocks = [sum(p.nbytes for p in block.parameters()) for block in towers]
    whole, read = outside(1e12)
    assert whole == read
    rest = whole - sum(blocks) - model.get_input_embeddings().weight.nbytes
    assert outside(1e6) == (rest + max(blocks), rest + 2 * sum(blocks))
