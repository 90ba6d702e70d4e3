"""robosuite's Lift with a Panda, random actions; runs in robosuite's own environment (see `harness.PeerGroup`).

Modes: "state", no camera; "vision", one 64 px camera observed at every step, all options at their defaults;
"vision_decisions", the same camera, drawn once in eight steps. No mode counts a reset.
"""

import json
import os
import sys
import time

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("OMP_NUM_THREADS", "1")

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the library prints goes to the log

import numpy as np  # noqa: E402
import robosuite  # noqa: E402  # pyright: ignore[reportMissingImports]

STEPS_PER_DECISION = 8


def main(mode: str, core: int) -> None:
    env = robosuite.make(
        "Lift",
        robots="Panda",
        has_renderer=False,
        has_offscreen_renderer=mode != "state",
        use_camera_obs=mode == "vision",
        camera_names="agentview",
        camera_heights=64,
        camera_widths=64,
        ignore_done=True,
    )
    env.reset()
    rng = np.random.default_rng(core)
    low, high = env.action_spec
    steps = 0

    def step() -> None:
        nonlocal steps
        env.step(rng.uniform(low, high))
        steps += 1
        if mode == "vision_decisions" and steps % STEPS_PER_DECISION == 0:
            env.sim.render(camera_name="agentview", height=64, width=64)

    for _ in range(16):
        step()
    answer({"ready": True})
    for line in sys.stdin:
        seconds = json.loads(line)["seconds"]
        env.reset()
        steps, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            for _ in range(STEPS_PER_DECISION):
                step()
        answer({"steps": steps, "seconds": elapsed})


def answer(message: dict) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
