"""Learning experiment: the demo's task, from pictures and sentences, with Flow-SDE, with Flow-Noise, and the control.

    make experiment NAME=tabletop_flow

For each seed: new demonstrations, a new policy fitted to them, and from it every method. 256 episodes of the split
"test". Required: the start between .3 and .65, each method .90 or more, the control (Flow-SDE on shuffled advantages)
at most .08 above its start.
"""

from __future__ import annotations

from tests.experiments.runner import Experiment, Method, envs_of, main, start_of
from vla_rl.configs import get_recipe

SDE, NOISE = get_recipe("tabletop_flow_sde"), get_recipe("tabletop_flow_noise")


EXPERIMENT = Experiment(
    name="tabletop_flow",
    title="Reach by picture and sentence: Flow-SDE and Flow-Noise",
    prepare=start_of(SDE),
    make_env=envs_of(SDE),
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
