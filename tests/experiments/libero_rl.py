"""Learning experiment: the tiny VLA on three LIBERO tasks, fine-tuned on few demonstrations, then EXPO online.

    make experiment NAME=libero_rl ARGS="--task spatial"     # or object, goal: an hour a seed on two cores

For each seed the recipe's demonstrations and policy, and from it EXPO with and without a reward: the control's critic
never learns, so it picks among the policy's chunks and edits them by what its first weights say. Training begins from
the even initial states of the task, the 100 episodes of evaluation from the odd ones. Required: ahead of the fine-tuned
policy and of the control.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from tests.experiments.runner import Experiment, Method, envs_of, main_of_task, start_of
from vla_rl.configs import get_recipe
from vla_rl.envs.libero import LiberoConfig
from vla_rl.offpolicy.expo import ExpoConfig
from vla_rl.train.offpolicy import OffPolicyConfig

NUM_ENVS = 8


def _experiment(task: str, num_demos: int) -> Experiment:
    recipe = get_recipe("libero_object")
    assert isinstance(recipe.env, LiberoConfig)
    assert isinstance(recipe.train, OffPolicyConfig)
    assert isinstance(recipe.train.agent, ExpoConfig)
    blind = replace(recipe.train, agent=replace(recipe.train.agent, critic_learning_rate=0.0))
    demos = replace(recipe.demos, num_episodes=num_demos)
    recipe = replace(recipe, env=replace(recipe.env, task=task), demos=demos)
    return Experiment(
        name=f"libero_rl/{task.replace('/', '_')}",
        title=f"{task}: {num_demos} demonstrations, then EXPO",
        prepare=start_of(recipe),
        make_env=envs_of(recipe),
        methods={
            "expo": Method("EXPO", recipe.train),
            "control": Method("the same, no reward", blind, "other"),
        },
        num_episodes=100,
        first_episode=0,
        required=0.0,
        start_range=(0.0, 1.0),
        ahead=(("expo", "sft"), ("expo", "control")),
        num_envs=NUM_ENVS,
        curve_episodes=25,
    )


TASKS = {"object": "OBJECT", "spatial": "SPATIAL", "goal": "GOAL"}
OBJECT = _experiment("libero_object/0", num_demos=2)
SPATIAL = _experiment("libero_spatial/0", num_demos=10)
GOAL = _experiment("libero_goal/2", num_demos=5)


if __name__ == "__main__":
    raise SystemExit(main_of_task("tests.experiments.libero_rl", TASKS, sys.argv[1:]))
