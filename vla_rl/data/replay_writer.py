"""What writes to a replay buffer: parallel environments, a LeRobot dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vla_rl.core import ActionSpec, ChunkStep, Observation, Source
from vla_rl.data.lerobot_reader import Episode, LeRobotDataset
from vla_rl.data.replay import ReplayBuffer


class EpisodeWriter:
    """Turns the decisions of N environments into episodes of a buffer; each grows in rows of its own until it ends.

    `action_spec`: actions are clamped to it before they are stored, as the environment does, so the stored ones are
    those that were executed. The buffer must have `num_envs` = N and pictures of all its cameras in every observation
    (`ChunkedEnv(final_images=True)`).
    """

    def __init__(self, buffer: ReplayBuffer, action_spec: ActionSpec) -> None:
        if not buffer.num_envs:
            raise ValueError("this buffer has no room for running episodes; build it with num_envs, max_episode_steps")
        self.buffer, self.action_spec = buffer, action_spec
        self._slots = buffer.config.capacity + buffer.slot_rows * np.arange(buffer.num_envs)

    def add(
        self,
        obs: Observation,
        actions: Tensor,
        step: ChunkStep,
        *,
        policy_version: int = -1,
        features: np.ndarray | None = None,
        encoder_version: str | None = None,
    ) -> np.ndarray:
        """Store a decision: `obs` [N], `actions [N, K, A]` that were asked for, and what `step` says came of them.

        With K = 1 every step has an observation; with K > 1 only decision points have, and starts and successors are
        taken from them. Steps that `step.executed` denies are no steps. Where a person could take over (`step.taken`),
        what was executed is stored with whose it was; `actions`, before clamping, are the proposals beside it.
        `policy_version`: how many updates the policy had seen. `features [N, F]`
        of `obs` by the encoder `encoder_version`, where the policy has them anyway. Returns the environments whose
        episode moved into the ring, int64.

        Raises ValueError where `obs` is not the successor of an environment's last step (a reset from outside: call
        `cut` before), and where an episode exceeds the buffer's `max_episode_steps`.
        """
        buffer, rows = self.buffer, self.buffer.rows
        executed = _array(step.executed)
        count = executed.sum(axis=1)
        moved = np.flatnonzero(count)
        self._check(obs, actions, step, count)
        self._begin(obs, moved)
        heads = self._slots + buffer.running_steps
        if features is not None:
            if encoder_version is None:
                raise ValueError("features need the encoder_version that made them (FeatureCache.fingerprint)")
            buffer.set_features(heads[moved], np.asarray(features)[moved], encoder_version)
        done = _array(self.action_spec.clamp(actions if step.taken is None else step.taken.actions))
        wanted = _array(actions)
        who = np.full(executed.shape, Source.POLICY, np.int8) if step.taken is None else _array(step.taken.source)
        rewards = _array(step.rewards)
        for i in range(executed.shape[1]):
            envs = np.flatnonzero(executed[:, i])
            at = self._slots[envs] + buffer.running_steps[envs]
            rows.actions[at], rows.proposals[at] = done[envs, i], wanted[envs, i]
            rows.reward[at], rows.source[at] = rewards[envs, i], who[envs, i]
            rows.policy_version[at] = policy_version
            buffer.running_steps[envs] += 1
            self._clear(at + 1)
        self._finish(step, moved)
        lost = np.flatnonzero(_array(step.lost) & (buffer.running_steps > 0))
        self.cut(lost.tolist())  # where its last whole chunk ended
        return np.union1d(self._move_ended(step, moved), lost)

    def cut(self, envs: Sequence[int] | None = None) -> None:
        """End running episodes (None: all) as truncated where they stand, for instance before a reset."""
        buffer = self.buffer
        for env in range(buffer.num_envs) if envs is None else envs:
            steps = int(buffer.running_steps[env])
            if steps:
                buffer.rows.truncated[buffer.slot(env) + steps - 1] = True
                buffer.finish_running(env)

    def _check(self, obs: Observation, actions: Tensor, step: ChunkStep, count: np.ndarray) -> None:
        """Before anything is stored."""
        buffer = self.buffer
        if len(obs) != buffer.num_envs or actions.shape[2] != buffer.action_dim:
            raise ValueError(
                f"the buffer is for {buffer.num_envs} environments and actions of {buffer.action_dim}, got "
                f"{len(obs)} observations and actions {tuple(actions.shape)}"
            )
        for seen in (obs, step.obs, step.final_obs):
            missing = sorted(set(buffer.cameras) - set(seen.images)) if seen is not None else []
            if missing:
                raise ValueError(
                    f"an observation lacks {missing}; build ChunkedEnv with images=True, final_images=True"
                )
            if seen is not None and not np.isfinite(_array(seen.state)).all():
                raise ValueError("a state is not finite; look for a diverged simulation or a broken sensor")
        if not np.isfinite(_array(step.rewards)).all() or not np.isfinite(_array(actions)).all():
            raise ValueError("rewards or actions are not finite; look for a broken reward or a diverged policy")
        too_long = np.flatnonzero(buffer.running_steps + count > buffer.slot_rows - 1)
        if len(too_long):
            raise ValueError(
                f"the episode of environment {too_long[0]} is longer than max_episode_steps {buffer.slot_rows - 1}; "
                "build the buffer with the environment's limit"
            )

    def _begin(self, obs: Observation, moved: np.ndarray) -> None:
        """Store the first observation of new episodes; of others check that it is the one already stored."""
        buffer = self.buffer
        fresh = moved[buffer.running_steps[moved] == 0]
        going = moved[buffer.running_steps[moved] > 0]
        state = _array(obs.state)
        heads = self._slots[going] + buffer.running_steps[going]
        stored = buffer.rows.obs[heads, buffer.feature_dim :]
        torn = going[~np.all(stored == state[going], axis=1)]
        if len(torn):
            raise ValueError(
                f"environments {torn.tolist()}: this observation does not follow their last step; "
                "call cut(envs) where environments are reset from outside"
            )
        self._clear(self._slots[fresh])
        self._observe(self._slots[fresh], obs, fresh)
        for env in fresh.tolist():
            slot = slice(buffer.slot(env), buffer.slot(env) + buffer.slot_rows)
            buffer.rows.instruction[slot] = buffer.sentence_id(obs.instruction[env])
            buffer.rows.step[slot] = np.arange(buffer.slot_rows)

    def _clear(self, at: np.ndarray) -> None:
        """Make `at` the last row of its episode: nothing done there, nobody looked."""
        rows = self.buffer.rows
        rows.obs[at] = rows.actions[at] = rows.proposals[at] = 0
        rows.reward[at] = rows.source[at] = 0
        rows.mc_return[at], rows.policy_version[at] = -np.inf, -1
        rows.terminated[at] = rows.truncated[at] = rows.success[at] = rows.observed[at] = rows.featured[at] = False

    def _observe(self, at: np.ndarray, obs: Observation, envs: np.ndarray) -> None:
        """Store observation `envs[j]` at row `at[j]`."""
        buffer = self.buffer
        buffer.rows.obs[at, buffer.feature_dim :] = _array(obs.state)[envs]
        for camera, pictures in buffer.rows.images.items():
            pictures[at] = _array(obs.images[camera])[envs] if len(at) else 0
        buffer.rows.observed[at] = True

    def _finish(self, step: ChunkStep, moved: np.ndarray) -> None:
        """Flags of the chunk's last step, and its true successor: an end's own observation, never a reset's."""
        buffer = self.buffer
        heads = self._slots + buffer.running_steps
        last = heads[moved] - 1
        buffer.rows.terminated[last] = _array(step.terminated)[moved]
        buffer.rows.truncated[last] = _array(step.truncated)[moved]
        buffer.rows.success[last] = _array(step.success)[moved]
        ended = _array(step.ended)
        goes_on = moved[~ended[moved]]
        self._observe(heads[goes_on], step.obs, goes_on)
        if step.final_obs is not None:
            final = _array(step.final_ids)
            self._observe(heads[final], step.final_obs, np.arange(len(final)))
        ends = buffer.rows.end[buffer.config.capacity :].reshape(buffer.num_envs, buffer.slot_rows)
        ends[moved] = heads[moved, None]
        buffer.running_changed()

    def _move_ended(self, step: ChunkStep, moved: np.ndarray) -> np.ndarray:
        ended = moved[_array(step.ended)[moved]]
        for env in ended.tolist():
            self.buffer.finish_running(env)
        return ended


