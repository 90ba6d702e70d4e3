"""Replay for off-policy learning on action chunks: everything that can go wrong between a chunk and an episode's end.

Rows are control steps with raw rewards (see `replay_rows`). A sample is a start row and the H steps from there on;
reward, discount and mask are made at sampling, with the per-step gamma:

    k        = min(H, steps to the episode's end)
    reward   = sum_{i<k} gamma^i (reward_scale * r_i + reward_bias)
    discount = gamma^k * (1 - terminated)
    target   = reward + discount * V(next_obs),   next_obs = s_{t+k}

So a chunk that an end cuts short is a sample like any other: every step of an episode is a start, also its last ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vla_rl.core import Observation, Source
from vla_rl.data.replay_rows import ReplayRows
from vla_rl.data.returns import TruncatedReturn, monte_carlo_returns
from vla_rl.train.checkpoint import load_state, save_state


@dataclass(frozen=True)
class SamplingWeights:
    """How often a start is drawn, relative to others. A step is never stored twice, so returns stay what they are.

    `reward`: factor where the chunk has a step with a raw reward above `reward_above` (the reward upsampling of
    CO-RFT). `success`: factor in episodes that succeeded. `in_loss`: draw uniformly and put the factor, with mean 1,
    into `ReplayBatch.weight`; the expected loss is the same up to a constant, its variance is not.
    """

    reward: float = 1.0
    reward_above: float = 0.0
    success: float = 1.0
    in_loss: bool = False

    def __post_init__(self) -> None:
        if not (self.reward > 0 and self.success > 0):
            raise ValueError(f"weights must be positive, got reward {self.reward}, success {self.success}")

    @property
    def uniform(self) -> bool:
        return self.reward == 1.0 and self.success == 1.0


@dataclass(frozen=True)
class ReplayConfig:
    """`capacity`: rows, one a control step and one more an episode. `gamma`: discount of one control step.

    The critic learns r' = reward_scale * r + reward_bias. `reward_low`: the lowest raw reward that the task can give;
    None: not known, and then a truncated episode has no bound (`mc_return` -inf). `truncated_return`: see `returns`.
    `memory_map`: folder for the pictures' files, for buffers larger than memory; it is scratch, not a checkpoint.
    """

    capacity: int
    gamma: float
    reward_scale: float = 1.0
    reward_bias: float = 0.0
    reward_low: float | None = None
    truncated_return: TruncatedReturn = "lower_bound"
    weights: SamplingWeights = field(default_factory=SamplingWeights)
    memory_map: str | None = None

    def __post_init__(self) -> None:
        if self.capacity < 2:
            raise ValueError(f"capacity is {self.capacity}, expected at least 2 rows (a step and a final observation)")
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma must be in (0, 1), got {self.gamma}")
        if not self.reward_scale > 0:
            raise ValueError(f"reward_scale must be positive, got {self.reward_scale}")

    def transform(self, reward: np.ndarray) -> np.ndarray:
        """r' of raw rewards, float64."""
        return self.reward_scale * np.asarray(reward, np.float64) + self.reward_bias


