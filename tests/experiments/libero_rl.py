"""Learning experiment: the tiny VLA on three LIBERO tasks, fine-tuned on 20 demonstrations, then Flow-SDE PPO.

    make experiment NAME=libero_rl ARGS="--task object"      # or spatial, goal: hours each on two cores

For each seed the recipe's demonstrations and policy, and from it Flow-SDE PPO with its advantages and with shuffled
ones. Training begins from the even initial states of the task, the 100 episodes of evaluation from the odd ones.
Required: ahead of the fine-tuned policy and of the control, which ends no more than 8 points above the start.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from tests.experiments.runner import Experiment, Method, envs_of, main_of_task, start_of
from vla_rl.configs import get_recipe
from vla_rl.envs.libero import LiberoConfig
from vla_rl.train.loop import TrainConfig

NUM_ENVS = 8


def _experiment(task: str) -> Experiment:
    recipe = get_recipe("libero_object")
    assert isinstance(recipe.env, LiberoConfig)
    recipe = replace(recipe, env=replace(recipe.env, task=task))
    control = recipe.control().train
    assert isinstance(recipe.train, TrainConfig)
    assert isinstance(control, TrainConfig)

    return Experiment(
        name=f"libero_rl/{task.replace('/', '_')}",
        title=f"{task}: twenty demonstrations, then Flow-SDE PPO",
        prepare=start_of(recipe),
        make_env=envs_of(recipe),
        methods={
            "flow_sde": Method("Flow-SDE PPO", recipe.train),
            "control": Method("shuffled advantages", control, "control"),
        },
        num_episodes=100,
        first_episode=0,
        required=0.0,
        start_range=(0.0, 1.0),
        ahead=(("flow_sde", "sft"), ("flow_sde", "control")),
        num_envs=NUM_ENVS,
        curve_episodes=25,
    )


TASKS = {"object": "OBJECT", "spatial": "SPATIAL", "goal": "GOAL"}
OBJECT = _experiment("libero_object/0")
SPATIAL = _experiment("libero_spatial/0")
GOAL = _experiment("libero_goal/2")


if __name__ == "__main__":
    raise SystemExit(main_of_task("tests.experiments.libero_rl", TASKS, sys.argv[1:]))
