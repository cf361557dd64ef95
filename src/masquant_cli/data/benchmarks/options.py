"""The options of multiple-choice questions, and which of them a row says is right."""

import ast
from typing import Any

from masquant_cli.errors import RecipeError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def listed(value: Any, column: str, where: str) -> list[str]:
    """A column's options as texts; MMMU writes the list as a string. Raises RecipeError."""
    found = value
    if isinstance(value, str):
        try:
            found = ast.literal_eval(value.strip() or "[]")
        except (ValueError, SyntaxError):
            found = None
    if not isinstance(found, list | tuple) or len(found) > len(LETTERS):
        raise RecipeError(
            f"column {column!r} holds no list of at most {len(LETTERS)} options",
            where=where,
            hint="`options` names a column of lists, or of strings like \"['red', 'blue']\"",
        )
    return [str(option) for option in found]


def lettered(options: list[str]) -> str:
    """One line each, "A. red"."""
    letters = LETTERS[: len(options)]
    return "\n".join(f"{a}. {option}" for a, option in zip(letters, options, strict=True))


def right_letter(answer: Any, options: list[str], where: str, *, letter_first: bool = False) -> str:
    """The letter of the right option: an integer is its index, a string its text, its letter or
    its index, whichever fits first (`letter_first`: the letter before the text). RecipeError."""
    letters, texts = LETTERS[: len(options)], [option.strip() for option in options]
    if isinstance(answer, int):
        places = [answer]
    else:
        text = str(answer).strip()
        places = [found.index(text) for found in (texts, [*letters]) if text in found]
        places = places[::-1] if letter_first else places
        places += [int(text)] if text.isdecimal() else []
    if places and 0 <= places[0] < len(options):
        return letters[places[0]]
    raise RecipeError(
        f"the expected answer {answer!r} is none of the {len(options)} options",
        where=where,
        hint="it is an option's text, its letter or its index from 0",
    )
