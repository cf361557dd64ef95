"""compare: one calibration, one set of inputs, one row per recipe or run, nothing done twice."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from jobs import SMALL, small
from safetensors import safe_open

from masquant_cli import compare as module
from masquant_cli import pipeline
from masquant_cli.cli import app, common, render
from masquant_cli.compare import compare
from masquant_cli.entries import Entry, entries
from masquant_cli.errors import ArtifactError, CheckError, RecipeError

QUICK = (*SMALL, "export.verify=false", "evaluation.fidelity_samples=5")
PARTS = (".weight_packed", ".weight_scale", ".smooth_inv", ".lr_a", ".lr_b")
KEYS = {
    "name", "method", "bits", "recipe", "run_dir", "tasks", "sqnr_db", "sqnr_end_db", "kl",
    "flip_rate", "sqnr_db_by_linear", "bits_per_weight", "bytes", "seconds", "peak_bytes",
    "peak_gpu_bytes",
}  # fmt: skip


def narrowed(recipe, samples=3, names=("sum", "transcription")):
    tasks = [t for t in recipe.evaluation.tasks if t.name in names]
    tasks = tuple(t.model_copy(update={"samples": samples}) for t in tasks)
    return recipe.evaluation.model_copy(update={"tasks": tasks})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(entries, their comparison with float, the root of the runs)."""
    root = tmp_path_factory.mktemp("compare")
    chosen = entries(
        ["tiny-omni-w4a8"],
        run_root=root,
        methods=("rtn", "text-scales"),
        overrides=[*QUICK, "smoothing.learn=false"],
    )
    found = compare(chosen, evaluation=narrowed(chosen[0].recipe), with_float=True, run_root=root)
    return chosen, found, root


def test_rows_are_complete_and_in_order(made):
    _chosen, found, _root = made
    rows = found["rows"]
    assert [row["name"] for row in rows] == [
        "float", "tiny-omni-w4a8-rtn", "tiny-omni-w4a8-text-scales",
    ]  # fmt: skip
    assert [(row["method"], row["bits"]) for row in rows] == [
        ("float", ""), ("rtn", "W4A8"), ("text-scales", "W4A8"),
    ]  # fmt: skip
    assert all(set(row) == KEYS for row in rows)
    assert found["metrics"] == {"transcription": "wer", "sum": "accuracy"}
    assert found["modalities"] == ["text", "vision", "audio"]
    for row in rows:
        said = {"value", "ci", "n", "metric", *(["overlap"] if row["run_dir"] else [])}
        assert all(set(t) == said for t in row["tasks"].values())
        assert {t["n"] for t in row["tasks"].values()} == {3}
    assert rows[0]["sqnr_db"] is None and rows[0]["seconds"] is None
    # Text's scales with a correction keep vision and audio, rounding to nearest does not.
    assert rows[2]["sqnr_db"]["vision"] > rows[1]["sqnr_db"]["vision"] + 3
    assert rows[1]["kl"]["vision"] > 0 and rows[1]["kl"]["text"] is None  # no text-only task
    json.dumps(render.plain(found), allow_nan=False)


def test_one_calibration_listed_once_and_no_row_pays_for_it(made):
    chosen, found, root = made
    states = [run["stages"]["calibrate"]["state"] for run in found["runs"].values()]
    assert states == ["done", "cached"]
    folder = root / "tiny-omni-w4a8-rtn/calibrate"
    assert found["calibrations"] == {str(folder): pytest.approx(_seconds(folder))}
    for row, entry in zip(found["rows"][1:], chosen, strict=True):
        stages = [_seconds(entry.run_dir / s) for s in ("smooth", "compensate", "export")]
        assert row["seconds"] == pytest.approx(sum(stages), rel=1e-9)
        assert row["peak_bytes"] > 10**8


def _seconds(folder: Path) -> float:
    return json.loads((folder / "manifest.json").read_text())["seconds"]


