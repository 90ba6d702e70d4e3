"""Learning experiment: ManiSkill from the state, fine-tuned on 20 noisy demonstrations, then EXPO online.

    make experiment NAME=maniskill_rl [ARGS="--task PickCube-v1"]

For each seed the recipe's demonstrations and policy, and from it EXPO with and without a reward: the control's critic
never learns, so it picks among the policy's chunks and edits them by what its first weights say. The same 100 held-out
episodes for all. Required: EXPO ends ahead of the fine-tuned policy and of the control, all seeds together.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from tests.experiments.runner import Experiment, Method, main_of_task, start_of
from vla_rl.configs import get_recipe
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.offpolicy.expo import ExpoConfig
from vla_rl.train.offpolicy import OffPolicyConfig
from vla_rl.train.recipe import Recipe


def _experiment(task: str, recipe: Recipe) -> Experiment:
    train = recipe.train
    assert isinstance(train, OffPolicyConfig)
    assert isinstance(train.agent, ExpoConfig)

    def make_env(num_envs: int, split: str, auto_reset: bool) -> ChunkedEnv:
        return recipe.env.make(num_envs, split=split, auto_reset=auto_reset)

    blind = replace(train, agent=replace(train.agent, critic_learning_rate=0.0))
    return Experiment(
        name=f"maniskill_rl/{task}",
        title=f"ManiSkill {task}: twenty noisy demonstrations, then EXPO",
        prepare=start_of(recipe),
        make_env=make_env,
        methods={"expo": Method("EXPO", train), "control": Method("the same, no reward", blind, "other")},
        num_episodes=100,
        first_episode=0,
        required=0.0,
        start_range=(0.0, 1.0),
        ahead=(("expo", "sft"), ("expo", "control")),
        num_envs=2,
        curve_episodes=40,
    )


TASKS = {"PushCube-v1": "PUSH_CUBE", "PickCube-v1": "PICK_CUBE"}
PUSH_CUBE = _experiment("PushCube-v1", get_recipe("maniskill_push_cube"))
PICK_CUBE = _experiment("PickCube-v1", get_recipe("maniskill_pick_cube"))


if __name__ == "__main__":
    raise SystemExit(main_of_task("tests.experiments.maniskill_rl", TASKS, sys.argv[1:]))
