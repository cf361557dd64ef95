"""What `compare` puts side by side, as its arguments name it: recipes, variations of them, runs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from masquant_cli import pipeline, recipe_yaml
from masquant_cli.errors import RecipeError
from masquant_cli.recipe import Recipe


@dataclass(frozen=True)
class Entry:
    """One row: a recipe to run in `run_dir`, or (`finished`) a run to be used as it is."""

    name: str
    recipe: Recipe
    run_dir: Path
    finished: bool = False


def entries(
    arguments: Sequence[str],
    *,
    run_root: Path,
    methods: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> list[Entry]:
    """What the command line names: RECIPE, RECIPE@key=value,key=value or a run directory.

    Every recipe is repeated for each of `methods`; `overrides` apply to all recipes. Raises
    RecipeError for what is neither, and for rows that would share a run directory.
    """
    found: list[Entry] = []
    for argument in arguments:
        name, at, changes = argument.partition("@")
        if _is_run(name):
            if at:
                raise RecipeError(
                    "a finished run cannot be changed", where=argument,
                    hint="name its recipe instead: RECIPE@key=value",
                )  # fmt: skip
            path = Path(name)
            found.append(Entry(path.resolve().name, pipeline.recipe_of(path), path, True))
            continue
        changed = _split(changes)
        if at and not changed:
            raise RecipeError("nothing follows the @", where=argument, hint="RECIPE@key=value,...")
        for method in methods or (None,):
            own = [*changed, *([f"method={method}"] if method else [])]
            recipe = recipe_yaml.load(name, [*overrides, *own])
            label = "-".join([recipe.name, *map(_slug, own)])
            found.append(Entry(label, recipe, Path(run_root) / label))
    if methods and all(entry.finished for entry in found):
        raise RecipeError(
            "only recipes can be run with other methods", where="--methods",
            hint="name a recipe; finished runs are taken as they are",
        )  # fmt: skip
    for index, entry in enumerate(found):
        if entry.run_dir.resolve() in {other.run_dir.resolve() for other in found[:index]}:
            raise RecipeError(
                f"two rows are the run {entry.run_dir}", where=entry.name, hint="name each once"
            )
    return found


def _is_run(name: str) -> bool:
    """A folder is a run, unless it only shares its name with a shipped recipe."""
    path = Path(name)
    if (path / pipeline.RECIPE).is_file():
        return True
    return path.is_dir() and name not in recipe_yaml.shipped()


def _split(changes: str) -> list[str]:
    """`a=1,b=[x,y]` -> ["a=1", "b=[x,y]"]: commas within brackets belong to a value."""
    found, depth = [""], 0
    for letter in changes:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [change.strip() for change in found if change.strip()]


def _slug(change: str) -> str:
    """An override as a piece of a folder's name: `method=rtn` -> rtn, `a.b=.1` -> a.b-.1."""
    key, _, value = change.partition("=")
    text = value if key == "method" else f"{key}-{value}"
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text.strip())
