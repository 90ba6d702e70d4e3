"""Frozen dataclass configs to JSON values and strictly back.

A union of configs with `Any` among its members is open: it takes registered configs from outside of the project too,
which are written with their name, {"class": "module:Class", ...} (`outside.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from vla_rl.policies.checkpoints.outside import class_name, config_class_named, how_to_import, is_registered

T = TypeVar("T")
_CLASS = "class"  # a keyword, so no field has this name


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain values for JSON; tuples become lists."""
    return {f.name: _to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def config_from_dict(config_class: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Build `config_class` from JSON values.

    Raises ValueError for an unknown key (with the nearest known one), a missing key without a default, and a value of
    the wrong type; `where` stands in the message.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected an object with the fields of {config_class.__name__}, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(config_class)}  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {sorted(fields)}"
            raise ValueError(f"{where}: unknown key {key!r}{hint}")
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"{where}: {config_class.__name__} needs {missing}")
    hints = typing.get_type_hints(config_class)
    return config_class(**{key: _from_plain(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {_CLASS: class_name(type(value))} if is_registered(type(value)) else {}
        return named | config_to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_to_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _to_plain(v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a config holds {type(value).__name__}, which has no JSON form: {value!r}")


def _from_plain(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        own = is_registered(hint) and isinstance(value, Mapping) and value.get(_CLASS) == class_name(hint)
        return config_from_dict(hint, {k: v for k, v in value.items() if k != _CLASS} if own else value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        if Any in arguments and isinstance(value, Mapping) and _CLASS in value:
            return _from_plain(_registered(value[_CLASS], where), value, where)
        return _from_plain(_alternative(arguments, value, where), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: must be one of {list(arguments)}, got {value!r}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        hints = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
        if len(hints) == len(value):
            return tuple(_from_plain(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {key: _from_plain(arguments[1], v, f"{where}.{key}") for key, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    raise ValueError(f"{where}: expected {hint}, got {value!r}")


def _registered(name: Any, where: str) -> type:
    found = config_class_named(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(
            f"{where}: {name!r} is not a class of vla_rl and is not registered; {how_to_import(str(name))}"
        )
    return found


def _alternative(alternatives: tuple[Any, ...], value: Any, where: str) -> Any:
    """The member of a union that `value` was written from: the one with just its keys, or, where fields were added
    since, the one that has them all and the fewest more."""
    choices = [a for a in alternatives if a not in (type(None), Any)]
    if len(choices) == 1 or not isinstance(value, Mapping):
        return choices[0]
    names = {choice: {f.name for f in dataclasses.fields(choice)} for choice in choices}
    fitting = sorted((c for c in choices if names[c] >= set(value)), key=lambda c: len(names[c]))
    if not fitting or (len(fitting) > 1 and len(names[fitting[0]]) == len(names[fitting[1]])):
        known = "; ".join(f"{choice.__name__}: {sorted(fields)}" for choice, fields in names.items())
        raise ValueError(f"{where}: the keys {sorted(value)} are of none of these: {known}")
    return fitting[0]
