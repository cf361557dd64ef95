"""Comparing answers, against values worked out by hand."""

import sys

import pytest

from masquant_cli.algo import answers
from masquant_cli.data.benchmarks.options import lettered, listed, right_letter
from masquant_cli.data.transcripts import normaliser
from masquant_cli.errors import EnvironmentProblem, RecipeError


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The two-tone dogs.", "2 tone dogs"),
        ("  An APPLE\n", "apple"),
        ("none", "0"),
        ("Ten", "10"),
        ("dont stop", "don't stop"),
        ("Mike's", "mike 's"),
        ("1,000", "1000"),
        ("3.5.", "3.5"),
        ("12:30 p.m.", "12:30 pm"),
        ("yes/no", "yes no"),
        ("yes / no", "yes no"),
        ("(a) cat!", "cat"),
        ("5-10 -", "510"),  # one mark at a space takes its like everywhere with it
        ("what?", "what"),
        ("", ""),
    ],
)
def test_vqa_normal(text, normal):
    assert answers.vqa_normal(text) == normal


@pytest.mark.parametrize(
    ("same", "accuracy"),
    # k of 10 agree: k annotators see k - 1 others, 10 - k see k
    [(0, 0), (1, 9 / 30), (2, 2 / 10 * 1 / 3 + 8 / 10 * 2 / 3), (3, 3 / 10 * 2 / 3 + 0.7), (4, 1)],
)
def test_vqa_accuracy_leaves_each_annotator_out(same, accuracy):
    given = ["The Dog"] * same + [f"cat {i}" for i in range(10 - same)]
    assert answers.vqa_accuracy("dog.", given) == pytest.approx(accuracy, abs=1e-12)


def test_containment():
    assert answers.contains("It says  STOP here", ["stop"])
    assert not answers.contains("It says sto p", ["stop"])
    assert answers.contains("ＴＯＴＡＬ　１２", ["total 12"])
    assert answers.contains("x\ny", ["nothing", " x y\n"])
    assert not answers.contains("", ["a"])


def test_containment_of_handwritten_mathematics_is_literal_but_for_space():
    assert answers.contains("so x ^ { 2 }\n+ 1", ["x^{2}+1"], literal=True)
    assert not answers.contains("X^{2}+1", ["x^{2}+1"], literal=True)
    assert not answers.contains("x ^ 2", ["x^2"])


def test_characters_of_chinese():
    assert answers.characters("你好，世 界！ＡＢｃ１２。") == "你好世界abc12"
    assert answers.characters("……") == ""


OPTIONS = ["dog", "red", "dark red", "Paris"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(C)", "C"),
        (" D) Paris", "D"),
        ("B. A dog", "B"),
        ("**C**", "C"),
        ("Answer: C", "C"),
        ("The answer is A.", "A"),
        ("I first took (A), it is (D)", "D"),
        ("Not B but C", "C"),
        ("A dog, hence B", "B"),
        ("A dog", "A"),  # the article says nothing, the option's text does
        ("A red thing", "B"),
        ("it is dark red", "C"),
        ("red, or paris", "D"),
        ("E", None),
        ("cats", None),
        ("", None),
    ],
)
def test_the_option_an_answer_settles_on(text, letter):
    assert answers.option_letter(text, OPTIONS) == letter


def test_no_options_no_letter():
    assert answers.option_letter("A", []) is None


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("The answer is 3.14159", ["3.14"], True),
        ("3.146", ["3.14"], False),
        ("x = 1,200", ["1200"], True),
        ("1.2e3", ["1200"], True),
        ("the sum is -5", ["5"], False),
        ("So the result is Paris.", ["paris"], True),
        ("first 7\nthe final answer is 8", ["7"], False),
        ("7 or 8", ["24", "8"], True),
        ("it is b or c", ["b"], True),
        ("it is abc", ["b"], False),  # a single letter stands alone
        ("no idea", ["12"], False),
        ("", ["12"], False),
    ],
)
def test_open_questions(text, expected, right):
    assert answers.open_accuracy(text, expected) is right


def test_options_of_a_row():
    assert listed("['it\\'s', \"B\"]", "options", "row 3") == ["it's", "B"]
    assert listed([1, 2.5], "options", "") == ["1", "2.5"]
    assert listed("", "options", "") == listed("[]", "options", "") == []
    assert lettered(["x", "y"]) == "A. x\nB. y"
    for bad in ("a, b", None, 3, ["x"] * 27):
        with pytest.raises(RecipeError, match="no list of at most 26") as caught:
            listed(bad, "options", "row 3")
        assert caught.value.where == "row 3"


def test_the_right_option_by_index_text_or_letter():
    numbers = ["2", "1", "B"]
    assert right_letter(1, numbers, "") == "B"  # an integer is an index
    assert right_letter("1", numbers, "") == "B"  # a string is a text first
    assert right_letter("0", numbers, "") == "A"
    assert right_letter("B", numbers, "") == "C"
    assert right_letter("B", numbers, "", letter_first=True) == "B"
    for bad in (3, -1, "7", "d", "", "D"):
        with pytest.raises(RecipeError, match="none of the 3 options"):
            right_letter(bad, numbers, "")


def test_whispers_normaliser_and_what_to_do_without_it(monkeypatch):
    english = normaliser("whisper")
    assert english("Mr. Brown, uh, won't pay TWENTY-ONE colours") == (
        "mister brown will not pay 21 colors"
    )
    english_module = "whisper_normalizer.english"
    monkeypatch.setitem(sys.modules, english_module, None)
    normaliser.__globals__["_whisper"].cache_clear()
    with pytest.raises(EnvironmentProblem, match="whisper-normalizer") as caught:
        normaliser("whisper")
    assert "pip install" in caught.value.hint
    assert normaliser("plain")("It's, ok") == "its ok"
