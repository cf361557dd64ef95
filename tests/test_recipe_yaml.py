"""Recipes from YAML: what is accepted, and where every refusal points."""

import pytest

from masquant_cli import recipe_yaml
from masquant_cli.errors import RecipeError
from masquant_cli.yaml_marks import parse, parse_value

BASE = """\
name: small
model: {path: here}
calibration:
  sources:
    - dataset: rows.jsonl
      messages:
        - role: user
          content: [{text: "{question}"}]
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="r.yaml"):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / name).write_bytes(data)
        return name

    return write


def refusal(name, *overrides) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        recipe_yaml.load(name, overrides)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize("name", [n for n in recipe_yaml.shipped() if "/" not in n])
def test_every_shipped_recipe_loads_and_is_what_its_name_says(name):
    recipe = recipe_yaml.load(name)
    family, cell = name.rsplit("-", 1)
    weights, activations = cell[1:].split("a")
    assert recipe.name == name
    assert recipe.weights.bits == int(weights)
    assert recipe.activations.bits == int(activations)
    assert recipe.weights.symmetric == (cell != "w4a16")
    assert recipe.weights.group_size == (128 if cell == "w4a16" else None)
    assert ("audio" in recipe.modalities) == family.endswith("omni")
    for source in recipe.calibration.sources:
        assert source.split.startswith("train") and "test" not in source.dataset


def test_the_recipes_the_product_promises_are_shipped():
    for family in ("tiny-omni", "qwen-omni", "qwen-vl"):
        for cell in ("w4a8", "w8a8", "w4a6", "w4a16"):
            assert f"{family}-{cell}" in recipe_yaml.shipped()


def test_a_minimal_recipe(write):
    recipe = recipe_yaml.load(write(BASE))
    assert recipe.name == "small"
    assert recipe.calibration.sources[0].messages[0].content[0].text == "{question}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-0.5e+3", -500.0),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y"),
        ("true", True), ("False", False), ("~", None), ("null", None), ("", None),
        ("0777", 777), ("0o17", 15), ("0x1F", 31), ("+7", 7), ("1_000", "1_000"),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("'1'", "1"), ('"true"', "true"),
        (".inf", float("inf")), ("-.INF", float("-inf")), ("1.2.3", "1.2.3"), ("e5", "e5"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2_in_files_and_on_the_command_line(text, value):
    in_file = parse(f"key: {text}\n", "f")[0]["key"]
    for got in (in_file, parse_value(text)):
        assert got == value and type(got) is type(value)


def test_command_line_values_beyond_scalars():
    assert parse_value("[1, a, {b: no}]") == [1, "a", {"b": "no"}]
    assert parse_value("Q: {question}") == "Q: {question}"
    assert parse_value(" #1 ") == "#1"


def test_key_like_scalars_stay_keys(write):
    recipe = recipe_yaml.load(
        write(BASE.replace("      messages", "      where: {no: on, 1: 2}\n      messages"))
    )
    assert recipe.calibration.sources[0].where == {"no": "on", "1": 2}


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", "r.yaml:1:1", "empty"),
        ("# nothing\n", "r.yaml:1:1", "empty"),
        ("- a\n", "r.yaml:1:1", "mapping"),
        ("words", "r.yaml:1:1", "mapping"),
        ("a:\n\tb: 1\n", "r.yaml:2:1", "not valid YAML"),
        ("a: 1\nb: [1,\n", "r.yaml:3:1", "not valid YAML"),
        (b"a: 1\nbb: \xff\n", "r.yaml:2:5", "UTF-8"),
        ("a: 1\nb: \x00\n", "r.yaml:2:1", "U+0000"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1", "single document"),
        ("a: &x [*x]\n", "r.yaml:1:4", "alias"),
        ("a: !!python/object:os.system x\n", "r.yaml:1:4", "tag"),
        ("a: !!int two\n", "r.yaml:1:4", "two"),
        ("a:\n  {x: 1}: 2\n", "r.yaml:2:3", "plain word"),
        (BASE + "model: {path: there}\n", "r.yaml:9:1", "given twice, first at r.yaml:2:1"),
        (BASE + "weights:\n  bits: 4\n  bits: 8\n", "r.yaml:11:3", "first at r.yaml:10:3"),
    ],
)
def test_what_is_not_a_recipe_file(write, text, where, what):
    error = refusal(write(text))
    assert error.where == where
    assert what in error.message


def test_tabs_get_a_hint(write):
    assert "spaces" in refusal(write("a:\n\tb: 1\n")).hint


@pytest.mark.parametrize(
    ("text", "where", "what", "hint"),
    [
        ("wieghts: {bits: 4}\n", "r.yaml:9:1", "unknown key `wieghts`", "`weights`"),
        ("weights:\n  bit: 4\n", "r.yaml:10:3", "unknown key `weights.bit`", "`bits`"),
        ("weights: {bits: 5}\n", "r.yaml:9:11", "`weights.bits` is 5, expected 4 or 8", None),
        ("method: masquand\n", "r.yaml:9:1", "`method` is 'masquand'", "`masquant`"),
        ("seed: no\n", "r.yaml:9:1", "`seed` should be a valid integer", None),
        ("smoothing: {beta: 1.5}\n", "r.yaml:9:13", "less than or equal to 1, got 1.5", None),
        ("compensation: {rank: .nan}\n", "r.yaml:9:16", "finite", None),
        ("compensation: {rank: 1.5}\n", "r.yaml:9:16", "rank is 0 (off)", None),
        ("modalities: []\n", "r.yaml:9:1", "`modalities` is empty", None),
        ("modalities: [text, text]\n", "r.yaml:1:1", "listed twice", None),
        ("modalities: [text, imge]\n", "r.yaml:9:20", "`modalities.1` is 'imge'", None),
        ("weights: {bits: 8, symmetric: false}\n", "r.yaml:9:1", "4 bits only", None),
        ("weights:\n", "r.yaml:9:1", "`weights` should be a valid mapping", None),
    ],
)
def test_every_field_error_points_at_its_line(write, text, where, what, hint):
    error = refusal(write(BASE + text))
    assert error.where == where
    assert what in error.message
    assert hint is None or hint in error.hint


@pytest.mark.parametrize("value", ["6 giga", "6", "0", "0.0GB", "-5GB", "GB"])
def test_what_is_not_a_size_of_memory(value):
    with pytest.raises(RecipeError, match=r"is not a size: 6GB and 4\.5GiB are"):
        recipe_yaml.load("tiny-omni-w4a8", [f"resources.max_memory={value}"])


def test_all_problems_are_reported_at_once(write):
    error = refusal(
        write("nam: x\ncalibration:\n  tokens: {txt: 5}\n  sources:\n    - dataset: 7\n")
    )
    lines = error.message.splitlines()
    assert lines[0] == "the recipe has 6 problems"
    assert [line.split(": ")[0] for line in lines[1:]] == [
        "r.yaml:1:1",  # name is missing
        "r.yaml:1:1",  # model is missing
        "r.yaml:5:7",  # dataset is a number
        "r.yaml:5:7",  # messages is missing
        "r.yaml:3:12",  # txt
        "r.yaml:1:1",  # nam
    ]
    assert "put it in quotes" in lines[3] and "did you mean `text`?" in lines[5]


def test_an_unquoted_template_is_recognised(write):
    error = refusal(write(BASE.replace('"{question}"', "{question}")))
    assert error.where == "r.yaml:8:22"
    assert error.hint == 'quote a template: "{column}"'


def test_set_changes_values_of_every_kind(write):
    recipe = recipe_yaml.load(
        write(BASE),
        [
            "smoothing.learning_rate=1e-4",
            "calibration.sources.0.limit=8",
            "calibration.sources.0.where={lang: no}",
            "calibration.sources.0.where.year=1999",
            "calibration.tokens.text=64",
            "modalities=[text, vision]",
            "model.revision=",
            "model.path=a=b",
        ],
    )
    assert recipe.smoothing.learning_rate == 1e-4
    assert recipe.calibration.sources[0].limit == 8
    assert recipe.calibration.sources[0].where == {"lang": "no", "year": 1999}
    assert recipe.calibration.tokens == {"text": 64}
    assert recipe.modalities == ("text", "vision")
    assert recipe.model.revision is None
    assert recipe.model.path == "a=b"


@pytest.mark.parametrize(
    ("override", "where", "what", "hint"),
    [
        ("weigths.bits=8", "--set weigths.bits", "unknown key `weigths`", "`weights`"),
        ("weights.bit=8", "--set weights.bit", "unknown key `weights.bit`", "`bits`"),
        ("weights.bits=5", "--set weights.bits", "expected 4 or 8", None),
        ("weights.bits", "--set weights.bits", "key=value", "weights.bits=8"),
        (".bits=8", "--set .bits=8", "key=value", None),
        ("model.path.x=1", "--set model.path.x", "is a value", None),
        ("calibration.sources.1.limit=8", "--set calibration.sources.1.limit", "0 to 0", None),
        ("calibration.sources.-1.limit=8", "--set calibration.sources.-1.limit", "'-1'", None),
        ("calibration.sources.0.limt=8", "--set calibration.sources.0.limt", "limt", "`limit`"),
        ("evaluation.tasks.0.samples=3", "--set evaluation.tasks.0.samples", "no entries", None),
        ("modalities=[text", "--set modalities", "not valid YAML", None),
        ("weights={bits: 5}", "--set weights", "expected 4 or 8", None),
    ],
)
def test_set_is_refused_where_it_was_given(write, override, where, what, hint):
    error = refusal(write(BASE), override)
    assert error.where == where
    assert what in error.message
    assert hint is None or hint in error.hint


def test_extends_merges_mappings_and_replaces_lists(write):
    write(BASE + "weights: {bits: 4, group_size: 64}\nmodalities: [text, vision]\n", "base.yaml")
    recipe = recipe_yaml.load(
        write("extends: base\nname: top\nweights: {bits: 8}\nmodalities: [text]\n", "top.yaml")
    )
    assert (recipe.name, recipe.weights.bits, recipe.weights.group_size) == ("top", 8, 64)
    assert recipe.modalities == ("text",)


def test_errors_under_extends_point_into_the_right_file(write):
    write(BASE + "weights:\n  bits: 5\nmodalities: [text, sound]\n", "base.yaml")
    lines = refusal(write("extends: base\nname: x\nseed: a\n", "top.yaml")).message.splitlines()
    assert [line.split(": ")[0] for line in lines[1:]] == [
        "top.yaml:3:1", "base.yaml:11:20", "base.yaml:10:3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("extends: top\nname: x\n", "leads back"),
        ("extends: nowhere\nname: x\n", "no such recipe"),
        ("extends: [a]\nname: x\n", "names one recipe"),
        ("extends: tiny-omni-w4a8\n", "its own `name`"),
    ],
)
def test_extends_is_refused_at_its_line(write, text, what):
    error = refusal(write(text, "top.yaml"))
    assert error.where == "top.yaml:1:1"
    assert what in error.message


def test_find_prefers_a_path_and_adds_the_suffix(write, tmp_path):
    shipped = recipe_yaml.shipped()["tiny-omni-w4a8"]
    assert recipe_yaml.find("tiny-omni-w4a8") == shipped
    assert recipe_yaml.find("tiny-omni-w4a8.yaml") == shipped
    (tmp_path / "tiny-omni-w4a8").mkdir()  # a folder does not hide a recipe
    assert recipe_yaml.find("tiny-omni-w4a8") == shipped
    write("name: mine\n", "tiny-omni-w4a8.yaml")
    assert str(recipe_yaml.find("tiny-omni-w4a8")) == "tiny-omni-w4a8.yaml"


def test_find_refuses_folders_and_suggests_names(tmp_path):
    with pytest.raises(RecipeError, match="folder"):
        recipe_yaml.find(str(tmp_path))
    with pytest.raises(RecipeError) as caught:
        recipe_yaml.find("tiny-omni-w4a9")
    assert "tiny-omni-w4a8" in caught.value.hint
    assert caught.value.where == "tiny-omni-w4a9"