class ReplayBatch(NamedTuple):
    """B chunks as numpy arrays (a JAX pytree as it is); leading dimensions [U, B] where minibatches were asked for.

    `obs` [B, O]: features, where the buffer has them, then the state. `actions` [B, H, A] as executed, the last one
    repeated past the episode's end; `mask` bool [B, H] True where a step was executed. `reward`, `discount`, `next_obs`
    [B, O]: see the module. `mc_return` [B]: Monte-Carlo return of r', -inf where no lower bound is known. `weight` [B]:
    of the loss. `rows`, `next_rows` int64 [B]: for pictures, sentences and proposals.

    With prefixes, the targets of i = 1..H steps: `prefix_reward`, `prefix_discount` [B, H], `prefix_next_obs`
    [B, H, O], `prefix_next_rows` [B, H]. Past the end (i > k) they equal those of k, for nothing more happens;
    they are trained too. `prefix_mask` bool [B, H] is False only where nobody looked at the successor.
    """

    obs: np.ndarray
    actions: np.ndarray
    mask: np.ndarray
    reward: np.ndarray
    discount: np.ndarray
    next_obs: np.ndarray
    mc_return: np.ndarray
    weight: np.ndarray
    rows: np.ndarray
    next_rows: np.ndarray
    prefix_reward: np.ndarray | None = None
    prefix_discount: np.ndarray | None = None
    prefix_next_obs: np.ndarray | None = None
    prefix_mask: np.ndarray | None = None
    prefix_next_rows: np.ndarray | None = None

    def fold(self, num_minibatches: int) -> ReplayBatch:
        """[U * B, ...] as [U, B, ...]."""
        parts = (x if x is None else x.reshape(num_minibatches, -1, *x.shape[1:]) for x in self)
        return ReplayBatch(*parts)  # pyright: ignore[reportArgumentType]


class _Starts(NamedTuple):
    """Start rows, their factors (None: all 1) and the factors' cumulative sum."""

    rows: np.ndarray
    weights: np.ndarray | None
    cumulative: np.ndarray | None


