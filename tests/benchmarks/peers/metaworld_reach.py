"""Metaworld's reach by its own environment, random actions; runs in Metaworld's own Python.

Modes: "state", no camera; "vision", one 64 px camera drawn at every step. No mode counts a reset.
"""

import json
import os
import sys
import time

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("OMP_NUM_THREADS", "1")

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the library prints goes to the log

import gymnasium  # noqa: E402
import metaworld  # noqa: E402, F401  registers the environments  # pyright: ignore[reportMissingImports]

STEPS_PER_DECISION = 8


def main(mode: str, core: int) -> None:
    pictures = {"render_mode": "rgb_array", "camera_name": "corner2", "width": 64, "height": 64}
    env = gymnasium.make("Meta-World/MT1", env_name="reach-v3", seed=core, **(pictures if mode == "vision" else {}))
    env.action_space.seed(core)

    def episode(num_steps: int) -> None:
        for _ in range(num_steps):
            env.step(env.action_space.sample())
            if mode == "vision":
                env.render()

    env.reset()
    episode(16)
    answer({"ready": True})
    for line in sys.stdin:
        seconds = json.loads(line)["seconds"]
        steps, elapsed = 0, 0.0
        while elapsed < seconds:  # an episode has 500 steps
            env.reset()
            begin, done = time.perf_counter(), 0
            while done < 480 and elapsed + time.perf_counter() - begin < seconds:
                episode(STEPS_PER_DECISION)
                done += STEPS_PER_DECISION
            elapsed += time.perf_counter() - begin
            steps += done
        answer({"steps": steps, "seconds": elapsed})


def answer(message: dict) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
