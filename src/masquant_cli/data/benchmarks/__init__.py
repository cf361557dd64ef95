"""How a benchmark's raw rows become columns for templates: `reading_of(task)`.

Most tasks need none of this. benchmarks.py, next to recipe.py, has the names and prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass

from masquant_cli.data.benchmarks import mmmu, options, scienceqa, vqa
from masquant_cli.recipe import Task


@dataclass(frozen=True)
class Reading:
    """What stands between a row and its messages."""

    reads: tuple[str, ...] = ()  # raw columns that `derive` needs
    makes: tuple[str, ...] = ()  # columns it adds or replaces
    derive: Callable[[dict, str], dict] = lambda row, where: {}  # (row, where) -> new columns
    interleave: Callable[[list, dict, str | None, str], list] | None = None  # images into text
    kinds: tuple[str, ...] = ()  # media that only `interleave` brings


_READINGS = {
    "textvqa": Reading(("question",), ("asked",), vqa.derive),
    "vizwiz": Reading(("question",), ("asked",), vqa.derive),
    "scienceqa": Reading(("hint", "image"), ("context", "image"), scienceqa.derive),
    "scienceqa-full": Reading(("hint", "image"), ("context", "image"), scienceqa.derive),
    "ocrbench": Reading(("dataset",), ("handwritten_mathematics",), vqa.of_ocrbench),
    "mmmu": Reading(
        ("question_type",),
        ("choices", "instruction"),
        mmmu.derive,
        interleave=mmmu.interleave,
        kinds=("image",),
    ),
}


def reading_of(task: Task) -> Reading:
    """The reading of a task's rows; for any task with `options`, `{lettered}` is their lines
    "A. ...", one each."""
    own = _READINGS.get(task.benchmark or "", Reading())
    if task.options is None:
        return own
    column = task.options

    def derive(row: dict, where: str) -> dict:
        lettered = {"lettered": options.lettered(options.listed(row[column], column, where))}
        return lettered | own.derive(row | lettered, where)

    return Reading(
        (*own.reads, column), (*own.makes, "lettered"), derive, own.interleave, own.kinds
    )
