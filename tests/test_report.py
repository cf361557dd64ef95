"""masquant report: numbers from artifacts written by hand, and pages that hold together."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import fake_runs
import pytest
import tiny_models
import torch
from jobs import small

pytest.importorskip("matplotlib")

from masquant_cli import compare, metrics, pipeline
from masquant_cli.cli import render
from masquant_cli.entries import Entry
from masquant_cli.errors import ArtifactError, EnvironmentProblem, RecipeError
from masquant_cli.inspect.checkpoints import folder
from masquant_cli.models.index import INDEX
from masquant_cli.models.loading import load_float
from masquant_cli.models.resolve import resolve
from masquant_cli.models.sites import find_sites
from masquant_cli.pipeline import recipe_of
from masquant_cli.progress import NullProgress
from masquant_cli.recipe import Metric, Model
from masquant_cli.report import comparisons, data, figures, page, ranks, report, sections, style
from masquant_cli.report.gather import gather
from masquant_cli.report.weights import FloatWeights

ROOT = Path(__file__).parents[1]
FIGURES = {
    *("trade-off", "sqnr-per-layer", "site-errors-1", "site-errors-2"),
    *("activation-ranges", "dominance", "effective-rank"),
}
VOID = {"meta", "br", "path", "use", "image", "rect", "circle", "line", "stop"}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A corrected run, and a uniform one that took over its calibration."""
    root = tmp_path_factory.mktemp("runs")
    ours = fake_runs.write(root / "ours", "method=masquant-joint")
    return ours, fake_runs.write(root / "sq", "method=smoothquant", calibrated=ours, rank=False)


@pytest.fixture(scope="module")
def made(two, tmp_path_factory):
    """(what report returned, its folder)."""
    out = tmp_path_factory.mktemp("report")
    return report(two, out, sites=0), out


# What is read


def test_a_run_is_read_as_it_was_written(two):
    ours, uniform = gather(two)
    assert (ours.label, uniform.label) == ("masquant-joint W4A8", "smoothquant W4A8")
    assert ours.missing == ()
    assert ours.layers == [0, 1, 2]
    assert ours.heldout[2, "mlp_out"] == {"text": 18.75, "vision": 15.75, "audio": 12.75}
    assert ours.corrections[1, "attn_in"]["audio"]["effective_rank_whitened"] == 13
    assert ours.absmax[1, "mlp_out"].shape == (3, 9)
    assert ours.absmax[1, "mlp_out"][:, 1:3].tolist() == [[2, 2], [16, 1], [0.5, 0.5]]
    # Three linears share a site: 13 + 10 + 10 above the notes, or 10 alone.
    assert ours.measured[0, "attn_in"]["text"] == pytest.approx(20 + 11)
    assert ours.measured[2, "mlp_out"]["vision"] == pytest.approx(15.75 + 10)


def test_a_reused_calibration_is_found(two, tmp_path):
    uniform = gather(two[1:])[0]  # it lies beside the run
    assert uniform.stages["calibrate"][0] == two[0] / "calibrate"
    moved = tmp_path / "elsewhere" / "sq"
    moved.parent.mkdir()
    subprocess.run(["cp", "-r", str(two[1]), str(moved)], check=True)
    alone = gather([moved])[0]
    assert "calibrate" not in alone.stages and "smooth" in alone.stages
    assert "--reuse" in " ".join(alone.missing)
    assert "calibrate" in gather([moved], reuse=[two[0]])[0].stages


def test_runs_alike_are_told_apart(tmp_path):
    paths = [
        fake_runs.write(tmp_path / "a", "method=masquant", evaluated=False),
        fake_runs.write(tmp_path / "b", "method=masquant", "compensation.rank=0.1"),
        fake_runs.write(tmp_path / "c", "method=masquant", "compensation.rank=0.1"),
        fake_runs.write(tmp_path / "d", "activations.bits=6", "method=masquant", evaluated=False),
    ]
    assert [run.label for run in gather(paths)] == [
        "masquant W4A8 r 0.05",
        "masquant W4A8 r 0.1 (b)",
        "masquant W4A8 r 0.1 (c)",
        "masquant W4A6",
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(until="calibrate"), "Its smooth stage never finished."),
        (dict(evaluated=False), "It has not been evaluated"),
        (dict(rank=False), "It has no low-rank correction"),
        (dict(recipe=False), "It has no recipe.json"),
    ],
)
def test_what_is_missing_is_said(options, sentence, tmp_path):
    run = gather([fake_runs.write(tmp_path / "run", "method=masquant", **options)])[0]
    assert [said for said in run.missing if said.startswith(sentence)], run.missing
    assert len(run.missing) == 1
    assert run.modalities == ("text", "vision", "audio")


