"""A recipe file, what it `extends` and `--set` become one validated `Recipe`. Start at `load`.

Every problem is reported where its author can fix it: file:line:column, or the `--set`.
"""

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from masquant_cli.errors import RecipeError
from masquant_cli.recipe import Recipe
from masquant_cli.yaml_marks import Keys, dotted, parse, parse_value

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class _Tree:
    """Plain data and, for every key path in it, where a reader finds it."""

    data: dict[str, Any]
    marks: dict[Keys, str]

    def where(self, keys: Keys) -> str:
        """The mark of `keys`, or of the closest parent that has one."""
        return next(
            self.marks[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self.marks
        )

    def forget(self, keys: Keys) -> None:
        """Drop the marks of `keys` and of everything below it, because it is replaced."""
        for stale in [k for k in self.marks if k[: len(keys)] == keys]:
            del self.marks[stale]


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at a path, or the shipped recipe of that name, under `a.b=value` overrides.

    Relative model and dataset paths inside a recipe are relative to the current directory.
    Raises one RecipeError that names every problem.
    """
    tree = _read(find(name_or_path))
    for override in overrides:
        _override(tree, override)
    try:
        return Recipe.model_validate(tree.data)
    except ValidationError as error:
        details = error.errors(include_url=False)
    # A list whose items failed is also reported as too short: only an empty one is.
    details = [d for d in details if not (d["type"] == "too_short" and d["input"])]
    problems = [_explain(tree, detail) for detail in details]
    lines = [f"{p.where}: {p.message}" + (f" ({p.hint})" if p.hint else "") for p in problems]
    lines = list(dict.fromkeys(lines))
    if len(lines) == 1:
        raise problems[0]
    raise RecipeError("\n".join([f"the recipe has {len(lines)} problems", *lines]))


def find(name_or_path: str) -> Path:
    """The file of a recipe: a path, `.yaml` being optional, else a shipped recipe's name."""
    path = Path(name_or_path)
    for candidate in _spellings(path):
        if candidate.is_file():
            return candidate
    known = shipped()
    name = (path.with_suffix("") if path.suffix in SUFFIXES else path).as_posix()
    if name in known:
        return known[name]
    if path.is_dir():
        raise RecipeError(
            "a recipe is a file, this is a folder", where=str(path), hint="name a .yaml file in it"
        )
    close = difflib.get_close_matches(name, known, n=3)
    raise RecipeError(
        "no such recipe: neither a file nor the name of a shipped recipe",
        where=name_or_path,
        hint=f"did you mean {' or '.join(close)}?"
        if close
        else f"shipped: {', '.join(n for n in known if '/' not in n)}; more: masquant recipes",
    )


def shipped() -> dict[str, Path]:
    """Name and file of every recipe that comes with masquant, sorted; folders are in the name."""
    packaged = Path(str(resources.files("masquant_cli"))) / "recipes"
    # In a checkout (editable install) the recipes are still at the top of the repository.
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs"
    files = {f.relative_to(folder).with_suffix("").as_posix(): f for f in folder.rglob("*.yaml")}
    return {name: files[name] for name in sorted(files, key=lambda n: (n.count("/"), n))}


def _spellings(path: Path) -> list[Path]:
    return [path] if path.suffix in SUFFIXES else [path, *(Path(f"{path}{s}") for s in SUFFIXES)]


def _read(path: Path, above: tuple[Path, ...] = ()) -> _Tree:
    """The file's data over what it `extends`; `above` are the files that extend this one."""
    data, marks = parse(_text(path), str(path))
    if not isinstance(data, dict):
        what = "the recipe is empty" if data is None else "a recipe is a mapping of keys to values"
        raise RecipeError(what, where=marks[()])
    top = _Tree(data, marks)
    if "extends" not in data:
        return top
    where, base = marks["extends",], data.pop("extends")
    if not isinstance(base, str):
        raise RecipeError("`extends` names one recipe, by name or path", where=where)
    if "name" not in data:  # it would share the base's run directory and make it stale
        raise RecipeError("a recipe that extends another needs its own `name`", where=where)
    chain = (*above, path.resolve())
    beside = [file for file in _spellings(path.parent / base) if file.is_file()]
    try:
        file = beside[0] if beside else find(base)
    except RecipeError as error:
        raise RecipeError(error.message, where=where, hint=error.hint) from None
    if file.resolve() in chain:
        raise RecipeError(f"`extends: {base}` leads back to this recipe", where=where)
    return _over(_read(file, chain), top)


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"cannot read the recipe: {error.strerror}", where=str(path)) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise RecipeError(
            "the recipe is not UTF-8 text", where=f"{path}:{line}:{column}", hint="save it as UTF-8"
        ) from None


def _over(base: _Tree, top: _Tree) -> _Tree:
    """`top` over `base`: mappings merge key by key, anything else is replaced whole."""

    def merge(old: dict, new: dict, keys: Keys) -> dict:
        merged = dict(old)
        for key, value in new.items():
            if isinstance(value, dict) and isinstance(old.get(key), dict):
                merged[key] = merge(old[key], value, (*keys, key))
            else:
                base.forget((*keys, key))
                merged[key] = value
        return merged

    return _Tree(merge(base.data, top.data, ()), {**base.marks, **top.marks})


