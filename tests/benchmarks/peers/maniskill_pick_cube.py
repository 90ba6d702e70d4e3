"""ManiSkill's PickCube-v1, random actions, on the CPU; runs in ManiSkill's own environment (see `harness.PeerGroup`).

Modes: "state"; "vision", one 64 px camera observed at every step. Its CPU simulation has one environment a process, and
observes at every step whatever one asks for.
"""

import json
import os
import sys
import time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the library prints goes to the log

import gymnasium  # noqa: E402
import mani_skill.envs  # noqa: E402, F401  registers the environments  # pyright: ignore[reportMissingImports]
import torch  # noqa: E402

STEPS_PER_DECISION = 8


def main(mode: str, core: int) -> None:
    torch.set_num_threads(1)
    options = {"sensor_configs": {"width": 64, "height": 64}} if mode == "vision" else {}
    env = gymnasium.make(
        "PickCube-v1",
        obs_mode="rgb" if mode == "vision" else "state",
        control_mode="pd_ee_delta_pos",
        num_envs=1,
        sim_backend="cpu",
        render_backend="cpu" if mode == "vision" else "none",
        max_episode_steps=10**9,
        **options,
    )
    env.reset(seed=core)
    env.action_space.seed(core)
    for _ in range(16):
        env.step(env.action_space.sample())
    answer({"ready": True})
    for line in sys.stdin:
        seconds = json.loads(line)["seconds"]
        env.reset(seed=core)
        steps, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            for _ in range(STEPS_PER_DECISION):
                env.step(env.action_space.sample())
                steps += 1
        answer({"steps": steps, "seconds": elapsed})


def answer(message: dict) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
