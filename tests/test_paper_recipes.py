"""Every row of the paper's tables 1-5 is a shipped recipe that says what the row says.

Table 6 counts the cost of a correction while decoding; it is a formula, not a run.
"""

import re

import pytest

from masquant_cli import recipe_yaml

PAPER = [name.removeprefix("paper/") for name in recipe_yaml.shipped() if "/" in name]
VL = ["mmmu", "ocrbench", "vizwiz", "scienceqa", "textvqa"]
OMNI = ["librispeech-test-other", "wenetspeech-test-net", "mmmu", "omnibench"]
ROWS = {
    "table1": {
        "w4a16": {"rtn", "awq", "mbq", "masquant"},
        "w8a8": {"rtn", "smoothquant", "mbq", "masquant"},
        "w4a8": {"rtn", "smoothquant", "mbq", "masquant"},
        "w4a6": {"smoothquant", "mbq", "masquant"},
    },
    "table2": {
        "w4a16": {"rtn", "awq", "mbq", "masquant"},
        **{bits: {"rtn", "smoothquant", "mbq", "masquant"} for bits in ("w8a8", "w4a8", "w4a6")},
    },
}


def paper(name):
    return recipe_yaml.load(f"paper/{name}")


def test_tables_1_and_2_are_complete():
    for table, cells in ROWS.items():
        expected = {f"{table}-{b}-{m}" for b, methods in cells.items() for m in methods}
        assert {n for n in PAPER if n.startswith(table)} == expected


@pytest.mark.parametrize("name", [n for n in PAPER if n.startswith(("table1", "table2"))])
def test_a_row_has_its_bits_method_and_benchmarks(name):
    recipe = paper(name)
    table, weights, activations, method = re.match(r"(table\d)-w(\d)a(\d+)-(.*)", name).groups()
    assert recipe.name == name
    assert recipe.method == method
    assert (recipe.weights.bits, recipe.activations.bits) == (int(weights), int(activations))
    assert recipe.weights.group_size == (128 if activations == "16" else None)
    assert recipe.weights.symmetric == (activations != "16")
    assert [t.benchmark for t in recipe.evaluation.tasks] == (VL if table == "table1" else OMNI)
    assert recipe.smoothing.epochs == 2
    assert recipe.smoothing.learning_rate == 0.05


def test_table_3_is_two_ways_learned_or_not():
    for base in ("vl", "omni"):
        found = {n.removeprefix(f"table3-{base}-"): paper(n) for n in PAPER if base in n}
        assert found["uniform"].method == "smoothquant"
        assert found["uniform-learned"].method == "omniquant-uniform"
        assert found["uniform-learned"].smoothing.learn
        assert found["mas"].method == found["mas-learned"].method == "masquant"
        assert not found["mas"].smoothing.learn
        assert found["mas-learned"].smoothing.learn


def test_table_4_weighs_the_modalities_in_a_layers_output():
    rows = [paper(n).smoothing for n in PAPER if n.startswith("table4")]
    found = {(r.loss_weights["text"], r.loss_weights["vision"]) for r in rows}
    assert found == {(1.0, 1.0), (1.0, 0.5), (1.0, 0.1), (0.5, 1.0)}
    assert {r.objective for r in rows} == {"block"}


def test_table_5_counts_epochs():
    assert {paper(n).smoothing.epochs for n in PAPER if n.startswith("table5")} == {1, 2, 5, 10}
    assert "wikitext2" in [t.benchmark for t in paper("table5-epochs-1").evaluation.tasks]


@pytest.mark.parametrize("name", PAPER)
def test_calibration_reads_no_benchmark_split(name):
    for source in paper(name).calibration.sources:
        assert source.split.startswith("train")