def add_lerobot(buffer: ReplayBuffer, dataset: LeRobotDataset, *, episodes: Sequence[int] | None = None) -> int:
    """Store `episodes` (None: all) of a dataset as demonstrations, or with the sources and proposals of a labelled one;
    returns how many steps.

    An episode that was not truncated is terminated, and its last frame stands for the final observation, which nobody
    reads. A truncated one has no frame after its last action: it loses that step, and its last frame is the final
    observation. Without a column `truncated`, an episode is terminated if its last frame is a success. Without a
    column `reward`, the reward is 1 at steps of success. Raises ValueError for a dataset that has neither.
    """
    before = len(buffer)
    for index in range(dataset.num_episodes) if episodes is None else episodes:
        episode = dataset.episode(index, cameras=tuple(buffer.cameras))
        rewards, truncated = _demo_rewards(episode, dataset), _demo_truncated(episode, dataset)
        keep = len(episode) - int(truncated)
        if keep < 1:
            continue
        frames = np.minimum(np.arange(keep + 1), len(episode) - 1)
        buffer.add_episode(
            state=_array(episode.state)[frames],
            actions=_array(episode.action)[:keep],
            rewards=rewards[:keep],
            terminated=not truncated,
            truncated=truncated,
            success=episode.success is not None and bool(episode.success[:keep].any()),
            images={camera: _array(pictures)[frames] for camera, pictures in episode.images.items()},
            instruction=episode.instruction,
            source=Source.DEMO if episode.source is None else _array(episode.source)[:keep].astype(np.int8),
            proposals=None if episode.proposal is None else _array(episode.proposal)[:keep],
        )
    return len(buffer) - before


def _demo_rewards(episode: Episode, dataset: LeRobotDataset) -> np.ndarray:
    if episode.reward is not None:
        return _array(episode.reward)
    if episode.success is not None:
        return _array(episode.success).astype(np.float32)
    raise ValueError(f"{dataset.path} has neither reward nor success; add one of the columns to it")


def _demo_truncated(episode: Episode, dataset: LeRobotDataset) -> bool:
    if episode.truncated is not None:
        return bool(episode.truncated[-1])
    if episode.success is not None:
        return not bool(episode.success[-1])
    raise ValueError(f"{dataset.path} says neither truncated nor success: how its episodes end is not known")


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().numpy() if isinstance(tensor, Tensor) else np.asarray(tensor)


__all__ = ["EpisodeWriter", "add_lerobot"]