def test_bits_per_weight_are_what_lies_on_the_disk(made):
    chosen, found, _ = made
    for row, entry in zip(found["rows"][1:], chosen, strict=True):
        total = weights = 0
        with safe_open(entry.run_dir / "export/model/model.safetensors", "pt") as tensors:
            for key in tensors.keys():
                tensor = tensors.get_tensor(key)
                if key.endswith(PARTS):
                    total += tensor.nbytes
                if key.endswith(".weight_packed"):
                    weights += 2 * tensor.nbytes  # two of 4 bits in a byte
        assert row["bytes"] == total
        assert row["bits_per_weight"] == pytest.approx(8 * total / weights, rel=1e-12)
    plain, corrected = (row["bits_per_weight"] for row in found["rows"][1:])
    assert 4 < plain < corrected < 8
    assert found["rows"][0]["bits_per_weight"] == 16


def test_a_row_is_what_eval_says_of_that_run(made):
    chosen, found, _ = made
    recipe = chosen[1].recipe.model_copy(update={"evaluation": narrowed(chosen[1].recipe)})
    cached = (chosen[1].run_dir / "eval/result.json").read_bytes()
    alone = pipeline.evaluate(recipe, chosen[1].run_dir)
    row = found["rows"][2]
    assert {n: t["value"] for n, t in alone["tasks"].items()} == {
        n: t["value"] for n, t in row["tasks"].items()
    }
    assert alone["sqnr_db"] == row["sqnr_db"] and alone["kl"] == row["kl"]
    (chosen[1].run_dir / "eval/result.json").write_bytes(cached)


def test_finished_rows_need_no_model(made, monkeypatch):
    chosen, found, root = made
    from masquant_cli.models import loading

    def never(*_):
        raise AssertionError("nothing is left to load")

    monkeypatch.setattr(loading, "load_float", never)
    again = compare(chosen, evaluation=narrowed(chosen[0].recipe), with_float=True, run_root=root)
    assert again["rows"] == json.loads(json.dumps(found["rows"]))
    with pytest.raises(AssertionError, match="nothing is left"):  # another sample is another row
        compare(chosen[:1], evaluation=narrowed(chosen[0].recipe, samples=2), run_root=root)


def test_run_directories_are_taken_as_they_are(made):
    chosen, found, root = made
    named = entries([str(entry.run_dir) for entry in chosen], run_root=root)
    assert [entry.finished for entry in named] == [True, True]
    assert [entry.recipe for entry in named] == [entry.recipe for entry in chosen]
    again = compare(named, evaluation=narrowed(chosen[0].recipe))
    assert again["rows"] == json.loads(json.dumps(found["rows"][1:]))
    assert again["runs"] == {}


def test_a_damaged_or_old_result_is_made_again(made, monkeypatch):
    chosen, found, root = made
    scored = []
    honest = module.Judge._score
    monkeypatch.setattr(module.Judge, "_score", lambda *a: scored.append(1) or honest(*a))
    evaluation = narrowed(chosen[0].recipe)
    path = chosen[0].run_dir / "eval/result.json"
    path.write_text(path.read_text()[:100])
    again = compare(chosen, evaluation=evaluation, run_root=root)
    assert scored == [1] and again["rows"][0]["tasks"] == found["rows"][1]["tasks"]
    document = json.loads(path.read_text())
    assert len(document["model_fingerprint"]) == 64
    path.write_text(json.dumps(document | {"compare_fingerprint": "of something else"}))
    compare(chosen, evaluation=evaluation, run_root=root)
    assert scored == [1, 1]


def test_stale_and_unfinished_runs_are_refused(made, tmp_path):
    chosen, _, root = made
    stale = chosen[0].recipe.model_copy(
        update={"activations": chosen[0].recipe.activations.model_copy(update={"bits": 4})}
    )
    with pytest.raises(ArtifactError, match=r"stale: activations\.bits changed: 8 -> 4"):
        compare([dataclasses.replace(chosen[0], recipe=stale, finished=True)])
    (tmp_path / "recipe.json").write_text((chosen[0].run_dir / "recipe.json").read_text())
    with pytest.raises(RecipeError, match="no finished export"):
        compare(entries([str(tmp_path)], run_root=root))
    with pytest.raises(RecipeError, match="not a run directory"):
        entries([str(tmp_path.parent)], run_root=root)


