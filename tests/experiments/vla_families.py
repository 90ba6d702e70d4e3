"""Learning experiment: one VLA family of each head, tiny, on the tabletop's reach: SFT, then PPO, against its control.

    make experiment NAME=vla_families [ARGS="--task openvla_oft_tokens"]      # or openvla_oft; the default is pi0

The flow head (pi0, Flow-SDE), the token head (OpenVLA-OFT's discrete tokens) and the regression head (OpenVLA-OFT's L1
head, explored by a Laplace density), each with its recipe of `vla_rl.configs.vla`. For each seed the recipe's
demonstrations and policy, and from it PPO with its advantages and with shuffled ones, which must not learn. The same
256 held-out episodes for all. Required: ahead of the fine-tuned policy and of the control, all seeds together.

The regression head averages the demonstrations' clumsiness out and reaches nearly always (98%), in about ten control
steps; RL and evaluation give it nine.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from tests.experiments.runner import Experiment, Method, envs_of, main_of_task, start_of
from vla_rl.configs import get_recipe
from vla_rl.envs.config import EnvConfig
from vla_rl.train.loop import TrainConfig


def _experiment(family: str, max_episode_steps: int | None = None) -> Experiment:
    """`max_episode_steps`: of RL and evaluation, where that is not the demonstrations'."""
    recipe = get_recipe(family)
    assert isinstance(recipe.env, EnvConfig)
    tried = recipe
    if max_episode_steps is not None:
        tried = replace(recipe, env=replace(recipe.env, max_episode_steps=max_episode_steps))
    control = recipe.control().train
    assert isinstance(recipe.train, TrainConfig)
    assert isinstance(control, TrainConfig)

    return Experiment(
        name=f"vla_families/{family}",
        title=f"{family}, tiny: fine-tuning, then PPO",
        prepare=start_of(recipe),
        make_env=envs_of(tried),
        methods={"ppo": Method("PPO", recipe.train), "control": Method("shuffled advantages", control, "control")},
        num_episodes=256,
        first_episode=0,
        required=0.0,
        start_range=(0.0, 1.0),
        ahead=(("ppo", "sft"), ("ppo", "control")),
    )


TASKS = {"pi0": "PI0", "openvla_oft_tokens": "TOKENS", "openvla_oft": "REGRESSION"}
PI0 = _experiment("pi0")
TOKENS = _experiment("openvla_oft_tokens")
REGRESSION = _experiment("openvla_oft", max_episode_steps=9)


if __name__ == "__main__":
    raise SystemExit(main_of_task("tests.experiments.vla_families", TASKS, sys.argv[1:]))