def test_stages_and_scores_of_something_else_are_left_out(tmp_path):
    run = fake_runs.write(tmp_path / "run", "method=masquant")
    (run / "export" / "model" / "model.safetensors").write_bytes(b"another")
    changed = gather([run])[0]
    assert "export" not in changed.stages and changed.evaluation is None
    assert "incomplete" in changed.missing[0]

    other = fake_runs.write(tmp_path / "other", "method=masquant")
    result = json.loads((other / "eval" / "result.json").read_text())
    (other / "eval" / "result.json").write_text(json.dumps({**result, "model_fingerprint": "0"}))
    assert gather([other])[0].evaluation is None
    assert "older export" in gather([other])[0].missing[0]
    # What was kept of this very export counts all the same.
    kept = other / "eval" / result["model_fingerprint"][:12]
    kept.mkdir()
    (kept / "result.json").write_text(json.dumps(result))
    assert gather([other])[0].evaluation == result

    stale = fake_runs.write(tmp_path / "stale", "method=masquant")
    manifest = json.loads((stale / "compensate" / "manifest.json").read_text())
    (stale / "compensate" / "manifest.json").write_text(
        json.dumps({**manifest, "upstream": "another"})
    )
    found = gather([stale])[0]
    assert list(found.stages) == ["calibrate", "smooth"]
    assert "older than the stage before it" in found.missing[0]


def test_a_newer_recipe_does_not_speak_for_older_stages(tmp_path):
    run = fake_runs.write(tmp_path / "run", "method=masquant")
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**recipe, "method": "rtn"}))
    found = gather([run])[0]
    assert found.method == "masquant"
    assert "method differ" in " ".join(found.missing)


def test_an_evaluation_alone_is_the_float_row(tmp_path):
    fake_runs.write(tmp_path / "run")
    (tmp_path / "float").mkdir()
    (tmp_path / "run" / "eval").rename(tmp_path / "float" / "eval")
    row = data.comparison(gather([tmp_path / "float"])[0])
    assert row["name"] == "float" and row["tasks"]["picture"]["value"] == 91.5
    assert row["bytes"] is row["bits_per_weight"] is row["seconds"] is None


# What is shown


def test_comparison_rows(two):
    row, uniform = (data.comparison(run) for run in gather(two))
    assert row["bits_per_weight"] == 16 * 2500 / 8000 and uniform["bits_per_weight"] == 4.4
    assert row["seconds"] == 3 * 2.25 and row["peak_bytes"] == 3_000_000_000
    assert (row["method"], row["bits"]) == ("masquant-joint", "W4A8")
    scores, distances = page.tables([row, uniform])
    assert scores["heads"][:3] == ["picture %", "speech WER %", "bits per weight"]
    assert scores["heads"][4] == "time after calibration"
    assert scores["groups"] == [("Tasks", 2), ("Cost", 4)]
    assert scores["rows"][0]["cells"] == [
        ("91.5", False), ("7.2", False), ("5.00", False), ("2.5 kB", False),
        ("6.8 s", False), ("3 GB", False),
    ]  # fmt: skip
    assert scores["rows"][1]["cells"][2:4] == [("4.40", True), ("2.2 kB", True)]
    assert [name for name, _ in distances["groups"]][-1] == "flips"
    assert distances["rows"][0]["cells"][-4:] == [
        ("1.50", False), ("2.5%", False), ("2.5%", False), ("2.5%", False),
    ]  # fmt: skip


@pytest.mark.parametrize("place", [0, 1], ids=["own calibration", "a reused one"])
def test_rows_are_those_of_compare(two, monkeypatch, place):
    run = gather(two)[place]
    recipe = recipe_of(run.path)
    kept = [task for task in recipe.evaluation.tasks if task.name == "picture"]
    spoken = kept[0].model_copy(update={"name": "speech"})
    asked = recipe.evaluation.model_copy(update={"tasks": (*kept, spoken)})
    monkeypatch.setattr(compare.Judge, "_evaluated", lambda *_: run.evaluation)
    judge = compare.Judge(recipe, asked, NullProgress())
    theirs = judge.row(Entry(run.label, recipe, run.path, True), None, {})
    ours = data.comparison(run)
    assert theirs == ours
    assert theirs["seconds"] == 3 * 2.25 and theirs["sqnr_end_db"] is None
    assert list(ours["kl"]) == ["text", "vision", "audio"] == list(theirs["kl"])


