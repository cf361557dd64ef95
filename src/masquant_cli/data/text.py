"""Text templates over dataset columns, "Q: {question}", and how answers are compared.

Templates are deliberately less than `str.format`: a column name and nothing else, so that data
can never reach attributes and a typo is an error instead of a surprise.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from masquant_cli.errors import RecipeError

# Doubled braces first, so that "{{name}}" stays literal.
_TOKEN = re.compile(r"(?P<open>\{\{)|(?P<close>\}\})|\{(?P<name>[^{}]*)\}|(?P<stray>[{}])")


def columns_in(template: str, where: str) -> list[str]:
    """Column names a template reads, in order of appearance. Raises RecipeError if malformed."""
    names = []
    for match in _TOKEN.finditer(template):
        if match["stray"]:
            raise RecipeError(
                f"unbalanced brace in the text template {template!r}",
                where=where,
                hint="write {column} for a column and double a brace to mean it literally",
            )
        if match["name"] is not None:
            name = match["name"].strip()
            if not name:
                raise RecipeError(
                    f"empty {{}} in the text template {template!r}",
                    where=where,
                    hint="put a column name between the braces",
                )
            names.append(name)
    return names


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """Replace every `{column}` of `template` by the row's value.

    Strings, numbers and booleans are written as they are, a list of them joined by ", ".
    Raises RecipeError for a column that is missing, empty or holds something else.
    """
    columns_in(template, where)  # refuses malformed templates

    def value(match: re.Match) -> str:
        if match["open"]:
            return "{"
        if match["close"]:
            return "}"
        return _as_text(match["name"].strip(), row, where)

    return _TOKEN.sub(value, template)


def missing_column(name: str, columns: Iterable[str], where: str) -> RecipeError:
    """The error for a column that is not there, with the nearest name and all the names."""
    columns = sorted(str(c) for c in columns)
    near = difflib.get_close_matches(name, columns, n=1)
    base = re.split(r"[.\[:!]", name, maxsplit=1)[0].strip()
    if base != name and base in columns:
        hint = f"templates take plain columns only, such as {{{base}}}"
    elif near:
        hint = f"did you mean {near[0]!r}? the columns are {', '.join(columns)}"
    else:
        hint = f"the columns are {', '.join(columns) or '(none)'}"
    return RecipeError(f"there is no column {name!r}", where=where, hint=hint)


def normalise(text: str) -> str:
    """Lower case, NFKC, apostrophes dropped, other punctuation and white space collapsed to one
    space. Signs and points of numbers stay: "-5" is not "5", "3.5" is not "35".

    A text of nothing but punctuation is kept as it is.
    """
    text = unicodedata.normalize("NFKC", text).lower().strip()
    bare = re.sub(r"['’`]", "", text)
    kept = [
        " " if unicodedata.category(c).startswith("P") and not _in_number(bare, i) else c
        for i, c in enumerate(bare)
    ]
    return " ".join("".join(kept).split()) or text


def _as_text(name: str, row: Mapping[str, Any], where: str) -> str:
    if name not in row:
        raise missing_column(name, row, where)
    value = row[name]
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, list | tuple) and all(isinstance(v, str | int | float) for v in value):
        return ", ".join(map(str, value))
    if value is None:
        raise RecipeError(
            f"column {name!r} is empty",
            where=where,
            hint="drop such rows with `where`, or fill the column in the data",
        )
    raise RecipeError(
        f"column {name!r} holds {type(value).__name__}, which is not text",
        where=where,
        hint="only text, numbers and lists of them can stand in a text template",
    )


def _in_number(text: str, i: int) -> bool:
    before, after = text[i - 1 : i] if i else "", text[i + 1 : i + 2]
    if text[i] in ".,":
        return before.isdigit() and after.isdigit()
    return text[i] == "-" and after.isdigit() and not before.isalnum()
