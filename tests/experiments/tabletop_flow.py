"""Learning experiment: the demo's task, from pictures and sentences, with Flow-SDE, with Flow-Noise, and the control.

    make experiment NAME=tabletop_flow

For each seed: new demonstrations, a new policy fitted to them, and from it every method. 256 episodes of the split
"test". Required: the start between .3 and .65, each method .90 or more, the control (Flow-SDE on shuffled advantages)
at most .08 above its start.
"""

from __future__ import annotations

from tests.experiments.runner import Experiment, Method, main, start_of
from vla_rl.configs import get_recipe
from vla_rl.envs.vector import ChunkedEnv

SDE, NOISE = get_recipe("tabletop_flow_sde"), get_recipe("tabletop_flow_noise")


def make_env(num_envs: int, split: str, auto_reset: bool) -> ChunkedEnv:
    """With pictures of episodes' ends where training needs them."""
    return SDE.env.make(num_envs, split=split, auto_reset=auto_reset, final_images=auto_reset)


EXPERIMENT = Experiment(
    name="tabletop_flow",
    title="Reach by picture and sentence: Flow-SDE and Flow-Noise",
    prepare=start_of(SDE),
    make_env=make_env,
    methods={
        "flow_sde": Method("Flow-SDE", SDE.train),
        "flow_noise": Method("Flow-Noise", NOISE.train),
        "control_flow_sde": Method("control, Flow-SDE", SDE.control().train, "control"),
    },
    num_episodes=256,
    first_episode=0,
    required=0.90,
    start_range=(0.30, 0.65),
)

if __name__ == "__main__":
    raise SystemExit(main("tests.experiments.tabletop_flow"))
