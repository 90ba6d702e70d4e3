"""Control steps per second with one 64 px camera, in chunks of eight: our tabletop against robosuite and ManiSkill.

The ratio is against robosuite as its users get it, a picture at every step; "robosuite_decisions" draws one in eight
steps, as we do.

    make bench NAME=rollout_vision ARGS="--save"
"""

from __future__ import annotations

import tyro

from tests.benchmarks.rollouts import RolloutBenchmarkConfig, compare

if __name__ == "__main__":
    compare(
        "rollout_vision",
        tyro.cli(RolloutBenchmarkConfig),
        cameras={"agent": 64},
        peer_modes={"robosuite": "vision", "robosuite_decisions": "vision_decisions"},
    )
