"""Recipes: functions that return a complete, frozen config. `vla-rl run NAME`, `vla-rl train NAME`, ... take them."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vla_rl.train.recipe import Recipe

if __name__ == "configs":
    raise ImportError("import vla_rl.configs, not configs")

# Imported when asked for: a recipe's module imports all that it configures.
RECIPES = {
    "demo": "vla_rl.configs.demo:demo",
    "demo_smoke": "vla_rl.configs.demo:demo_smoke",
    "tabletop_flow_sde": "vla_rl.configs.tabletop_flow:flow_sde",
    "tabletop_flow_noise": "vla_rl.configs.tabletop_flow:flow_noise",
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError for an unknown one."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one"
        raise ValueError(f"there is no recipe {name!r}; {hint} (known: {', '.join(RECIPES)})")
    module, _, function = RECIPES[name].partition(":")
    return getattr(importlib.import_module(module), function)()
