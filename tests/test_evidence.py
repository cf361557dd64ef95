"""make evidence: layers are what they promise, documents say what was measured, nothing twice."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from masquant_cli import recipe_yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from evidence import document, layers, measure, ordering, plan, run, synthetic  # noqa: E402


@pytest.mark.parametrize("name", synthetic.ALPHAS)
def test_alpha_is_as_promised(name):
    layer = synthetic.make(name, "well", seed=1)
    for modality, (low, high, share) in synthetic.ALPHAS[name].items():
        alpha = layer.ranges[modality] / layer.ranges["text"]
        apart = alpha[(alpha - 1).abs() > 1e-4] if share < 1 else alpha
        assert len(apart) == round(share * synthetic.IN)
        assert apart.min() == pytest.approx(low, rel=1e-4)
        assert apart.max() == pytest.approx(high, rel=1e-4)
        # What a calibration would see: standard deviations to 5 sigma, ranges roughly.
        seen = layer.tokens[modality].std(0) / layer.tokens["text"].std(0)
        assert torch.allclose(seen / alpha, torch.ones(synthetic.IN), atol=5 * 4096**-0.5)
        ranges = layer.tokens[modality].abs().amax(0) / layer.tokens["text"].abs().amax(0)
        assert (0.5 * alpha < ranges).all() and (ranges < 2 * alpha).all()
    orders = [layer.ranges[m] / layer.ranges["text"] for m in ("vision", "audio")]
    if name != "aligned":  # directions of their own
        assert orders[0].argmax() != orders[1].argmax()


def test_conditioning_is_as_promised():
    spread = {}
    for name in synthetic.CONDITIONINGS:
        layer = synthetic.make("mild", name)
        counts = {m: len(x) for m, x in layer.tokens.items()}
        assert counts == synthetic.CONDITIONINGS[name][1]
        factor = layer.factors["audio"].double()
        correlation = factor @ factor.T
        assert torch.allclose(correlation.diagonal(), torch.ones(synthetic.IN).double())
        values = torch.linalg.eigvalsh(correlation)
        spread[name] = float(values[-1] / values[0])
        held = layer.fresh["audio"] / layer.ranges["audio"]
        assert torch.allclose(held.T @ held / len(held), correlation.float(), atol=0.2)
    assert spread["well"] == 1 and spread["ill"] > 1e4
    assert len(layer.tokens["audio"]) < synthetic.IN  # its Gram is singular
    assert not torch.equal(layer.factors["text"], layer.factors["vision"])


def test_layers_repeat_and_fresh_tokens_are_fresh():
    one, two, other = (synthetic.make("wide", "ill", seed) for seed in (0, 0, 1))
    assert torch.equal(one.tokens["vision"], two.tokens["vision"])
    assert not torch.equal(one.weight, other.weight)
    assert not torch.equal(one.fresh["audio"][:192], one.tokens["audio"])
    # The weight is the same in every cell, so that cells differ in their inputs alone.
    assert torch.equal(one.weight, synthetic.make("mild", "well").weight)


def test_theorem_1_by_hand():
    assert synthetic.theorem1_loss_db(torch.full((7,), 16.0)) == pytest.approx(0, abs=1e-9)
    # d max(1/a^2) / sum(1/a^2) = 2 * 1 / (1 + 1/4) = 1.6
    assert synthetic.theorem1_loss_db(torch.tensor([1.0, 2.0])) == pytest.approx(2.0412, abs=1e-4)


def test_methods_on_a_layer_are_the_products():
    layer = synthetic.make("wide", "ill")
    recipe = plan.recipe_of("W8A8", "wide-ill", plan.METHODS["rtn"])
    statistics = layers.statistics_of(layer, recipe.calibration.rows, recipe.seed)
    found = {
        label: layers.measure(plan.recipe_of("W8A8", "", plan.METHODS[label]), layer, statistics)
        for label in ("rtn", "smoothquant", "smoothquant+gptq", "text-scales+cmc")
    }
    x, w = layer.fresh["audio"], layer.weight

    def rounded(t):
        step = t.abs().amax(1, keepdim=True) / 127
        return (t / step).round() * step

    noise = (rounded(x) @ rounded(w).T - x @ w.T).square().sum()
    by_hand = 10 * torch.log10((x @ w.T).square().sum() / noise)
    assert found["rtn"]["sqnr_db"]["audio"] == pytest.approx(float(by_hand), abs=0.01)
    # Vision's ranges cost text what its own scales do not, about as Theorem 1 says.
    lost = found["text-scales+cmc"]["sqnr_db"]["text"] - found["smoothquant"]["sqnr_db"]["text"]
    theory = synthetic.theorem1_loss_db(layer.ranges["vision"] / layer.ranges["text"])
    assert lost == pytest.approx(theory, abs=3)
    plain, gptq = (found[f"smoothquant{x}"]["sqnr_db"] for x in ("", "+gptq"))
    assert gptq["text"] > plain["text"] + 1


# Documents from fixtures: two methods, one model, and what is said of them.


def row(sqnr, sum_=90.0, wer=2.0):
    tasks = {
        "transcription": {"value": wer, "ci": [wer - 1, wer + 1], "n": 9, "metric": "wer"},
        "sum": {"value": sum_, "ci": [sum_ - 2, sum_ + 1], "n": 9, "metric": "accuracy"},
    }
    by = sqnr and dict(zip(("text", "vision", "audio"), sqnr, strict=True))
    return {
        "tasks": tasks, "sqnr_db": by, "kl": by and {"text": None, "vision": 0.5, "audio": 0.25},
        "flip_rate": by and {"text": None, "vision": 0.125, "audio": 0.01}, "bits_per_weight": 4.5,
        "bytes": 10, "seconds": 1.25,
    }  # fmt: skip


def measured(cell, **content) -> dict:
    about = {"fingerprint": cell.id, "date": "2026-01-02T03:04:05+00:00", "cpu_seconds": 30.0}
    return {"cell": dataclasses.asdict(cell), **about, "versions": {"torch": "2.x"}, **content}


def cell_of(label, bits="W4A8"):
    return next(
        c for c in plan.cells() if (c.table, c.where, c.bits) == ("methods", "planted", bits)
        and c.label == label
    )  # fmt: skip


def test_the_document_says_what_the_files_say(tmp_path):
    rtn, ours = cell_of("rtn"), cell_of("masquant-joint")
    whole = row(None, 97.0, 1.0)
    documents = {
        rtn.id: measured(rtn, row=row((20, 5.04, 18), 89.0, 4.5), float=whole),
        ours.id: measured(ours, row=row((19, 28, 26), 97.0)),
    }
    for name, content in documents.items():
        path = tmp_path / "results" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    target = tmp_path / "evidence.md"
    target.write_text(f"before\n{document.BEGIN}\nremnant\n{document.END}\nafter\n")
    document.write(plan.cells(), tmp_path / "results", target)
    text = target.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "remnant" not in text
    assert f"2 of {len(plan.cells())} cells measured" in text and "1 minutes of one core" in text
    start = text.index("### tiny-omni W4A8")
    assert text[start:].splitlines()[2:7] == [
        "| method | transcription WER | sum | text dB | vision dB | audio dB | worst KL | "
        "worst flips | bits/weight | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| float | 1.0 (0.0-2.0) | 97.0 (95.0-98.0) |  |  |  |  |  | 4.50 | 1.2 |",
        "| rtn | 4.5 (3.5-5.5) | 89.0 (87.0-90.0) | 20.0 | 5.0 | 18.0 | 0.5000 | 12.50% | 4.50 "
        "| 1.2 |",
        "| masquant-joint | 2.0 (1.0-3.0) | 97.0 (95.0-98.0) | 19.0 | 28.0 | 26.0 | 0.5000 | "
        "12.50% | 4.50 | 1.2 |",
    ]
    assert "| rtn | transcription, sum |" in text and "| masquant-joint | none |" in text
    with pytest.raises(ValueError, match="lacks"):
        target.write_text("no markers")
        document.write(plan.cells(), tmp_path / "results", target)


def test_without_a_measurement_it_says_so():
    assert document.markdown(plan.cells(), {}).startswith("Nothing is measured yet")


def test_verdicts_follow_the_numbers():
    claim = ordering.CLAIMS[0]
    weak = {
        "smoothquant": {"text": 7.0, "vision": 20.0},
        "text-scales": {"text": 19.0, "vision": 9.0},
    }
    turned = {"smoothquant": weak["text-scales"], "text-scales": weak["smoothquant"]}
    (one,) = ordering.verdicts(claim, {"planted W4A8": weak})
    assert one.holds and (one.left, one.right) == (19.0, 7.0)
    (one,) = ordering.verdicts(claim, {"planted W4A8": turned})
    assert not one.holds
    tie = {**weak, "smoothquant": {"text": 18.75, "vision": 1.0}}
    assert not ordering.verdicts(claim, {"x": tie})[0].holds  # a tie holds for nobody
    assert ordering.verdicts(claim, {"x": {"smoothquant": weak["smoothquant"]}}) == []
    both = ordering.verdicts(claim, {"planted W4A8": weak, "unplanted W4A8": turned})
    assert ordering.sentence(claim, both).splitlines() == [
        f"- **{claim.title}**: holds in 1 of 2 places.",
        "  <details><summary>In dB, text under its own scales against text under SmoothQuant's"
        "</summary>",
        "",
        "  - holds: planted W4A8 19.0 against 7.0.",
        "  - does not: unplanted W4A8 7.0 against 19.0.",
        "",
        "  </details>",
    ]
    assert "holds in all 1" in ordering.sentence(claim, both[:1])
    assert "does not hold in any of 1" in ordering.sentence(claim, both[1:])
    assert ordering.sentence(claim, []).endswith("not measured.")


@pytest.mark.parametrize("claim", [*ordering.CLAIMS, ordering.WHITENING], ids=lambda c: c.title)
def test_every_claim_flips_when_its_numbers_do(claim):
    labels = {*plan.METHODS, ordering.OWN, "whitened", "not whitened"}
    base = {label: {"text": 10.0, "vision": 10.0, "audio": 10.0} for label in labels}
    assert not ordering.verdicts(claim, {"x": base})[0].holds
    seen = set()
    for label in labels:
        better = base | {label: {"text": 12.0, "vision": 12.0, "audio": 12.0}}
        if ordering.verdicts(claim, {"x": better})[0].holds:
            seen.add(label)
            worse = base | {label: {"text": 8.0, "vision": 8.0, "audio": 8.0}}
            assert not ordering.verdicts(claim, {"x": worse})[0].holds
    assert len(seen) == 1


def test_the_plan_has_every_method_at_every_width_on_both_models():
    found = plan.cells()
    assert len({cell.id for cell in found}) == len(found)
    main = {(c.where, c.bits, c.label) for c in found if c.table == "methods"}
    assert main == {(m, b, x) for m in plan.MODELS for b in plan.BITS for x in plan.METHODS}
    methods = {cell.recipe().method for cell in found if cell.kind == "model"}
    assert methods == set(recipe_yaml.Recipe.model_fields["method"].annotation.__args__)
    quick = plan.cells(quick=True)
    assert {c.label for c in quick if c.kind == "model"} == set(plan.METHODS)
    # Only what a cell says differs from the shipped recipe.
    cell = next(c for c in found if c.label == "masquant, quantized target")
    assert cell.recipe().compensation.target == "quantized" and cell.recipe().weights.bits == 4


def test_a_finished_cell_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    cell, other = cell_of("rtn"), cell_of("awq")
    counted = []
    monkeypatch.setattr(
        measure, "_run", lambda c, keep: counted.append(c.id) or {"row": row((1, 2, 3))}
    )
    assert run.to_do([cell, other]) == [cell, other]
    measure.measure(cell)
    assert run.to_do([cell, other]) == [other] and counted == [cell.id]
    path = measure.result_file(cell)
    whole = path.read_text()
    path.write_text(whole[:40])  # not ours to trust
    assert measure.finished(cell) is None
    path.write_text(whole)
    assert measure.finished(cell)["row"]["sqnr_db"] == {"text": 1, "vision": 2, "audio": 3}
    changed = dataclasses.replace(cell, sets=(*cell.sets, "seed=1"))
    assert measure.finished(changed) is None
    monkeypatch.setattr(measure, "code_fingerprint", lambda: "other code")
    assert measure.finished(cell) is None


def test_a_cell_that_fails_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)

    def fail(*_):
        raise RuntimeError("half way")

    monkeypatch.setattr(measure, "_run", fail)
    names, _, error = run._measure([cell_of("rtn")])
    assert names == ["planted/w4a8/rtn"] and "half way" in error
    assert not list(tmp_path.rglob("*"))


def test_comments_are_not_code():
    text = 'def f(x):\n    """Said."""\n    # why\n    return x\n'
    assert measure.bare(text) == measure.bare('def f(x):\n    "other"\n    return x\n')
    assert measure.bare(text) != measure.bare('def f(x):\n    """Said."""\n    return -x\n')


def test_a_switch_at_its_default_is_the_methods_row(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "_run", lambda c, keep: {"row": row((1, 2, 3))})
    main = cell_of("masquant")
    same = [
        cell
        for cell in plan.cells()
        if cell.table not in ("methods", "layers")
        and measure.cell_fingerprint(cell) == measure.cell_fingerprint(main)
    ]
    assert {cell.label for cell in same} == {
        "masquant, linear", "masquant, float target", "masquant, whitened, rank ratio 0.05",
    }  # fmt: skip
    measure.measure(main, also=same)
    assert run.to_do([main, *same]) == []
    assert measure.finished(same[0])["cell"]["label"] == same[0].label