def test_every_metric_has_its_unit_best_mark_and_label(two):
    assert set(metrics.METRICS) == set(get_args(Metric))
    first = {metric: {"metric": metric, "value": 20.0, "n": 9} for metric in metrics.METRICS}
    second = {metric: {**task, "value": 30.0} for metric, task in first.items()}
    scored = [
        replace(run, evaluation={"tasks": tasks})
        for run, tasks in zip(gather(two), (first, second), strict=True)
    ]
    table = page.tables(page.rows(scored))[0]
    cells = list(zip(table["heads"], *(row["cells"] for row in table["rows"]), strict=True))[:8]
    low, high = [(("20.0", lower), ("30.0", not lower)) for lower in (True, False)]
    assert cells == [
        ("accuracy %", *high), ("wer WER %", *low), ("cer CER %", *low), ("vqa VQA %", *high),
        ("contains %", *high), ("choice %", *high), ("mmmu %", *high),
        ("perplexity perplexity", *low),
    ]  # fmt: skip
    assert data.points(scored)[1] == {
        "accuracy": "accuracy (%)", "wer": "WER (%)", "cer": "CER (%)",
        "vqa": "VQA accuracy (%)", "contains": "answers contained (%)", "choice": "accuracy (%)",
        "mmmu": "MMMU accuracy (%)", "perplexity": "perplexity",
    }  # fmt: skip
    percents = [metric for metric in metrics.METRICS if render.score(metric, 2.5) == "2.5%"]
    assert set(metrics.METRICS) - set(percents) == {"perplexity"}
    # What another version may have written is shown, and not judged.
    assert metrics.of("anls") == ("anls", None, "", "anls")


@pytest.mark.parametrize(
    ("value", "form", "said"),
    [
        (None, ".1f", "–"),
        (4.3e9, "bytes", "4.3 GB"),
        (59.96, "seconds", "1 min 00 s"),
        (7322, "seconds", "2 h 02 min"),
        (0.0000678, "milli", "0.068"),
        (0.374, "milli", "374"),
    ],
)
def test_numbers_are_written_for_people(value, form, said):
    assert page.number(value, form) == said


def test_layers_sites_and_their_worst(two):
    run = gather(two)[0]
    layers = data.by_layer(run.heldout)
    # Notes of layer 1: 19, 19.25, 19.5, 19.75 for text.
    assert layers["text"] == {0: 20.375, 1: 19.375, 2: 18.375}
    assert layers["audio"][2] == 12.375
    assert data.worst_sites(run.heldout, 2) == [
        ((2, "attn_in"), "audio", 12.0),
        ((2, "attn_out"), "audio", 12.25),
    ]
    # Both kinds of numbers are never mixed.
    assert data.sqnr_source(gather(two)) == "measured"
    assert data.sqnr_source([run, replace(run, evaluation=None)]) == "held-out"


def test_dominance_by_site_kind(two):
    absmax = gather(two)[0].absmax
    # Vision wins the first two channels of every site: of 6, 5, 6 and 9.
    assert data.shares_by_kind(absmax)["attn_out"] == pytest.approx([3 / 5, 2 / 5, 0])
    assert data.shares_by_kind(absmax)["mlp_out"] == pytest.approx([7 / 9, 2 / 9, 0])
    ratios = data.ratios_by_kind(absmax)["attn_out"]
    assert [sorted(set(r.tolist())) for r in ratios] == [[1, 8], [1, 2], [4, 32]]
    site, modality, loss = data.most_misaligned(absmax)
    # Vision at the widest site has alpha 1, 1 and seven times 2: the mean of its inverse squares
    # is 5/12. Text and audio lose most at the narrowest: 8, 8, 1, 1, 1, which makes 0.606.
    assert (site, modality) == ((0, "mlp_out"), 1)
    assert loss == pytest.approx(10 * math.log10(5 / 12))
    # Audio never fired and loses nothing; text has alpha 2, 1 and loses what it loses alone.
    silent = {(3, "mlp_in"): torch.tensor([[1.0, 4.0], [2.0, 4.0], [0.0, 0.0]])}
    site, modality, loss = data.most_misaligned(silent)
    assert (site, modality) == ((3, "mlp_in"), 0)
    assert loss == pytest.approx(10 * math.log10(5 / 8))


