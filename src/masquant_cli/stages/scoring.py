"""Metrics: what a task's row expects, how good one answer is, and a task's value and interval.

An answer's score is a pair (points, out of). A task's value is 100 sum(points) / sum(out of),
so WER and CER are of the whole corpus and the others plain means. Start at `result`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from masquant_cli.algo import answers, metrics
from masquant_cli.data.benchmarks.options import listed, right_letter
from masquant_cli.data.text import columns_in, fill, normalise
from masquant_cli.data.transcripts import normaliser
from masquant_cli.errors import RecipeError
from masquant_cli.recipe import Task

Pair = tuple[float, float]  # (points, out of)


def columns_of(task: Task) -> list[str]:
    """The columns that a task's metric reads."""
    named = columns_in(task.answer, f"task {task.name}") if task.answer is not None else []
    return [*named, *([task.options] if task.options is not None else [])]


def reference(task: Task, row: dict, where: str) -> Any:
    """What the row expects, json-able: a text; for vqa and contains a list of texts (contains:
    with whether the comparison is literal); for choice and mmmu {"options", "letter"} or
    {"answers"}. Raises RecipeError when the row cannot be scored."""
    if task.metric in ("vqa", "contains"):
        return _several(task, row, where)
    if task.metric in ("choice", "mmmu"):
        return _option(task, row, where)
    text = fill(task.answer, row, where).strip()
    normal = {"cer": answers.characters, "wer": normaliser(task.normaliser)}
    bare = normal.get(task.metric, normalise)(text)
    # Whisper's leaves nothing of "uh": such a transcript has no words, and that is fine.
    if not bare and (task.normaliser == "plain" or not text):
        raise _empty(task, where)
    return text


def expected_text(reference: Any) -> str:
    """One text for a reference: for people, and to teacher-force."""
    if isinstance(reference, str):
        return reference
    if "letter" in reference:
        return reference["letter"]
    # The most frequent answer, the first of equals.
    return Counter(reference["answers"]).most_common(1)[0][0]


def score(task: Task, reference: Any, prediction: str) -> Pair:
    """(points, out of) of one answer; of a rate of errors, (errors, length)."""
    if task.metric in ("wer", "cer"):
        return _edits(task, reference, prediction)
    if task.metric == "accuracy":
        return float(normalise(prediction) == normalise(reference)), 1.0
    if task.metric == "vqa":
        return answers.vqa_accuracy(prediction, reference["answers"]), 1.0
    if task.metric == "contains":
        known, literal = reference["answers"], reference["literal"]
        return float(answers.contains(prediction, known, literal=literal)), 1.0
    if "letter" in reference:
        chosen = answers.option_letter(prediction, reference["options"])
        return float(chosen == reference["letter"]), 1.0
    return float(answers.open_accuracy(prediction, reference["answers"])), 1.0


def result(task: Task, pairs: Sequence[Pair], *, seed: int) -> dict:
    """{value, n, ci: [lo, hi], ci_method} in percent. Scores that are all 0 or 1 get Wilson's
    interval, others a bootstrap over samples. Raises RecipeError without anything to count."""
    n = len(pairs)
    points, out_of = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True)
    )
    if not out_of.sum():
        raise RecipeError(
            f"task {task.name!r}: no expected answer has a word to count",
            hint="check the task's `answer` template",
        )
    value = float(points.sum() / out_of.sum())
    if task.metric in ("accuracy", "contains", "choice", "mmmu"):
        low, high = metrics.wilson(round(float(points.sum())), n)
        method = "wilson"
    else:
        low, high = metrics.bootstrap_ratio(points, out_of, seed=seed)
        method = "bootstrap"
    return {"value": 100 * value, "n": n, "ci": [100 * low, 100 * high], "ci_method": method}


def perplexity(task: Task, pairs: Sequence[Pair], *, seed: int) -> dict:
    """{value, n, ci, ci_method, tokens} of exp(sum(nats) / sum(tokens)); pairs are (nats,
    tokens)."""
    nats, tokens = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True)
    )
    if not tokens.sum():
        raise RecipeError(
            f"task {task.name!r} has no text token to score",
            hint="add an assistant message, or text",
        )
    ends = metrics.bootstrap_ratio(nats, tokens, seed=seed)
    value, low, high = (_exp(x) for x in (float(nats.sum() / tokens.sum()), *ends))
    found = {"value": value, "n": len(pairs), "ci": [low, high], "ci_method": "bootstrap"}
    return {**found, "tokens": int(tokens.sum())}


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))


def _several(task: Task, row: dict, where: str) -> dict:
    """A list of answers, if the template is one column that holds a list, else its text."""
    found = _raw(task, row, where)
    if not isinstance(found, list | tuple):
        found = [found]
    # VQAv2 keeps every annotator's answer in a struct.
    found = [str(item.get("answer") if isinstance(item, dict) else item) for item in found]
    if task.metric == "contains":
        found = [answer for answer in found if answer.strip()]
        if not found:
            raise _empty(task, where)
        return {"answers": found, "literal": bool(row.get("handwritten_mathematics", False))}
    if len(found) < 4:  # three others have to agree with an answer
        raise RecipeError(
            f"task {task.name!r}: VQA accuracy needs at least 4 annotators' answers, "
            f"this row has {len(found)}",
            where=where,
            hint="`answer` names a column of lists; with one answer use metric accuracy",
        )
    return {"answers": found}


def _option(task: Task, row: dict, where: str) -> dict:
    options = listed(row[task.options], task.options, where)
    raw, letter_first = _raw(task, row, where), task.metric == "mmmu"
    if task.metric == "choice" or options:
        letter = right_letter(raw, options, where, letter_first=letter_first)
        return {"options": options, "letter": letter}
    text = str(raw).strip()
    # MMMU writes several right answers as the text of a list.
    several = listed(text, "answer", where) if text.startswith("[") else [text]
    if not all(answer.strip() for answer in several) or not several:
        raise _empty(task, where)
    return {"answers": several}


def _raw(task: Task, row: dict, where: str) -> Any:
    """The value of the one column that the `answer` template is, else the template's text."""
    columns = columns_in(task.answer, where)
    if len(columns) == 1 and task.answer.strip() == f"{{{columns[0]}}}":
        value = row.get(columns[0])
        if value is not None:
            return value
    return fill(task.answer, row, where)


def _edits(task: Task, expected: str, said: str) -> Pair:
    """(substitutions + deletions + insertions, length of the expected), of words or characters."""
    import jiwer

    if task.metric == "cer":
        expected, said = answers.characters(expected), answers.characters(said)
        count, lengths = jiwer.process_characters, (len(expected), len(said))
    else:
        normal = normaliser(task.normaliser)
        expected, said = normal(expected), normal(said)
        count, lengths = jiwer.process_words, (len(expected.split()), len(said.split()))
    if not lengths[0]:  # jiwer wants something to compare with
        return float(lengths[1]), 0.0
    found = count(expected, said)
    return float(found.substitutions + found.deletions + found.insertions), float(lengths[0])


def _empty(task: Task, where: str) -> RecipeError:
    return RecipeError(
        f"task {task.name!r}: the expected answer is empty",
        where=where,
        hint="check the task's `answer` template, or leave such rows out with `where`",
    )
