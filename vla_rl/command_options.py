"""How the commands of `vla-rl` read their options, and find the recipe that these belong to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from vla_rl.cli import UsageError
from vla_rl.configs import RECIPES, get_recipe
from vla_rl.train.recipe import Recipe
from vla_rl.train.run_folder import CONFIG_FILE, read_config

RecipeFields = Annotated[Recipe, tyro.conf.arg(name="")]
UNSET: Any = tyro.MISSING


def parse(options: Any, argv: list[str], command: str) -> Any:
    """`argv` over the defaults in `options`. For a wrong option tyro ends the process with code 2 and a suggestion."""
    kind: Callable[..., Any] = options if isinstance(options, type) else type(options)
    return tyro.cli(
        kind,
        args=argv,
        prog=f"vla-rl {command}",
        default=None if isinstance(options, type) else options,
        config=(tyro.conf.AvoidSubcommands,),
    )


def parse_with_recipe(options: Any, argv: list[str], command: str) -> Any:
    """Options of a command whose first argument is a recipe's name; `--seed` is already in the recipe."""
    if not argv or argv[0].startswith("-"):
        raise UsageError(f"{command}: name a recipe first ({', '.join(RECIPES)}), then the options")
    parsed = parse(options(get_recipe(argv[0])), argv[1:], f"{command} {argv[0]}")
    if parsed.seed is not None:
        parsed = replace(parsed, recipe=parsed.recipe.with_seed(parsed.seed))
    set_threads(parsed.recipe)
    return parsed


def required_recipe(policy: Path, command: str = "eval") -> Recipe:
    """The recipe of the run that a policy folder lies in. Raises UsageError where it lies in none."""
    recipe = recipe_of_run(policy)
    if recipe is not None:
        return recipe
    raise UsageError(f"{command}: {policy} lies in no run folder; name the recipe with --recipe ({', '.join(RECIPES)})")


def recipe_of_run(policy: Path) -> Recipe | None:
    """The recipe of the run that a policy folder lies in, or None."""
    for folder in policy.resolve().parents:
        file = folder / CONFIG_FILE
        if file.is_file() and (folder / "provenance.json").is_file():
            return read_config(folder, Recipe)
    return None


def set_threads(recipe: Recipe) -> None:
    """Small networks on a busy CPU are many times slower with two threads than with one."""
    torch.set_num_threads(recipe.torch_threads)
