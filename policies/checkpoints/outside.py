"""Policy families from outside of the project: which of them are known, and which modules may be imported for them.

A file only ever *names* a class. Importing what a file names would run any code that whoever wrote the file likes, so a
class is known when its module was imported by a person's own code or was named with `vla-rl --import MODULE`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

IMPORTS = "VLA_RL_IMPORT"  # modules, by commas; an environment variable, so that processes of a command know them too
_CONFIGS: dict[str, type] = {}  # "module:Class" -> a frozen dataclass


def register_config(config_class: type) -> None:
    """Make configs of this class readable wherever a field takes those of any policy."""
    _CONFIGS[class_name(config_class)] = config_class


def class_name(outside: type) -> str:
    """ "module:Class", as files name it."""
    return f"{outside.__module__}:{outside.__qualname__}"


def is_registered(config_class: type) -> bool:
    return _CONFIGS.get(class_name(config_class)) is config_class


def config_class_named(name: str) -> type | None:
    """The registered class of that name; modules that were named for import are imported first. None without one."""
    if name not in _CONFIGS:
        import_named()
    return _CONFIGS.get(name)


def how_to_import(name: str) -> str:
    """For the end of an error message about "module:Class" or a module that nobody imported."""
    module = name.partition(":")[0]
    if module == "__main__":
        return "it was defined in a script, which no other program can import: put it into a module of its own"
    return (
        f"import its module first: --import {module} on the command line, `import {module}` in Python. It is not "
        "imported because a file names it, which could be any code"
    )


def name_imports(modules: Sequence[str]) -> None:
    """Import `modules` here, and wherever a process of this one needs them. Raises ValueError for one that is not
    there."""
    os.environ[IMPORTS] = ",".join(dict.fromkeys([*named_imports(), *modules]))
    import_named()


def named_imports() -> list[str]:
    return [name for name in os.environ.get(IMPORTS, "").split(",") if name]


def import_options() -> list[str]:
    """What was named, as options of a command that another machine is to run."""
    return [word for name in named_imports() for word in ("--import", name)]


def import_named() -> None:
    """Import what was named; modules lie on the path or in the working folder. Raises ValueError for one that is not
    there."""
    for name in named_imports():
        if name in sys.modules:
            continue
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--import {name}: {error}; name a module on the path or in the working folder, without .py"
            ) from error