def _override(tree: _Tree, override: str) -> None:
    """Apply `a.b.0.c=value` to `tree`: makes mappings on the way, but never list items."""
    path, equals, text = override.partition("=")
    steps = path.strip().split(".")
    where = f"--set {path.strip()}"
    if not equals or not all(steps):
        raise RecipeError(
            f"{override!r} is not of the form key=value",
            where=f"--set {override}",
            hint="for example --set weights.bits=8, or calibration.sources.0.limit=64",
        )
    try:
        value = parse_value(text)
    except RecipeError as error:
        raise RecipeError(error.message, where=where, hint=error.hint) from None
    parent, keys = tree.data, ()
    for step in steps[:-1]:
        key = _step(parent, keys, step, where)
        keys = (*keys, key)
        if isinstance(parent, dict) and parent.get(key) is None:
            parent[key] = [] if _is_list(_type_at(keys)) else {}
            tree.marks[keys] = where
        parent = parent[key]
    key = _step(parent, keys, steps[-1], where)
    parent[key] = value
    tree.forget((*keys, key))
    tree.marks[*keys, key] = where


def _step(parent: Any, keys: Keys, step: str, where: str) -> str | int:
    """One step of a `--set` path as the key or index it means in `parent`, which is at `keys`."""
    if isinstance(parent, list):
        if step.isascii() and step.isdigit() and int(step) < len(parent):
            return int(step)
        held = f"entries 0 to {len(parent) - 1}" if parent else "no entries"
        raise RecipeError(f"`{dotted(keys)}` has {held}, not {step!r}", where=where)
    if not isinstance(parent, dict):
        raise RecipeError(f"`{dotted(keys)}` is a value, it has no {step!r}", where=where)
    fields = _fields_at(keys)
    if fields is not None and step not in fields:
        raise RecipeError(
            f"unknown key `{dotted((*keys, step))}`", where=where, hint=_near(step, fields)
        )
    return step


def _explain(tree: _Tree, detail: dict[str, Any]) -> RecipeError:
    """One pydantic error in the recipe's own words."""
    keys: Keys = tuple(k for k in detail["loc"] if k != "[key]")
    where, name, given = tree.where(keys), f"`{dotted(keys)}`", detail["input"]
    kind, hint = detail["type"], None
    if keys and keys[-1] in ("str", "int", "float", "bool"):  # one complaint per union member
        message = f"`{dotted(keys[:-1])}` should be text, a number, true or false"
    elif kind == "missing":
        message = f"{name} is missing"
    elif kind == "extra_forbidden":
        message = f"unknown key {name}"
        hint = _near(str(keys[-1]), _fields_at(keys[:-1]) or ())
    elif kind == "literal_error":
        expected = detail["ctx"]["expected"]
        is_key = detail["loc"][-1] == "[key]"
        message = f"unknown key {name}" if is_key else f"{name} is {given!r}"
        message += f", expected {expected}"
        choices = re.findall(r"'([^']+)'", expected)
        hint = _near(given, choices, listing=False) if isinstance(given, str) else None
    elif kind == "too_short":
        message = f"{name} is empty, expected at least one entry"
    elif kind == "value_error":
        reason = str(detail["ctx"]["error"])
        message = f"{name}: {reason}" if keys else reason
    else:
        reason = detail["msg"].replace("Input should", "should").replace("dictionary", "mapping")
        shown = repr(given)
        message = f"{name} {reason}, got {shown if len(shown) <= 60 else shown[:57] + '...'}"
        if kind == "string_type":
            hint = 'quote a template: "{column}"' if isinstance(given, dict) else "put it in quotes"
    return RecipeError(message, where=where, hint=hint)


def _near(word: str, known: Collection[str], listing: bool = True) -> str | None:
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"did you mean `{close[0]}`?"
    return f"known keys: {', '.join(known)}" if known and listing else None


# The recipe's model is asked what a key path may hold, so that no list of keys is kept twice.


def _fields_at(keys: Keys) -> tuple[str, ...] | None:
    """Names of the keys that may stand below a key path; None where any may."""
    model = _model(_type_at(keys))
    return tuple(model.model_fields) if model else None


def _type_at(keys: Keys) -> Any:
    """The type declared for a key path, or None where the model declares none."""
    at: Any = Recipe
    for key in keys:
        model = _model(at)
        if model:
            info = model.model_fields.get(str(key))
            at = info.annotation if info else None
        else:  # tuple[X, ...] or dict[Y, X]
            inner = [get_args(v) for v in _variants(at) if get_origin(v) in (tuple, dict)]
            at = (
                next((a for a in inner[0] if a is not Ellipsis and _model(a)), None)
                if inner
                else None
            )
    return at


def _model(annotation: Any) -> type[BaseModel] | None:
    for variant in _variants(annotation):
        if isinstance(variant, type) and issubclass(variant, BaseModel):
            return variant
    return None


def _is_list(annotation: Any) -> bool:
    return any(get_origin(v) is tuple for v in _variants(annotation))


def _variants(annotation: Any) -> list[Any]:
    """Annotated[...] and unions taken apart."""
    if get_origin(annotation) is Annotated:
        return _variants(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [v for part in get_args(annotation) for v in _variants(part)]
    return [annotation]