def test_sites_are_spread():
    every = [(layer, kind) for layer in range(28) for kind in fake_runs.KINDS]
    assert data.spread(every, 6) == [
        (0, "attn_in"), (5, "attn_out"), (11, "mlp_in"),
        (16, "mlp_out"), (22, "attn_in"), (27, "attn_out"),
    ]  # fmt: skip
    assert sorted(data.spread(every[:4], 6)) == sorted(every[:4])
    assert data.spread(every, 1) == [(14, "attn_in")]
    shown = data.first_middle_last(every)
    assert len(shown) == 12 and {layer for layer, _ in shown} == {0, 14, 27}


def test_effective_ranks_and_families(two, tmp_path):
    run = gather(two)[0]
    assert data.effective_ranks(run, "unwhitened")["mlp_in"]["vision"] == {0: 41, 1: 42, 2: 43}
    more = fake_runs.write(tmp_path / "r", "method=masquant-joint", "compensation.rank=0.02")
    points, units = data.points(gather([*two, more]))
    assert points[0].family == points[2].family != points[1].family
    assert points[0].values["speech"] == (7.25, 5.0, 9.0)
    assert units["picture"] == "accuracy (%)" and units["SQNR audio"] == "dB"


def test_float_is_a_reference_and_not_a_rival(two, tmp_path):
    fake_runs.write(tmp_path / "run", "method=masquant")
    fake_runs.evaluate(tmp_path / "run", ("text", "vision", "audio"), accuracy=99.0)
    (tmp_path / "float").mkdir()
    (tmp_path / "run" / "eval").rename(tmp_path / "float" / "eval")
    fake_runs.evaluate(two[1], ("text", "vision", "audio"), accuracy=71.0)
    try:
        runs = gather([*two, tmp_path / "float"])
        rows = page.rows(runs)
        cells = [row["cells"][0] for row in page.tables(rows)[0]["rows"]]
        assert cells == [("91.5", True), ("71.0", False), ("99.0", False)]
        assert data.references(runs) == {"float": {"picture": 99.0, "speech": 7.25}}
        assert data.sqnr_source(runs[:2]) == "measured"
    finally:
        fake_runs.evaluate(two[1], ("text", "vision", "audio"))


def test_recipes_are_told_by_their_differences():
    mine = {"method": "rtn", "weights": {"bits": 4, "symmetric": True}, "seed": 1}
    other = {"method": "rtn", "weights": {"bits": 8, "symmetric": True}, "device": "cpu", "seed": 1}
    assert page._differences(mine, other) == {"weights": {"bits": 4}, "device": None}
    assert page._differences(mine, mine) is None


# What is drawn


def lines(axes, colour):
    return [line for line in axes.lines if line.get_color() == colour]


def test_sqnr_panels_hold_the_numbers_in_the_modalitys_colour():
    series = {"a": {"text": {0: 20.0, 2: 18.0}, "vision": {0: 9.5}}, "b": {"text": {0: 7.0}}}
    with style.look():
        figure = comparisons.sqnr_per_layer(
            series, ["rtn", "masquant"], ["text", "vision"], narrow=False
        )
    text, vision = figure.axes
    first, second = lines(text, style.MODALITY["text"])
    assert list(first.get_xydata().flat) == [0, 20, 2, 18]
    assert (first.get_marker(), second.get_marker()) == ("x", "o")
    assert lines(vision, style.MODALITY["vision"])[0].get_ydata().tolist() == [9.5]
    assert len(vision.lines) == 1


def test_two_runs_of_a_method_share_its_marker_and_not_its_fill():
    one, other, third = style.run_styles(["masquant", "masquant", "rtn"])
    assert one["marker"] == other["marker"] != third["marker"]
    assert one["linestyle"] == other["linestyle"] != third["linestyle"]
    assert one["fillstyle"] != other["fillstyle"]
    looks = [style.METHOD[m] for m in style.METHOD]
    assert len({marker for marker, _ in looks}) == len(looks)