def test_what_does_not_belong_together_is_refused(made):
    chosen, _, root = made
    two = small("modalities=[text, vision]", "evaluation.tasks=[]")
    with pytest.raises(RecipeError, match="modalities text, vision") as error:
        compare([*chosen, Entry("two", two, root / "two")])
    assert error.value.where == "two"
    other = chosen[0].recipe.model_copy(
        update={"model": chosen[0].recipe.model.model_copy(update={"dtype": "bfloat16"})}
    )
    with pytest.raises(RecipeError, match="its model is"):
        compare([*chosen, Entry("other", other, root / "other")])
    with pytest.raises(RecipeError, match="no evaluation tasks"):
        compare([Entry("none", small("evaluation.tasks=[]"), root / "none")])


def test_arguments_name_recipes_and_their_variations(tmp_path):
    found = entries(
        [
            "tiny-omni-w4a8@compensation.rank=0.02,modalities=[text, audio, vision]",
            "tiny-omni-w8a8",
        ],
        run_root=tmp_path,
        methods=("rtn", "masquant"),
        overrides=["seed=3"],
    )
    varied = "tiny-omni-w4a8-compensation.rank-0.02-modalities-_text_audio_vision_"
    assert [entry.name for entry in found] == [
        f"{varied}-rtn", f"{varied}-masquant", "tiny-omni-w8a8-rtn", "tiny-omni-w8a8-masquant",
    ]  # fmt: skip
    assert [entry.run_dir.name for entry in found] == [entry.name for entry in found]
    assert [entry.recipe.seed for entry in found] == [3] * 4
    assert found[0].recipe.compensation.rank == 0.02
    assert found[0].recipe.modalities == ("text", "audio", "vision")
    assert [entry.recipe.method for entry in found] == ["rtn", "masquant"] * 2
    assert [e.name for e in entries(["tiny-omni-w4a8"], run_root=tmp_path)] == ["tiny-omni-w4a8"]


@pytest.mark.parametrize(
    ("arguments", "methods", "message"),
    [
        (["tiny-omni-w4a8", "tiny-omni-w4a8"], (), "two rows are the run"),
        (["tiny-omni-w4a8@"], (), "nothing follows the @"),
        (["tiny-omni-w5a8"], (), "no such recipe"),
        (["tiny-omni-w4a8"], ("best",), "method"),
        (["RUN@seed=1"], (), "a finished run cannot be changed"),
        (["RUN"], ("rtn",), "only recipes can be run with other methods"),
    ],
)
def test_bad_arguments(made, tmp_path, arguments, methods, message):
    run_dir = str(made[0][0].run_dir)
    arguments = [a.replace("RUN", run_dir) for a in arguments]
    with pytest.raises(RecipeError, match=message):
        entries(arguments, run_root=tmp_path, methods=methods)


def test_the_command_prints_scores_damage_and_cost(made, monkeypatch, capsys):
    _, found, root = made
    asked = {}

    def fake(chosen, **options):
        asked.update(options, chosen=chosen)
        return found

    monkeypatch.setattr(module, "compare", fake)
    command = ["compare", "tiny-omni-w4a8", "--methods", "rtn,smoothquant", "--run-root", str(root)]
    assert app.main([*command, "--samples", "7", "--task", "sum", "--float"]) == 0
    assert [e.recipe.method for e in asked["chosen"]] == ["rtn", "smoothquant"]
    assert [(t.name, t.samples) for t in asked["evaluation"].tasks] == [("sum", 7)]
    assert asked["with_float"] is True and asked["run_root"] == root
    out = capsys.readouterr().out
    low, high = found["rows"][1]["tasks"]["sum"]["ci"]
    value = found["rows"][1]["tasks"]["sum"]["value"]
    for cell in (
        "transcription WER", f"{value:.1f}% ({low:.1f}-{high:.1f})", "vision dB", "bits/weight",
        f"{found['rows'][2]['bits_per_weight']:.2f}", "KL nats", "peak memory", "calibrated once",
    ):  # fmt: skip
        assert cell in out, cell
    assert app.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["method"] == "rtn"
    assert app.main(["compare", "tiny-omni-w4a8", "--task", "smu"]) == 2
    assert "no task 'smu'" in capsys.readouterr().err


