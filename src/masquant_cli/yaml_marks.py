"""YAML text as plain data, plus where in the file every key and item stands.

PyYAML is used for its node graph alone: its constructors lose line numbers, let a duplicate
key win silently, read `1e-4` as a string and `no` as False. Scalars follow YAML 1.2's core.
"""

import re
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from masquant_cli.errors import RecipeError

Keys = tuple[str | int, ...]
TAG = "tag:yaml.org,2002:"

# YAML 1.1's `yes`, `on`, `1:30` and `1_000` stay strings; `0777` is a decimal.
SCALARS = (
    ("null", re.compile(r"(?:null|Null|NULL|~|)$")),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")),
    ("int", re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")),
    ("float", re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")),
    ("float", re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")),
)


class _CoreLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}


for _name, _pattern in SCALARS:
    _CoreLoader.add_implicit_resolver(TAG + _name, _pattern, None)


def parse(text: str, file: str) -> tuple[Any, dict[Keys, str]]:
    """Data of one YAML document and a `file:line:column` for every key path in it.

    The mark of a mapping's key is the key itself, of a list item its first character. Raises
    RecipeError for anything that is not one document of mappings, lists and scalars.
    """
    node = _compose(text, file)
    marks = {(): f"{file}:1:1"}
    return (None if node is None else _plain(node, file, (), marks)), marks


def parse_value(text: str) -> Any:
    """A value from the command line: YAML when quoted or bracketed, else one plain scalar.

    `Q: {question}` and `#1` therefore stay the strings they look like.
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        return parse(text, "value")[0]
    return _scalar(next((n for n, pattern in SCALARS if pattern.match(text)), "str"), text, "value")


def _compose(text: str, file: str) -> Node | None:
    try:
        return yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        problem = ", ".join(filter(None, (error.context, error.problem)))
        hint = "indent with spaces, not tabs" if "'\\t'" in problem else None
        raise RecipeError(f"not valid YAML: {problem}", where=where, hint=hint) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"not valid YAML: the character U+{error.character:04X} is not allowed",
            where=f"{file}:{line}:1",
        ) from None


def _mark(file: str, node: Node) -> str:
    return f"{file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _plain(node: Node, file: str, keys: Keys, marks: dict[Keys, str], inside: tuple = ()) -> Any:
    """`node` as dict, list or scalar; fills `marks` below `keys`. `inside` are its ancestors."""
    where = _mark(file, node)
    if node in inside:
        raise RecipeError("an alias refers to something it is part of", where=where)
    if isinstance(node, ScalarNode):
        return _scalar(node.tag.removeprefix(TAG), node.value, where)
    if node.tag not in (TAG + "map", TAG + "seq"):
        raise RecipeError(f"the YAML tag {node.tag} is not supported", where=where)
    if isinstance(node, SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            marks[*keys, index] = _mark(file, item)
            items.append(_plain(item, file, (*keys, index), marks, (*inside, node)))
        return items
    assert isinstance(node, MappingNode)
    data: dict[str, Any] = {}
    for key_node, value in node.value:
        where = _mark(file, key_node)
        if not isinstance(key_node, ScalarNode):
            hint = 'quote a template: "{column}"' if node.flow_style else None
            raise RecipeError("a key must be a plain word", where=where, hint=hint)
        here = (*keys, key_node.value)
        if key_node.value in data:
            raise RecipeError(
                f"key `{dotted(here)}` is given twice, first at {marks[here]}", where=where
            )
        marks[here] = where
        data[key_node.value] = _plain(value, file, here, marks, (*inside, node))
    return data


def _scalar(kind: str, text: str, where: str) -> Any:
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if kind == "float":
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    except ValueError as error:  # an explicit tag such as `!!int two`
        raise RecipeError(f"not valid YAML: {error}", where=where) from None
    if kind != "str":
        raise RecipeError(f"the YAML tag {kind} is not supported", where=where)
    return text


def dotted(keys: Keys) -> str:
    """A key path as `--set` spells it."""
    return ".".join(map(str, keys))
