"""Control steps per second with state observations: our tabletop against robosuite's Lift and ManiSkill's PickCube.

make bench NAME=rollout_state ARGS="--save"
"""

from __future__ import annotations

import tyro

from tests.benchmarks.rollouts import RolloutBenchmarkConfig, compare

if __name__ == "__main__":
    compare("rollout_state", tyro.cli(RolloutBenchmarkConfig), cameras={}, peer_modes={"robosuite": "state"})