def test_dominance_bars_add_up():
    with style.look():
        figure = figures.dominance(
            {"attn_in": [0.5, 0.3, 0.2]},
            {"attn_in": [torch.tensor([1.0, 1, 4]), torch.tensor([2.0]), torch.tensor([])]},
            ["text", "vision", "audio"],
            narrow=False,
        )
    bars, alpha = figure.axes
    assert [(p.get_x(), p.get_width()) for p in bars.patches] == [(0, 50), (50, 30), (80, 20)]
    assert [t.get_text() for t in bars.texts] == ["50%", "30%", "20%"]
    median = [line for line in alpha.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in median] == [1.0, 2.0]


def test_ranges_are_sorted_by_the_widest():
    absmax = {(0, "attn_in"): torch.tensor([[1.0, 9.0, 4.0], [5.0, 2.0, 3.0]])}
    with style.look():
        figure = figures.activation_ranges(
            absmax, ["text", "vision"], (0, "attn_in"), [(0, "attn_in")], narrow=True
        )
    text, vision = figure.axes[0].lines
    assert text.get_ydata().tolist() == [9, 1, 4]
    assert vision.get_ydata().tolist() == [2, 5, 3]


def test_names_are_not_formulas():
    with style.look():
        figure = comparisons.sqnr_per_layer(
            {"_a $x_1$ <b>": {"text": {0: 1.0}}}, ["rtn"], ["text"], narrow=True
        )
        text = style.inline(style.svg(style.settled(figure)), "p", 'said "so" & <thus>')
    assert "_a $x_1$ &lt;b&gt;" in text
    assert 'aria-label="said &quot;so&quot; &amp; &lt;thus>"' in text


def test_heat_map_cells_and_frames():
    sqnr = {(0, "attn_in"): {"text": 5.0}, (3, "attn_in"): {"text": 20.0}}
    with style.look():
        figure = figures.site_errors(
            sqnr, ["text"], [((3, "attn_in"), "text")], (5.0, 20.0), narrow=False
        )
    axes = figure.axes[0]
    assert axes.collections[0].get_array().flatten().tolist() == [5, 20]
    assert [t.get_text() for t in axes.texts] == ["5.0", "20.0"]
    assert [p.get_xy() for p in axes.patches] == [(1, 0)]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "3"]


# Rank curves from the float checkpoint


def test_float_weights_come_from_single_shards():
    folder = resolve(Model(path="builtin:tiny-omni"))
    model = load_float(Model(path="builtin:tiny-omni", dtype="float32"), "cpu").model
    site = find_sites(model)[2]["attn_in"]
    wanted = torch.cat([model.get_submodule(name).weight.detach() for name in site.linears])
    assert torch.equal(FloatWeights(folder).read(2, "attn_in"), wanted)


