"""The published schema of `eval.json`: what another program may rely on, and a check of a file against it.

`eval.schema.json` is JSON Schema (draft 2020-12), so any validator can read it. The one here knows the keywords that
the file uses, and refuses a schema with another: nothing is left unchecked in silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

SCHEMA_FILE = "eval.schema.json"
_NOTES = frozenset({"$schema", "$id", "$defs", "title", "description"})
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, Mapping),
    "array": lambda v: isinstance(v, (list, tuple)),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "null": lambda v: v is None,
}


class SchemaError(ValueError):
    """A document is not what the schema says; the message lists where."""


@cache
def eval_schema() -> dict[str, Any]:
    """The schema of `eval.json`."""
    return json.loads(files("vla_rl.evaluation").joinpath(SCHEMA_FILE).read_text(encoding="utf-8"))


def validate(document: Any, schema: Mapping[str, Any] | None = None) -> None:
    """Check a parsed `eval.json` (or a document of another `schema`).

    Raises SchemaError with every place that differs, and ValueError for a schema with a keyword that is not known here.
    """
    schema = eval_schema() if schema is None else schema
    problems = list(_problems(document, schema, schema, "$"))
    if problems:
        raise SchemaError("not what the schema says: " + "; ".join(problems[:8]))


def _problems(value: Any, rule: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    for keyword, argument in rule.items():
        if keyword in _NOTES:
            continue
        check = _KEYWORDS.get(keyword)
        if check is None:
            raise ValueError(f"schema: the keyword {keyword!r} at {at} is not known; use {sorted(_KEYWORDS)}")
        yield from check(value, argument, rule, root, at)


_Check = Callable[[Any, Any, Mapping[str, Any], Mapping[str, Any], str], Iterator[str]]


def _type(value: Any, names: Any, _rule: Any, _root: Any, at: str) -> Iterator[str]:
    names = [names] if isinstance(names, str) else names
    if not any(_TYPES[name](value) for name in names):
        yield f"{at} is {type(value).__name__}, expected {' or '.join(names)}"


def _enum(value: Any, allowed: Any, _rule: Any, _root: Any, at: str) -> Iterator[str]:
    if value not in allowed:
        yield f"{at} is {value!r}, expected one of {allowed}"


def _const(value: Any, expected: Any, _rule: Any, _root: Any, at: str) -> Iterator[str]:
    if value != expected or isinstance(value, bool) != isinstance(expected, bool):
        yield f"{at} is {value!r}, expected {expected!r}"


def _minimum(value: Any, low: float, _rule: Any, _root: Any, at: str) -> Iterator[str]:
    if _TYPES["number"](value) and not value >= low:
        yield f"{at} is {value}, expected at least {low}"


def _maximum(value: Any, high: float, _rule: Any, _root: Any, at: str) -> Iterator[str]:
    if _TYPES["number"](value) and not value <= high:
        yield f"{at} is {value}, expected at most {high}"


def _required(value: Any, names: Any, _rule: Any, _root: Any, at: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from (f"{at} lacks {name!r}" for name in names if name not in value)


def _properties(value: Any, rules: Any, _rule: Any, root: Mapping[str, Any], at: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, rule in rules.items():
            if name in value:
                yield from _problems(value[name], rule, root, f"{at}.{name}")


def _additional(value: Any, rule: Any, around: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        return
    for name in value:
        if name in around.get("properties", {}):
            continue
        if rule is False:
            yield f"{at} has {name!r}, which is not in the schema"
        elif rule is not True:
            yield from _problems(value[name], rule, root, f"{at}.{name}")


def _items(value: Any, rule: Any, _rule: Any, root: Mapping[str, Any], at: str) -> Iterator[str]:
    if _TYPES["array"](value):
        for i, item in enumerate(value):
            yield from _problems(item, rule, root, f"{at}[{i}]")


def _ref(value: Any, target: str, _rule: Any, root: Mapping[str, Any], at: str) -> Iterator[str]:
    yield from _problems(value, root["$defs"][target.removeprefix("#/$defs/")], root, at)


_KEYWORDS: dict[str, _Check] = {
    "type": _type,
    "enum": _enum,
    "const": _const,
    "minimum": _minimum,
    "maximum": _maximum,
    "required": _required,
    "properties": _properties,
    "additionalProperties": _additional,
    "items": _items,
    "$ref": _ref,
}
