"""Recipes: functions that return a complete, frozen config. `vla-rl run NAME`, `vla-rl train NAME`, ... take them."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
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
    "vla_offline_to_online": "vla_rl.configs.offpolicy:vla_offline_to_online",
    "twin_hil": "vla_rl.configs.offpolicy:twin_hil",
    "pi0": "vla_rl.configs.vla:pi0",
    "pi05": "vla_rl.configs.vla:pi05",
    "smolvla": "vla_rl.configs.vla:smolvla",
    "openvla": "vla_rl.configs.vla:openvla",
    "openvla_oft": "vla_rl.configs.vla:openvla_oft",
    "openvla_oft_tokens": "vla_rl.configs.vla:openvla_oft_tokens",
    "maniskill_push_cube": "vla_rl.configs.simulators:maniskill_push_cube",
    "maniskill_pick_cube": "vla_rl.configs.simulators:maniskill_pick_cube",
    "gym_mountain_car": "vla_rl.configs.simulators:gym_mountain_car",
    "ogbench_cube": "vla_rl.configs.simulators:ogbench_cube",
    "robosuite_lift": "vla_rl.configs.simulators:robosuite_lift",
    "libero_object": "vla_rl.configs.simulators:libero_object",
    "metaworld_reach": "vla_rl.configs.simulators:metaworld_reach",
    "maze_cql": "vla_rl.configs.maze:cql",
    "maze_calql": "vla_rl.configs.maze:calql",
    "maze_wsrl": "vla_rl.configs.maze:wsrl",
    "maze_iql": "vla_rl.configs.maze:iql",
    "maze_td3_bc": "vla_rl.configs.maze:td3_bc",
    "maze_co_rft": "vla_rl.configs.maze:co_rft",
    "maze_rlpd": "vla_rl.configs.maze:rlpd",
    "maze_qc": "vla_rl.configs.maze:qc",
    "maze_qc_fql": "vla_rl.configs.maze:qc_fql",
    "maze_fql": "vla_rl.configs.maze:fql",
    "maze_pa_rl": "vla_rl.configs.maze:pa_rl",
    "maze_conrft": "vla_rl.configs.maze:conrft",
    "maze_dsrl": "vla_rl.configs.maze:dsrl",
    "maze_expo": "vla_rl.configs.maze:expo",
    "maze_residual": "vla_rl.configs.maze:residual",
    "maze_smoke": "vla_rl.configs.maze:smoke",
    "cql": "vla_rl.configs.offpolicy_papers:cql",
    "calql": "vla_rl.configs.offpolicy_papers:calql",
    "wsrl": "vla_rl.configs.offpolicy_papers:wsrl",
    "iql": "vla_rl.configs.offpolicy_papers:iql",
    "td3_bc": "vla_rl.configs.offpolicy_papers:td3_bc",
    "co_rft": "vla_rl.configs.offpolicy_papers:co_rft",
    "rlpd": "vla_rl.configs.offpolicy_papers:rlpd",
    "qc": "vla_rl.configs.offpolicy_papers:qc",
    "qc_fql": "vla_rl.configs.offpolicy_papers:qc_fql",
    "fql": "vla_rl.configs.offpolicy_papers:fql",
    "pa_rl": "vla_rl.configs.offpolicy_papers:pa_rl",
    "conrft": "vla_rl.configs.offpolicy_papers:conrft",
    "dsrl": "vla_rl.configs.offpolicy_papers:dsrl",
    "expo": "vla_rl.configs.offpolicy_papers:expo",
    "residual": "vla_rl.configs.offpolicy_papers:residual",
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name, or of a function of your own, `module:function`, the module lying on the path or in the
    working folder. Raises ValueError where there is none."""
    entry = RECIPES.get(name, name)
    module, colon, function = entry.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one, or name your own as module:function"
        raise ValueError(f"there is no recipe {name!r}; {hint} (known: {', '.join(RECIPES)})")
    if entry == name:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"recipe {name!r} cannot be loaded: {error}") from error
    from vla_rl.train.recipe import Recipe

    recipe = make()
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe {name!r} returns {type(recipe).__name__}, expected a vla_rl.train.recipe.Recipe")
    return recipe