def test_float_weights_of_a_sharded_checkpoint_with_other_names(tmp_path):
    model = tiny_models.qwen2_5_vl()
    model.save_pretrained(tmp_path, max_shard_size="120kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    weights = FloatWeights(tmp_path)
    for layer in find_sites(model):
        for site in layer.sites:
            wanted = torch.cat([model.get_submodule(n).weight.detach() for n in site.linears])
            assert torch.equal(weights.read(layer.layer, site.kind), wanted)
    shard = weights.checkpoint.stored[f"{site.linears[0]}.weight"].file
    shard.write_bytes(b"short")
    with pytest.raises(RecipeError, match="cannot be read"):
        weights.read(layer.layer, site.kind)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a.weight": 1}}'])
def test_a_list_of_shards_that_is_none_is_said(text, tmp_path):
    tiny_models.qwen2_5_vl().save_pretrained(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(RecipeError, match="index of the shards cannot be read") as caught:
        FloatWeights(tmp_path)
    assert caught.value.where == str(tmp_path / INDEX)
    with pytest.raises(RecipeError, match="list of shards cannot be read"):
        folder(tmp_path)


def test_rank_curves_of_a_run(tmp_path, monkeypatch):
    widths = {"attn_in": 256, "mlp_out": 768}
    paths = [
        fake_runs.write(tmp_path / "mbq", "method=mbq", rank=False, widths=widths),
        fake_runs.write(
            tmp_path / "run", "method=masquant", calibrated=tmp_path / "mbq", widths=widths
        ),
    ]
    runs = gather(paths)
    run = ranks.focus(runs)
    assert run.label == "masquant W4A8"
    found = ranks.curves(run, [(0, "attn_in"), (1, "mlp_out")], runs, Quiet())
    one = found[1, "mlp_out"]
    assert set(one.curves) == {"vision", "audio"}
    assert set(one.levels["vision"]) == {ranks.MAS, ranks.UNIFORM, "MBQ"}
    curve = found[0, "attn_in"].curves["vision"].cmc
    assert len(curve) == len(ranks.RATIOS) and curve[-1] > curve[0]
    # mlp_out has 18 rows to learn from: past them nothing changes.
    assert one.curves["audio"].ranks[-1] == 102
    assert one.curves["audio"].cmc[-1] == pytest.approx(one.curves["audio"].cmc[-2], abs=1e-3)
    lines, levels = ranks.averages(found)
    assert lines["vision"]["CMC"][0] == pytest.approx((curve[0] + one.curves["vision"].cmc[0]) / 2)
    assert levels["audio"]["MBQ"] == pytest.approx(
        sum(site.levels["audio"]["MBQ"] for site in found.values()) / 2
    )
    with style.look():
        each = {s: (ranks.RATIOS, c.lines(), c.levels) for s, c in found.items()}
        by_site = comparisons.rank_curves_by_site(each, narrow=True)
        mean = comparisons.rank_curves(ranks.RATIOS, lines, levels, narrow=False)
    assert len([axes for axes in by_site.axes if axes.get_visible()]) == 2
    cmc = lines_of(mean.axes[0], "o")[0]
    assert cmc.get_ydata().tolist() == pytest.approx(lines["vision"]["CMC"])
    assert cmc.get_xdata().tolist() == list(ranks.RATIOS)

    # The base is the run's own, however it was rounded: integers of 0 leave nothing of the signal.
    tensors = type(run).tensors

    def rounded_away(self, stage, *arguments):
        if stage == "compensate":
            return {"attn_in.weight": torch.zeros(512, 256, dtype=torch.int8)}
        return tensors(self, stage, *arguments)

    monkeypatch.setattr(type(run), "tensors", rounded_away)
    nothing = ranks.curves(run, [(0, "attn_in")], runs, Quiet())[0, "attn_in"]
    assert nothing.curves["audio"].cmc[0] == pytest.approx(0, abs=1e-6)
    assert nothing.levels["audio"] == found[0, "attn_in"].levels["audio"]

    monkeypatch.setattr(ranks, "model_fingerprint", lambda *_, **__: "other")
    absent = sections.sections(runs, 1, Quiet())[-1]
    assert isinstance(absent, sections.Absent) and "changed since" in absent.why


def lines_of(axes, marker):
    return [line for line in axes.lines if line.get_marker() == marker]


class Quiet:
    def stage(self, *_): ...

    def advance(self, *_): ...


# The page and its files


class Page(HTMLParser):
    """Checks that tags close, and collects ids, references and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.references, self.tags, self.text = [], [], [], set(), ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone(made):
    found, out = made
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids)) > 50
    inside = {f"#{i}" for i in page.ids}
    foreign = [r for r in page.references if r not in inside and not r.startswith("data:image/png")]
    assert foreign == []
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert "@import" not in text and "@font-face" not in text
    drawn = {f["name"] for f in found["figures"]}
    assert drawn == FIGURES
    assert {f"#{name}" for name in drawn} <= inside


def test_inline_figures_follow_the_theme(made):
    text = (made[1] / "report.html").read_text(encoding="utf-8")
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(svgs) == 2 * len(FIGURES)
    for svg in svgs:
        assert not [colour for colour in style.VARIABLE if colour in svg]
        assert "var(--ink)" in svg and "viewBox" in svg
    for name in style.VARIABLE.values():  # each has a light and a dark value
        assert text.count(f"--{name}: #") >= 2 or name == "video"


def test_the_page_says_where_numbers_are_from(made):
    text = " ".join(Page((made[1] / "report.html").read_text(encoding="utf-8")).text.split())
    assert "Measured on evaluation samples by masquant eval" in text
    assert "layer 2 attn_in for audio 23.0 dB" in text  # 12 + (13 + 10 + 10) / 3
    assert "method: masquant-joint" in text and "torch 2.11.0" in text
    assert "calibrate-01" in text and "1 min 02 s" in text
    assert "It was not asked for (--sites 0)." in text
    assert "1,000 text, 2,000 vision, 3,000 audio tokens" in text
    assert "It has no low-rank correction" in text


def test_every_figure_is_a_file_that_shows_something(made):
    from PIL import Image

    found, out = made
    files = {Path(f).name for figure in found["figures"] for f in figure["files"]}
    assert files == {f"{n}.{e}" for n in FIGURES for e in ("png", "svg")}
    assert files == {p.name for p in (out / "figures").iterdir()}
    for name in FIGURES:
        tree = ElementTree.parse(out / "figures" / f"{name}.svg")
        assert len(list(tree.iter("{http://www.w3.org/2000/svg}text"))) > 5
        image = Image.open(out / "figures" / f"{name}.png").convert("L")
        assert image.width > 1000
        dark = sum(image.histogram()[:128])
        assert dark > 0.002 * image.width * image.height


def test_the_same_runs_give_the_same_bytes_from_the_command_line(made, two):
    found, out = made
    before = {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    (out / "figures" / "rank-curves.png").write_bytes(b"of an earlier report")
    (out / "figures" / "mine.png").write_bytes(b"someone else's")
    paths = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'kernels'}", "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-m", "masquant_cli", "report", *map(str, two), "--json"]
    done = subprocess.run(
        [*command, "--out", str(out), "--sites", "0", "--quiet"],
        capture_output=True, text=True, env={**os.environ, **paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(found))
    (out / "figures" / "mine.png").unlink()
    assert {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()} == before


@pytest.mark.parametrize(
    ("overrides", "options", "absent"),
    [
        ((), dict(until="calibrate"), "No run has finished smoothing"),
        (("modalities=[text]",), dict(rank=False, evaluated=False), "One modality alone"),
    ],
)
def test_a_run_that_lacks_much_still_has_a_report(overrides, options, absent, tmp_path):
    options = {**options, "widths": {"attn_in": 256}}
    run = fake_runs.write(tmp_path / "run", "method=masquant", *overrides, **options)
    found = report([run], tmp_path / "out", formats="none", sites=1)
    assert [part for part in found["missing"] if part["why"].startswith(absent)]
    text = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).text
    assert absent in text
    assert "One evaluated run is one point" in text or "No run has both an export" in text
    assert not (tmp_path / "out" / "figures").exists()


# Errors


def test_errors_say_what_and_where(tmp_path, two):
    with pytest.raises(RecipeError, match="not a run directory"):
        report([tmp_path], tmp_path / "out")
    with pytest.raises(RecipeError, match="not a run directory"):
        report([tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(RecipeError, match="figure format"):
        report(two, tmp_path / "out", formats="gif")
    begun = fake_runs.write(tmp_path / "begun", until="calibrate")
    (begun / "calibrate" / "manifest.json").unlink()
    with pytest.raises(RecipeError, match="nothing to report") as caught:
        report([begun], tmp_path / "out")
    assert str(begun) in caught.value.where and "masquant run" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_damage_is_an_artifact_error(tmp_path):
    run = fake_runs.write(tmp_path / "run", "method=masquant")
    layer = run / "smooth" / "layers" / "001.safetensors"
    layer.write_bytes(b"\xff" * layer.stat().st_size)
    with pytest.raises(ArtifactError) as caught:
        gather([run])
    assert caught.value.where == str(layer)
    (run / "recipe.json").write_text("[")
    with pytest.raises(ArtifactError, match="recipe cannot be read"):
        gather([run])


def test_without_the_extra_the_error_names_it(monkeypatch, tmp_path, two):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name)
    )
    with pytest.raises(EnvironmentProblem, match="matplotlib") as caught:
        report(two, tmp_path)
    assert caught.value.exit_code == 3 and "masquant[report]" in caught.value.hint


def test_what_a_real_runs_stages_read_is_put_together(tmp_path):
    """smooth reads some of `weights` and compensate the rest; neither may hide the other."""
    pipeline.run(small("method=masquant", "smoothing.learn=false"), tmp_path, until="compensate")
    (run,) = gather([tmp_path])
    assert run.bits == "W4A8"
    assert not [said for said in run.missing if "newer" in said]
    assert run.recipe == pipeline.recipe_of(tmp_path).model_dump(mode="json")