class Heard:
    """Progress that keeps its warnings."""

    def __init__(self):
        self.warned = []

    def warn(self, text):
        self.warned.append(text)

    def stage(self, *_): ...

    def advance(self, *_, **__): ...

    def note(self, _): ...


def leaking(recipe):
    """An evaluation of rows that the recipe calibrates on."""
    evaluation = narrowed(recipe, samples=10, names=("sum",))
    (task,) = evaluation.tasks
    source = task.source.model_copy(update={"dataset": "builtin:tiny-omni/calibration-sum"})
    return evaluation.model_copy(
        update={"tasks": (task.model_copy(update={"source": source}),), "fidelity_samples": 0}
    )


@pytest.mark.parametrize("place", [0, 1], ids=["own calibration", "a reused one"])
@pytest.mark.parametrize("finished", [False, True])
def test_rows_that_were_calibrated_on_are_refused(made, place, finished):
    chosen, _, root = made
    named = [chosen[place]]
    if finished:
        named = entries([str(chosen[place].run_dir)], run_root=root)
    # A recipe alone would calibrate again in place of the run whose calibration it took over.
    named = named if finished else list(chosen[: place + 1])
    options = {"evaluation": leaking(chosen[0].recipe), "run_root": root}
    with pytest.raises(CheckError, match="of task 'sum' were calibrated on"):
        compare(named, **options)
    for kept in (False, True):  # what was allowed once is not so without being asked for
        heard = Heard()
        found = compare(named, **options, allow_overlap=True, progress=heard)
        task = found["rows"][-1]["tasks"]["sum"]
        assert task["n"] == 10 and task["overlap"] == 10, kept
        flatters = [said for said in heard.warned if "flatters the model" in said]
        assert len(flatters) == len(named) and "10 " in flatters[0]
    with pytest.raises(CheckError, match="10 of 10 rows of task 'sum' were calibrated on"):
        compare(named, **options)


def test_what_is_clean_is_kept_whether_or_not_overlap_is_allowed(made, monkeypatch):
    chosen, _, root = made
    options = {"evaluation": narrowed(chosen[0].recipe, samples=2), "run_root": root}
    options["evaluation"] = options["evaluation"].model_copy(update={"fidelity_samples": 0})
    found = compare(chosen[:1], **options)
    assert [t["overlap"] for t in found["rows"][0]["tasks"].values()] == [0, 0]
    monkeypatch.setattr(module.Judge, "_score", None)
    assert compare(chosen[:1], **options, allow_overlap=True)["rows"] == json.loads(
        json.dumps(found["rows"])
    )


def test_a_calibration_that_is_gone_is_said(made, tmp_path):
    chosen, _, root = made
    moved = tmp_path / "moved"
    shutil.copytree(chosen[1].run_dir, moved)
    (moved / "calibrated_by.json").write_text(json.dumps({"folder": str(tmp_path / "nowhere")}))
    heard = Heard()
    found = compare(
        entries([str(moved)], run_root=root), evaluation=leaking(chosen[0].recipe), progress=heard
    )
    assert [w for w in heard.warned if "calibration is gone" in w and str(moved) in w]
    assert "overlap" not in found["rows"][0]["tasks"]["sum"]
    assert found["calibrations"] == {} and found["rows"][0]["seconds"] > 0


def test_a_reused_calibration_is_listed_once(made, monkeypatch):
    chosen, found, root = made
    monkeypatch.chdir(root)
    named = entries([entry.run_dir.name for entry in chosen], run_root=root)
    again = compare(named, evaluation=narrowed(chosen[0].recipe))
    assert list(again["calibrations"].values()) == list(found["calibrations"].values())
    alone = compare(named[1:], evaluation=narrowed(chosen[0].recipe))
    assert alone["calibrations"] == found["calibrations"]


def test_options_say_what_they_take(capsys):
    for command, said in (
        ("compare", "Only this task, or a benchmark; repeatable."),
        ("run", "Take a finished calibration from this run; repeatable."),
    ):
        assert app.main([command, "--help"]) == 0
        assert said in " ".join(re.sub(r"[│|]", " ", capsys.readouterr().out).split())
    (benchmark,) = common.narrowed(small(), ("textvqa",), 3).evaluation.tasks
    assert benchmark.benchmark == "textvqa"  # which compare takes as eval does