class ReplayBuffer:
    """Episodes in a ring of rows; the oldest give way, whole ones only, so no chunk ever crosses the seam.

    `cameras`: name -> (h, w). `feature_dim`: F, of a frozen policy's features (`set_features`), 0: none.
    `num_envs`, `max_episode_steps`: room for episodes that still run (`replay_writer.EpisodeWriter`), beside the ring:
    num_envs * (max_episode_steps + 1) rows. They can be sampled, from starts whose whole chunk is there.
    """

    def __init__(
        self,
        config: ReplayConfig,
        *,
        state_dim: int,
        action_dim: int,
        cameras: Mapping[str, tuple[int, int]] | None = None,
        feature_dim: int = 0,
        num_envs: int = 0,
        max_episode_steps: int = 0,
    ) -> None:
        if num_envs and max_episode_steps < 1:
            raise ValueError(f"{num_envs} running episodes need max_episode_steps >= 1, got {max_episode_steps}")
        if max_episode_steps + 1 > config.capacity:
            raise ValueError(f"capacity {config.capacity} is less than one episode of {max_episode_steps} steps + 1")
        self.config = config
        self.state_dim, self.action_dim, self.feature_dim = state_dim, action_dim, feature_dim
        self.cameras = {name: (int(h), int(w)) for name, (h, w) in (cameras or {}).items()}
        self.num_envs, self.slot_rows = num_envs, (max_episode_steps + 1) if num_envs else 0
        self.num_rows = config.capacity + num_envs * self.slot_rows
        self.rows = ReplayRows.allocate(
            self.num_rows, feature_dim + state_dim, action_dim, self.cameras, config.memory_map
        )
        self.running_steps = np.zeros(num_envs, np.int64)  # of each environment's running episode
        self.encoder_version: str | None = None
        self.num_episodes_added = 0
        self._sentences: list[str] = []
        self._sentence_ids: dict[str, int] = {}
        self._episodes: deque[tuple[int, int]] = deque()  # (first row, rows), oldest first
        self._write = self._used = 0
        self._is_step = np.zeros(config.capacity, np.bool_)  # of a finished episode: all its rows but the last
        self._ring_cache: dict[int, _Starts] = {}
        self._running_cache: dict[int, _Starts] = {}

    # ----------------------------------------------------------------------------------------------------- properties
    def __len__(self) -> int:
        """Control steps in the buffer, running episodes included."""
        return sum(count - 1 for _, count in self._episodes) + int(self.running_steps.sum())

    @property
    def num_episodes(self) -> int:
        """Finished episodes in the ring."""
        return len(self._episodes)

    def last_episodes(self, num: int) -> list[tuple[bool, float, int]]:
        """Success, undiscounted raw return and length of the `num` episodes that came in last."""
        spans = [self._episodes[-1 - i] for i in range(min(num, len(self._episodes)))]
        rows = self.rows
        return [
            (bool(rows.success[first]), float(rows.reward[first : first + count].sum()), count - 1)
            for first, count in reversed(spans)
        ]

    @property
    def nbytes(self) -> int:
        """Memory of the rows, all of it from the beginning on. Start lists add at most 8 bytes a row and horizon."""
        arrays = [self._is_step, *self.rows.columns().values()]
        return sum(a.nbytes for a in arrays if not isinstance(a, np.memmap))

    @property
    def mapped_nbytes(self) -> int:
        """Size of the pictures' files."""
        return sum(a.nbytes for a in self.rows.columns().values() if isinstance(a, np.memmap))

    # -------------------------------------------------------------------------------------------------------- writing
    def add_episode(
        self,
        *,
        state: Any,
        actions: Any,
        rewards: Any,
        terminated: bool,
        truncated: bool,
        success: bool = False,
        images: Mapping[str, Any] | None = None,
        instruction: str = "",
        source: Any = Source.POLICY,
        proposals: Any = None,
        observed: Any = None,
    ) -> int:
        """Store a whole episode of T steps and return its id; the oldest episodes make room.

        `state` [T+1, S] and `images[camera]` uint8 [T+1, h, w, 3] have the final observation. `actions` [T, A] as
        executed; `proposals` [T, A] where they differ. `rewards` [T], raw. `source`: one for all or [T]. `observed`
        bool [T+1]: rows that have an observation (None: all). Data that was cut short is truncated.
        Raises ValueError for wrong shapes, numbers that are not finite, an episode larger than the buffer.
        """
        actions, rewards = np.asarray(actions, np.float32), np.asarray(rewards, np.float32)
        t = len(rewards)
        columns = {
            "state": (np.asarray(state, np.float32), (t + 1, self.state_dim)),
            "actions": (actions, (t, self.action_dim)),
            "proposals": (actions if proposals is None else np.asarray(proposals, np.float32), (t, self.action_dim)),
            "rewards": (rewards, (t,)),
            "observed": (np.ones(t + 1, bool) if observed is None else np.asarray(observed, bool), (t + 1,)),
        }
        images = images or {}
        if set(images) != set(self.cameras):
            raise ValueError(f"add_episode: images of {sorted(images)}, this buffer has {sorted(self.cameras)}")
        for camera, pictures in images.items():
            columns[f"images/{camera}"] = (np.asarray(pictures), (t + 1, *self.cameras[camera], 3))
        _check_episode(columns, terminated or truncated)
        returns = self._returns(rewards, terminated)  # before anything is stored: it may raise
        first = self._place(t + 1)
        rows, steps, whole = self.rows, slice(first, first + t), slice(first, first + t + 1)
        seen = columns["observed"][0]
        rows.obs[whole, : self.feature_dim] = 0
        rows.obs[whole, self.feature_dim :] = np.where(seen[:, None], columns["state"][0], 0)
        for camera in images:
            rows.images[camera][whole] = columns[f"images/{camera}"][0]
        for name in ("reward", "actions", "proposals", "source"):
            getattr(rows, name)[first + t] = 0
        rows.reward[steps], rows.actions[steps], rows.proposals[steps] = rewards, actions, columns["proposals"][0]
        rows.source[steps] = np.asarray(source)
        rows.policy_version[whole] = -1
        rows.terminated[whole] = rows.truncated[whole] = rows.featured[whole] = False
        rows.terminated[first + t - 1], rows.truncated[first + t - 1] = terminated, truncated
        rows.step[whole] = np.arange(t + 1)
        rows.instruction[whole] = self.sentence_id(instruction)
        rows.observed[whole] = seen
        self._seal(first, t, returns, success)
        return self.num_episodes_added - 1

    def finish_running(self, env: int) -> int:
        """Move the episode that environment `env` has ended into the ring, whole; returns its id."""
        first, t = self.slot(env), int(self.running_steps[env])
        last = first + t - 1
        returns = self._returns(self.rows.reward[first : first + t], bool(self.rows.terminated[last]))
        success = bool(self.rows.success[first : first + t].any())
        to = self._place(t + 1)
        self.rows.move(first, to, t + 1)
        self.running_steps[env] = 0
        self._seal(to, t, returns, success)
        return self.num_episodes_added - 1

    def slot(self, env: int) -> int:
        """First row of environment `env`'s running episode."""
        return self.config.capacity + env * self.slot_rows

    def finished_episodes(self, since: int = 0) -> list[tuple[int, int]]:
        """(first row, rows = steps + 1) of the episodes in the ring with an id of at least `since`, oldest first."""
        return [(first, count) for first, count in self._episodes if self.rows.episode[first] >= since]

    def instruction(self, row: int) -> str:
        return self._sentences[self.rows.instruction[row]]

    def sentence_id(self, instruction: str) -> int:
        if instruction not in self._sentence_ids:
            self._sentence_ids[instruction] = len(self._sentences)
            self._sentences.append(instruction)
        return self._sentence_ids[instruction]

    def running_changed(self) -> None:
        """To be called after running episodes were written to."""
        self._running_cache.clear()

    def _returns(self, rewards: np.ndarray, terminated: bool) -> np.ndarray:
        c = self.config
        low = None if c.reward_low is None else float(c.transform(np.asarray(c.reward_low)))
        return monte_carlo_returns(
            c.transform(rewards), terminated=terminated, gamma=c.gamma, reward_low=low, truncated=c.truncated_return
        )

    def _place(self, count: int) -> int:
        """First row of a free stretch of `count` rows; whole episodes in the way are dropped, oldest first."""
        capacity = self.config.capacity
        if count > capacity:
            raise ValueError(f"an episode of {count - 1} steps needs {count} rows, the capacity is {capacity}")
        if self._write + count > capacity:  # leave the rest of the ring empty rather than split an episode
            while self._episodes and self._episodes[0][0] >= self._write:
                self._drop_oldest()
            self._write = 0
        first = self._write
        while self._episodes and first <= self._episodes[0][0] < first + count:
            self._drop_oldest()
        self._write += count
        self._used = max(self._used, self._write)
        return first

    def _drop_oldest(self) -> None:
        first, count = self._episodes.popleft()
        self.rows.free(first, count)
        self._is_step[first : first + count] = False

    def _seal(self, first: int, t: int, returns: np.ndarray, success: bool) -> None:
        rows, whole = self.rows, slice(first, first + t + 1)
        rows.end[whole] = first + t
        rows.episode[whole] = self.num_episodes_added
        rows.success[whole] = success
        rows.mc_return[first : first + t], rows.mc_return[first + t] = returns, -np.inf
        self._is_step[first : first + t] = True
        self._episodes.append((first, t + 1))
        self.num_episodes_added += 1
        self._ring_cache.clear()
        self.running_changed()

    # ------------------------------------------------------------------------------------------------------- sampling
    def starts(self, horizon: int) -> np.ndarray:
        """All rows from which a chunk of `horizon` steps can be sampled, int64: they and the successor were observed.

        In a running episode the whole chunk must have been executed already.
        """
        return np.concatenate([self._ring_starts(horizon).rows, self._running_starts(horizon).rows])

    def sample(
        self,
        batch_size: int,
        rng: np.random.Generator,
        *,
        horizon: int,
        prefixes: bool = False,
        num_minibatches: int | None = None,
    ) -> ReplayBatch:
        """`batch_size` chunks of `horizon` steps, with replacement; [U, B, ...] with `num_minibatches` U.

        Raises ValueError where the buffer has no start of that horizon, RuntimeError where features are missing.
        """
        rows, weight = self._draw(batch_size * (num_minibatches or 1), rng, horizon)
        batch = self.batch(rows, horizon, prefixes)._replace(weight=weight)
        return batch if num_minibatches is None else batch.fold(num_minibatches)

    def batch(self, rows: np.ndarray, horizon: int, prefixes: bool = False) -> ReplayBatch:
        """The chunks that start at `rows` (int64 [B]). Raises ValueError for a row that is no start."""
        r, c = self.rows, self.config
        rows = np.asarray(rows, np.int64)
        k = np.minimum(horizon, r.end[rows] - rows)
        next_rows = rows + k
        bad = ~(r.observed[rows] & r.observed[next_rows] & (k > 0))
        if bad.any():
            raise ValueError(f"rows {rows[bad][:8].tolist()} are no starts of {horizon} steps; take them from starts()")
        i = np.arange(horizon)
        mask = i < k[:, None]
        steps = rows[:, None] + np.minimum(i, k[:, None] - 1)
        discounted = np.where(mask, c.transform(r.reward[steps]) * c.gamma**i, 0.0)
        goes_on = ~r.terminated[next_rows - 1]
        prefix: dict[str, np.ndarray] = {}
        if prefixes:
            taken = np.minimum(i + 1, k[:, None])
            to = rows[:, None] + taken
            prefix["prefix_reward"] = np.cumsum(discounted, axis=1).astype(np.float32)
            prefix["prefix_discount"] = (c.gamma**taken * ~r.terminated[to - 1]).astype(np.float32)
            prefix["prefix_next_obs"], prefix["prefix_mask"] = r.obs[to], r.observed[to]
            prefix["prefix_next_rows"] = to
        self._require_features(rows, next_rows, prefix)
        return ReplayBatch(
            obs=r.obs[rows],
            actions=r.actions[steps],
            mask=mask,
            reward=discounted.sum(axis=1).astype(np.float32),
            discount=(c.gamma**k * goes_on).astype(np.float32),
            next_obs=r.obs[next_rows],
            mc_return=r.mc_return[rows],
            weight=np.ones(len(rows), np.float32),
            rows=rows,
            next_rows=next_rows,
            **prefix,
        )

    def observations(self, rows: np.ndarray) -> Observation:
        """What a policy saw at `rows`: pictures, state, sentence. Raises ValueError where nobody looked."""
        rows = np.asarray(rows, np.int64)
        unseen = rows[~self.rows.observed[rows]]
        if len(unseen):
            raise ValueError(f"rows {unseen[:8].tolist()} have no observation")
        sentences = [self._sentences[i] for i in self.rows.instruction[rows].tolist()]
        return Observation(
            images={camera: torch.from_numpy(pictures[rows]) for camera, pictures in self.rows.images.items()},
            state=torch.from_numpy(self.rows.obs[rows, self.feature_dim :]),
            instruction=tuple(sentences),
        )

    def proposals(self, rows: np.ndarray, horizon: int) -> np.ndarray:
        """What the policy proposed for the chunks at `rows`, [B, H, A], padded as `actions` are."""
        rows = np.asarray(rows, np.int64)
        last = np.maximum(self.rows.end[rows] - 1, rows)
        return self.rows.proposals[np.minimum(rows[:, None] + np.arange(horizon), last[:, None])]

    def _draw(self, count: int, rng: np.random.Generator, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """Start rows and loss weights."""
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        parts = [s for s in (self._ring_starts(horizon), self._running_starts(horizon)) if len(s.rows)]
        if not parts:
            raise ValueError(
                f"no chunk of {horizon} steps can be sampled: {len(self)} steps are stored. Store episodes first; "
                "where only decision points are observed, take their distance as the horizon"
            )
        ones = np.ones(count, np.float32)
        edges = np.cumsum([len(s.rows) for s in parts])
        if parts[0].weights is None:
            return _pick([s.rows for s in parts], edges, rng.integers(edges[-1], size=count)), ones
        weights = [s.weights for s in parts if s.weights is not None]
        if self.config.weights.in_loss:
            picked = rng.integers(edges[-1], size=count)
            mean = sum(float(w.sum()) for w in weights) / edges[-1]
            rows = _pick([s.rows for s in parts], edges, picked)
            return rows, (_pick(weights, edges, picked) / mean).astype(np.float32)
        cumulative = parts[0].cumulative
        assert cumulative is not None
        if len(parts) > 1 and parts[1].cumulative is not None:
            cumulative = np.concatenate([cumulative, cumulative[-1] + parts[1].cumulative])
        picked = np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right")
        return _pick([s.rows for s in parts], edges, np.minimum(picked, edges[-1] - 1)), ones

    def _ring_starts(self, horizon: int) -> _Starts:
        if horizon not in self._ring_cache:
            r = self.rows
            rows = np.flatnonzero(r.observed[: self.config.capacity] & self._is_step)
            if len(rows) < np.count_nonzero(self._is_step):  # then a successor may be missing too
                rows = rows[r.observed[np.minimum(rows + horizon, r.end[rows])]]
            self._ring_cache[horizon] = self._weighted(rows, horizon)
        return self._ring_cache[horizon]

    def _running_starts(self, horizon: int) -> _Starts:
        if horizon not in self._running_cache:
            r = self.rows
            rows = self.config.capacity + np.flatnonzero(r.observed[self.config.capacity :])
            rows = rows[rows + horizon <= r.end[rows]]
            rows = rows[r.observed[rows + horizon]]
            if self.feature_dim:  # the features of the newest observation come with the next decision
                rows = rows[r.featured[rows] & r.featured[rows + horizon]]
            self._running_cache[horizon] = self._weighted(rows, horizon)
        return self._running_cache[horizon]

    def _weighted(self, rows: np.ndarray, horizon: int) -> _Starts:
        w = self.config.weights
        if w.uniform:
            return _Starts(rows, None, None)
        weights = np.where(self.rows.success[rows], w.success, 1.0)
        if w.reward != 1.0:
            before = np.concatenate([[0], np.cumsum(self.rows.reward > w.reward_above)])
            end = np.minimum(rows + horizon, self.rows.end[rows])
            weights = weights * np.where(before[end] > before[rows], w.reward, 1.0)
        return _Starts(rows, weights, np.cumsum(weights))

    # ------------------------------------------------------------------------------------------------------- features
    def set_features(self, rows: np.ndarray, features: Any, encoder_version: str) -> None:
        """Store `features [M, F]` of `rows`, made by the encoder `encoder_version`; those of another become missing."""
        features = np.asarray(features, np.float32)
        if features.shape != (len(rows), self.feature_dim) or not self.feature_dim:
            raise ValueError(f"features must be [{len(rows)}, F={self.feature_dim}], got {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError("features are not finite; look for a diverged encoder")
        if encoder_version != self.encoder_version:
            self.rows.featured[:] = False
            self.encoder_version = encoder_version
        self.rows.obs[rows, : self.feature_dim] = features
        self.rows.featured[rows] = True
        self.running_changed()

    def rows_without_features(self) -> np.ndarray:
        """Observed rows whose features are missing or of another encoder, int64."""
        return np.flatnonzero(self.rows.observed & ~self.rows.featured)

    def _require_features(self, rows: np.ndarray, next_rows: np.ndarray, prefix: Mapping[str, np.ndarray]) -> None:
        if not self.feature_dim:
            return
        there = self.rows.featured
        ok = bool(there[rows].all() and there[next_rows].all())
        if prefix:
            ok &= bool((there[prefix["prefix_next_rows"]] | ~prefix["prefix_mask"]).all())
        if not ok:
            raise RuntimeError(
                f"{len(self.rows_without_features())} observed rows have no features of the present encoder "
                f"({self.encoder_version}); call FeatureCache.refresh(buffer) before sampling"
            )

    # ---------------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Everything, running episodes included, as tensors that share the buffer's memory; write them or copy them."""
        columns = self.rows.columns()
        ring, capacity = self._used, self.config.capacity
        return {
            "layout": self._layout(),
            "ring": {name: torch.from_numpy(a[:ring]) for name, a in columns.items()},
            "running": {name: torch.from_numpy(a[capacity:]) for name, a in columns.items()},
            "running_steps": torch.from_numpy(self.running_steps.copy()),
            "episodes": [list(episode) for episode in self._episodes],
            "write": self._write,
            "num_episodes_added": self.num_episodes_added,
            "sentences": list(self._sentences),
            "encoder_version": self.encoder_version,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, and changes nothing, where the state is of a buffer with another config or other sizes."""
        here = self._layout()
        other = {k: (state["layout"].get(k), v) for k, v in here.items() if state["layout"].get(k) != v}
        if other:
            changes = ", ".join(f"{k}: {stored} -> {v}" for k, (stored, v) in other.items())
            raise ValueError(f"this state is of another replay buffer ({changes}); build the buffer with its config")
        fresh, capacity = len(state["ring"]["end"]), self.config.capacity
        self.rows.free(0, capacity)
        for name, array in self.rows.columns().items():
            if name == "policy_version" and name not in state["ring"]:  # a state from before there was this column
                array[:] = -1
                continue
            array[:fresh] = state["ring"][name].numpy()
            array[capacity:] = state["running"][name].numpy()
        self.running_steps[:] = state["running_steps"].numpy()
        self._episodes = deque((first, count) for first, count in state["episodes"])
        self._write, self._used = state["write"], fresh
        self._is_step[:] = self.rows.end[:capacity] > np.arange(capacity)
        self.num_episodes_added = state["num_episodes_added"]
        self._sentences = list(state["sentences"])
        self._sentence_ids = {sentence: i for i, sentence in enumerate(self._sentences)}
        self.encoder_version = state["encoder_version"]
        self._ring_cache.clear()
        self.running_changed()

    def save(self, path: str | Path) -> None:
        """Write the whole buffer, mapped pictures included, to one file; atomically."""
        save_state(path, self.state_dict())

    def load(self, path: str | Path) -> None:
        """Exactly what `save` wrote. Raises CheckpointError for a damaged file, ValueError for another buffer's."""
        self.load_state_dict(load_state(path))

    def _layout(self) -> dict[str, Any]:
        """What must agree for rows to mean the same. Returns are stored, so the reward's transform is in it."""
        config = {k: v for k, v in asdict(self.config).items() if k not in ("memory_map", "weights")}
        return config | {
            "state_dim": self.state_dim,
            "action_dim": self.action_dim,
            "feature_dim": self.feature_dim,
            "cameras": {name: list(size) for name, size in self.cameras.items()},
            "num_envs": self.num_envs,
            "slot_rows": self.slot_rows,
        }


def _pick(parts: list[np.ndarray], edges: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`np.concatenate(parts)[index]`, without making it. `edges`: where the parts end."""
    if len(parts) == 1:
        return parts[0][index]
    first, second = parts
    in_first = index < edges[0]
    picked = np.empty(len(index), first.dtype)
    picked[in_first], picked[~in_first] = first[index[in_first]], second[index[~in_first] - edges[0]]
    return picked


def _check_episode(columns: Mapping[str, tuple[np.ndarray, tuple[int, ...]]], ended: bool) -> None:
    if not ended:
        raise ValueError("add_episode: an episode has ended; data that was cut short is truncated=True")
    if not len(columns["rewards"][0]):
        raise ValueError("add_episode: the episode has no step")
    for name, (array, shape) in columns.items():
        if array.shape != shape:
            raise ValueError(f"add_episode: {name} must be {list(shape)}, got {list(array.shape)}")
        if name.startswith("images/") and array.dtype != np.uint8:
            raise ValueError(f"add_episode: {name} must be uint8, got {array.dtype}")
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise ValueError(f"add_episode: {name} has numbers that are not finite")
    if not columns["observed"][0][-1]:
        raise ValueError("add_episode: the final observation must be observed")


__all__ = ["ReplayBatch", "ReplayBuffer", "ReplayConfig", "SamplingWeights"]
