"""Our side of the rollout benchmarks: the tabletop simulator through the whole path from action to observation."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from vla_rl.envs.tabletop import make_tabletop


class TabletopRollout:
    """Random actions in chunks, auto-reset on: ends and resets of episodes are part of what is measured."""

    def __init__(
        self,
        task: str = "reach",
        num_envs: int = 256,
        chunk: int = 8,
        cameras: Mapping[str, int] | None = None,
        *,
        engine: str = "cpu",
        device: str | None = None,
        final_images: bool = True,
        num_threads: int | None = None,
    ) -> None:
        self.env = make_tabletop(
            task,
            num_envs,
            cameras=cameras,
            engine=engine,
            device=device,
            final_images=final_images,
            num_threads=num_threads,
        )
        generator = torch.Generator().manual_seed(0)
        where = device or "cpu"
        shape = (num_envs, chunk, self.env.spec.action.dim)
        self._actions = [(torch.rand(shape, generator=generator) * 2 - 1).to(where) for _ in range(16)]
        self._count = 0
        self.env.reset(list(range(num_envs)))
        self.run(chunks=6)  # warm-up; past the first wave of ends, which all come at once

    def run(self, *, seconds: float | None = None, chunks: int | None = None) -> float:
        """Executed control steps of all environments per second (those after an end within a chunk do not count), over
        about `seconds`, or over `chunks` chunks."""
        steps, done, begin = torch.zeros((), dtype=torch.int64), 0, time.perf_counter()
        while True:
            step = self.env.step(self._actions[self._count % len(self._actions)])
            self._count += 1
            done += 1
            steps = steps.to(step.executed.device) + step.executed.sum()
            elapsed = time.perf_counter() - begin
            if (chunks is not None and done >= chunks) or (seconds is not None and elapsed >= seconds):
                if step.executed.is_cuda:
                    torch.cuda.synchronize()
                return int(steps) / (time.perf_counter() - begin)
