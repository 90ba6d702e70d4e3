"""Control steps per second of our tabletop through the whole chunked path, from action to observation.

`measure_tabletop` is one side of the comparison with other simulators. Run as a program, it prints our side alone.
"""

from __future__ import annotations

import json
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from vla_rl.envs.tabletop import make_tabletop


def measure_tabletop(
    *,
    task: str = "reach",
    num_envs: int = 256,
    chunk: int = 8,
    seconds: float = 5.0,
    cameras: dict[str, int] | None = None,
    num_threads: int | None = None,
) -> dict[str, float]:
    """Random actions in chunks of `chunk` steps, auto-reset on, for about `seconds` after a warm-up.

    Returns `steps_per_s` (executed control steps of all environments; those after an episode's end within a chunk
    do not count), `frames_per_s` and `episodes_per_s`.
    """
    torch.set_num_threads(1)
    env = make_tabletop(task, num_envs, cameras=cameras, num_threads=num_threads)
    generator = torch.Generator().manual_seed(0)
    actions = [torch.rand(num_envs, chunk, env.spec.action.dim, generator=generator) * 2 - 1 for _ in range(16)]
    env.reset(list(range(num_envs)))
    for i in range(4):
        env.step(actions[i])
    steps = frames = episodes = count = 0
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        step = env.step(actions[count % len(actions)])
        count += 1
        steps += int(step.executed.sum())
        episodes += int(step.ended.sum())
        frames += (num_envs + len(step.final_ids)) * len(step.obs.images)
    env.close()
    return {"steps_per_s": steps / elapsed, "frames_per_s": frames / elapsed, "episodes_per_s": episodes / elapsed}


if __name__ == "__main__":
    state = {n: measure_tabletop(num_envs=n) for n in (1, 16, 64, 256)}
    vision = measure_tabletop(cameras={"agent": 64})
    print(json.dumps({"state": state, "vision_64px_chunk8": vision}, indent=1))
