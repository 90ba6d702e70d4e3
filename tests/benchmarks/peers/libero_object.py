"""LIBERO-Object's first task by LIBERO's own environment, random actions; runs in LIBERO's own Python.

Modes: "state", no camera; "vision", one 64 px camera observed at every step, all options at their defaults. The
configuration and the assets are those that the project's host wrote (`LIBERO_CONFIG_PATH`). No mode counts a reset.
"""

import json
import os
import sys
import time

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("OMP_NUM_THREADS", "1")

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the library prints goes to the log

import collections  # noqa: E402
import collections.abc  # noqa: E402
import importlib  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402

STEPS_PER_DECISION = 8
TASK = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"


def main(mode: str, core: int) -> None:
    collections.Iterable = collections.abc.Iterable  # pyright: ignore[reportAttributeAccessIssue]
    package = importlib.import_module("libero.libero")
    if "VLA_RL_LIBERO_ASSETS" in os.environ:
        package._assets_path_cache = os.environ["VLA_RL_LIBERO_ASSETS"]
    wrapper = importlib.import_module("libero.libero.envs.env_wrapper")
    root = Path(package.__file__).parent
    env = wrapper.ControlEnv(
        bddl_file_name=str(root / "bddl_files" / "libero_object" / f"{TASK}.bddl"),
        has_offscreen_renderer=mode == "vision",
        use_camera_obs=mode == "vision",
        camera_names=["agentview"],
        camera_heights=64,
        camera_widths=64,
        ignore_done=True,
    ).env
    env.reset()
    rng = np.random.default_rng(core)
    low, high = env.action_spec
    for _ in range(16):
        env.step(rng.uniform(low, high))
    answer({"ready": True})
    for line in sys.stdin:
        seconds = json.loads(line)["seconds"]
        env.reset()
        steps, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            for _ in range(STEPS_PER_DECISION):
                env.step(rng.uniform(low, high))
                steps += 1
        answer({"steps": steps, "seconds": elapsed})


def answer(message: dict) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
