"""Writes the pages of the reference that are made of code: docs/metrics.md and docs/configs.md.

Usage: make_reference.py [FOLDER]   (default: docs of this checkout; a test compares it with what is committed)
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import inspect
import sys
import types
import typing
from pathlib import Path
from typing import Any

from vla_rl.configs import RECIPES
from vla_rl.real_robot.deploy_config import DeployConfig
from vla_rl.serving.config import ServerConfig
from vla_rl.train.metric_dictionary import GROUPS
from vla_rl.train.recipe import Recipe

_NOTE = "<!-- Made by tools/make_reference.py: change the code, then `make reference`. -->\n\n"
ROOTS = (Recipe, DeployConfig, ServerConfig)
_MOST_PATHS = 4  # places of a config within a recipe that are named


# --------------------------------------------------------------------------------------------------------- metrics.md
def metrics_page() -> str:
    parts = [f"{_NOTE}# Metrics of a run\n"]
    for group in GROUPS:
        parts.append(f"## {group.title}\n\n{group.text}\n" if group.title else f"{group.text}\n")
        rows = ["| metric | what it is | healthy |", "|---|---|---|"]
        for metric in group.metrics:
            names = ", ".join(f"`{name}`" for name in metric.names)
            rows.append(f"| {names} | {_cell(metric.meaning)} | {_cell(metric.healthy)} |".replace("|  |", "| |"))
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


# --------------------------------------------------------------------------------------------------------- configs.md
def configs_page() -> str:
    parts = [
        f"{_NOTE}# Configuration\n",
        "Configs are frozen dataclasses, and a recipe is one of them, complete. On the command line a field is an "
        "option: `train.num_iterations` of a recipe is `--train.num-iterations`, and `vla-rl run RECIPE --help` lists "
        "those of that recipe. Capitals in shapes are those of `vla_rl/core.py`.\n",
        "## Recipes\n\nFor `vla-rl run`, `demos`, `sft`, `train`, `eval`; one of your own is `module:function`.\n",
        "| recipe | what it is |\n|---|---|",
        *(f"| `{name}` | {_cell(_first_line(_function(entry)))} |" for name, entry in RECIPES.items()),
    ]
    for root in ROOTS:
        found = walk(root)
        title = "Fields of a recipe" if root is Recipe else f"Fields of {root.__name__}"
        parts.append(f"\n## {title}\n")
        parts += [section(config, paths) for config, paths in found.items()]
    return "\n".join(parts)


def walk(root: type) -> dict[type, list[str]]:
    """Configs that `root` is made of, itself first, each with the paths of the fields that hold it."""
    paths: dict[type, list[str]] = {root: []}
    waiting = [(root, "")]
    while waiting:
        config, prefix = waiting.pop(0)
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            path = f"{prefix}{field.name}"
            for inner in _configs_in(hints[field.name]):
                if inner not in paths:
                    waiting.append((inner, f"{path}."))
                paths.setdefault(inner, []).append(path)
    return paths


def _configs_in(hint: Any) -> list[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    return [config for argument in typing.get_args(hint) for config in _configs_in(argument)]


def section(config: type, paths: list[str]) -> str:
    """The config's docstring and fields; `paths` of the fields that hold it."""
    hints = typing.get_type_hints(config)
    lines = [f"### {config.__name__}\n"]
    where = f"`{config.__module__}`"
    if paths:
        named = ", ".join(f"`{path}`" for path in paths[:_MOST_PATHS])
        where += f", at {named}" + (f" and {len(paths) - _MOST_PATHS} more" if len(paths) > _MOST_PATHS else "")
    lines += [f"{where}\n", f"{inspect.getdoc(config)}\n", "| field | type | default |", "|---|---|---|"]
    lines += [
        f"| `{field.name}` | {_type(hints[field.name])} | {_default(field)} |" for field in dataclasses.fields(config)
    ]
    return "\n".join(lines) + "\n"


def _type(hint: Any) -> str:
    """A type in words, configs as links to their sections."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin is typing.Literal:
        return " or ".join(f"`{argument!r}`" for argument in arguments)
    if origin is tuple:
        several = arguments[1:] == (...,)
        return f"tuple of {_type(arguments[0])}" if several else "(" + ", ".join(map(_type, arguments)) + ")"
    if origin in (dict, collections.abc.Mapping):
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if hint is type(None):
        return "None"
    if hint is Any:  # of a union that takes registered configs from outside
        return "[one of yours](add_a_policy.md)"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    return getattr(hint, "__name__", str(hint))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{_shown(field.default)}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{_shown(field.default_factory())}`"
    return "must be given"


def _shown(value: Any) -> str:
    """A value as in code; of a config the fields that are not at their default."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    changed = []
    for field in dataclasses.fields(value):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if getattr(value, field.name) != default:
            changed.append(f"{field.name}={_shown(getattr(value, field.name))}")
    return f"{type(value).__name__}({', '.join(changed)})"


def _function(entry: str) -> Any:
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def _first_line(function: Any) -> str:
    paragraph = (inspect.getdoc(function) or "").split("\n\n")[0]
    return " ".join(paragraph.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {"metrics.md": metrics_page, "configs.md": configs_page}


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "docs"
    for name, make in PAGES.items():
        (folder / name).write_text(make(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
