"""A person's interventions, in both buffers (HIL-SERL, arXiv 2410.21845; ConRFT, arXiv 2502.05450).

While a person holds the arm, their action is what is executed and stored, with the policy's proposal beside it and
HUMAN for its source (`ChunkStep.taken`). Those rows are online data like any other, and `copy_interventions` adds them
to the demonstrations (`OnlineConfig.intervention_rows`).
"""

from __future__ import annotations

import numpy as np

from vla_rl.core import Source
from vla_rl.data.replay import ReplayBuffer


def copy_interventions(online: ReplayBuffer, demos: ReplayBuffer, *, since: int = 0) -> int:
    """Copy the stretches of steps that a person executed in finished episodes, and return the id that the next call
    should begin at; `since` is the first episode id to look at.

    A stretch is an episode of its own in `demos`, cut short (truncated) unless the task ended in it: no chunk of it has
    an action of the policy, and its last steps bootstrap from the state in which the policy took over again. It begins
    and ends at observed rows, so with K > 1 the steps before the first decision that a person made are left out.
    """
    for first, count in online.finished_episodes(since):
        for start, end in _human_stretches(online, first, first + count - 1):
            rows, steps, whole = online.rows, slice(start, end), slice(start, end + 1)
            terminated = bool(rows.terminated[end - 1])
            demos.add_episode(
                state=rows.obs[whole, online.feature_dim :],
                actions=rows.actions[steps],
                rewards=rows.reward[steps],
                terminated=terminated,
                truncated=not terminated,
                success=bool(rows.success[start]),
                images={camera: rows.images[camera][whole] for camera in demos.cameras},
                instruction=online.instruction(start),
                source=Source.HUMAN,
                proposals=rows.proposals[steps],
                observed=rows.observed[whole],
            )
    return online.num_episodes_added


def _human_stretches(buffer: ReplayBuffer, first: int, end: int) -> list[tuple[int, int]]:
    """[start, end) of each run of HUMAN steps in rows [first, end), both at observed rows."""
    by_human = np.concatenate([[False], buffer.rows.source[first:end] == Source.HUMAN, [False]])
    edges = first + np.flatnonzero(by_human[1:] != by_human[:-1])
    stretches = []
    for start, stop in edges.reshape(-1, 2).tolist():
        seen = start + np.flatnonzero(buffer.rows.observed[start : stop + 1])
        if len(seen) >= 2:
            stretches.append((int(seen[0]), int(seen[-1])))
    return stretches


__all__ = ["copy_interventions"]
