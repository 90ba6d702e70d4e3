"""Any Gymnasium environment, single or vector, as a chunked one.

`make_gym("Pendulum-v1", num_envs=4)` builds the environments; `GymStepEnv(vector_env)` takes a vector environment that
somebody else built, in any of Gymnasium 1.x's autoreset modes. The mode decides only what the vector environment does
to a sub-environment between its end and our own, seeded reset; whatever it does there is never shown to anybody:

    NEXT_STEP   it resets itself in the step after the end (which ignores the action) and goes on
    SAME_STEP   it resets itself at once; the true last observation is in `infos["final_obs"]`
    DISABLED    it refuses to step an ended sub-environment, so that one is parked by a masked reset

Make an `AsyncVectorEnv` with `context="forkserver"`: JAX and torch run threads, and a forked copy of them may hang.

State is saved as the seed and the actions of the running episode and restored by playing them again, which is exact for
an environment that is deterministic given its seed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from vla_rl.core import ActionSpec, CameraSpec, EnvSpec, Observation
from vla_rl.envs.expert_noise import add_noise
from vla_rl.envs.vector import ChunkedEnv, split_stream, stream_seed
from vla_rl.protocols import StepOutcome

_GYM_SEED_LIMIT = 2**32 - 1


class GymStepEnv:
    """A `StepEnv` over a Gymnasium vector environment with a `Box` action space.

    A vector observation becomes `state`; of a `Dict`, uint8 [h, w, 3] entries become cameras and all other entries are
    flattened into `state` in the order of their keys. `success_key` names the entry of `info` with the task's success;
    with `success_is_end` a termination is one; without either, an environment never reports success. `control_hz`
    defaults to the `render_fps` of the environment. `stream`: numbers that are mixed into every seed, for splits that
    do not share an episode.
    """

    def __init__(
        self,
        vector_env: VectorEnv,
        *,
        instruction: str = "",
        success_key: str | None = None,
        success_is_end: bool = False,
        control_hz: float | None = None,
        stream: Sequence[int] = (),
    ) -> None:
        if "autoreset_mode" not in vector_env.metadata:
            raise ValueError(
                f"{vector_env}: metadata['autoreset_mode'] is missing; "
                "vla-rl needs a vector environment of Gymnasium >= 1.1"
            )
        space = vector_env.single_action_space
        if not isinstance(space, gym.spaces.Box) or space.shape is None or len(space.shape) != 1:
            raise ValueError(f"the action space must be a one-dimensional Box, got {space}")
        if not np.all(np.isfinite(space.low)) or not np.all(np.isfinite(space.high)):
            raise ValueError(f"the action space must be bounded, got {space}; wrap it in gymnasium's RescaleAction")
        self._env = vector_env
        self._mode = AutoresetMode(vector_env.metadata["autoreset_mode"])
        self._instruction = instruction
        self._success_key, self._success_is_end = success_key, success_is_end
        self._stream = tuple(stream)
        self.num_envs = vector_env.num_envs
        self._cameras, self._state_keys, names = _split_observation(vector_env.single_observation_space)
        spec = vector_env.spec
        self.spec = EnvSpec(
            name=spec.id if spec is not None else type(vector_env).__name__,
            cameras=self._cameras,
            state_names=names,
            action=ActionSpec(
                tuple(space.low.tolist()),
                tuple(space.high.tolist()),
                tuple(f"action_{i}" for i in range(space.shape[0])),
            ),
            # Gymnasium's own TimeLimit truncates at the same step; who allocates or evaluates must know it
            max_episode_steps=None if spec is None else spec.max_episode_steps,
            control_hz=float(control_hz or vector_env.metadata.get("render_fps") or 20.0),
        )
        self._state = torch.zeros(self.num_envs, len(names))
        self._images = {
            c: torch.zeros(self.num_envs, s.height, s.width, 3, dtype=torch.uint8) for c, s in self._cameras.items()
        }
        self._ended = np.ones(self.num_envs, dtype=bool)  # as the vector environment has it now
        self._over = np.ones(
            self.num_envs, dtype=bool
        )  # our episode is over, also where the environment was parked since
        self._in_sync = np.zeros(
            self.num_envs, dtype=bool
        )  # what is shown is what the vector environment last returned
        self._seeds = [0] * self.num_envs
        self._history: list[list[np.ndarray]] = [[] for _ in range(self.num_envs)]
        self._started = False

    @property
    def vector_env(self) -> VectorEnv:
        """Gymnasium's own."""
        return self._env

    def reset(self, env_ids: Tensor, seeds: Tensor) -> None:
        mask = np.zeros(self.num_envs, dtype=bool)
        for i, seed in zip(env_ids.tolist(), seeds.tolist(), strict=True):
            mask[i] = True
            self._seeds[i] = stream_seed(self._stream, seed)
            self._history[i] = []
        self._over = self._over & ~mask
        self._in_sync = self._in_sync & ~mask
        self._keep(self._masked_reset(mask), mask)
        self._in_sync = self._in_sync | mask

    def step(self, actions: Tensor, active: Tensor) -> StepOutcome:
        moving = active.numpy()
        parked = ~moving & self._ended
        if self._mode == AutoresetMode.DISABLED and parked.any():
            self._masked_reset(parked)
        clamped = self.spec.action.clamp(actions).numpy().astype(self._env.single_action_space.dtype)
        for i in np.flatnonzero(moving):
            self._history[i].append(clamped[i].copy())
        obs, reward, terminated, truncated, infos = self._env.step(clamped)
        ended = terminated | truncated
        self._keep(obs, moving & ~ended if self._mode == AutoresetMode.SAME_STEP else moving)
        if self._mode == AutoresetMode.SAME_STEP and ended.any():
            for i in np.flatnonzero(ended & moving):
                self._keep_one(infos["final_obs"][i], int(i))
        self._ended = ended
        self._over = self._over | (moving & ended)
        self._in_sync = moving & ~ended
        return StepOutcome(
            reward=torch.as_tensor(reward, dtype=torch.float32),
            terminated=torch.as_tensor(terminated),
            truncated=torch.as_tensor(truncated),
            success=torch.as_tensor(terminated if self._success_is_end else self._success(infos, ended)),
        )

    def observe(self, env_ids: Tensor, images: bool) -> Observation:
        return Observation(
            images={c: x[env_ids].clone() for c, x in self._images.items()} if images else {},
            state=self._state[env_ids].clone(),
            instruction=(self._instruction,) * len(env_ids),
        )

    def render(self, env_ids: Tensor) -> Tensor:
        frames = self._env.render()
        if frames is None or any(frames[i] is None for i in env_ids.tolist()):
            raise RuntimeError(f"{self.spec.name} renders nothing; build it with render_mode='rgb_array'")
        return torch.stack([torch.as_tensor(np.asarray(frames[i])) for i in env_ids.tolist()])

    def state_dict(self) -> dict[str, Any]:
        dim = self.spec.action.dim
        return {
            "seeds": list(self._seeds),
            "history": [torch.as_tensor(np.array(h, dtype=np.float64).reshape(len(h), dim)) for h in self._history],
            "ended": torch.as_tensor(self._over.copy()),
            "state": self._state.clone(),
            "images": {c: x.clone() for c, x in self._images.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replay the running episodes. They are of different lengths, so each begins as late as it must."""
        dtype = self._env.single_action_space.dtype
        ended = state["ended"].numpy().copy()
        history = [[] if ended[i] else [a.numpy().astype(dtype) for a in h] for i, h in enumerate(state["history"])]
        self._seeds = list(state["seeds"])
        self._in_sync[:] = False
        self._masked_reset(np.ones(self.num_envs, dtype=bool))
        longest = max(map(len, history))
        idle = np.zeros((self.num_envs, self.spec.action.dim), dtype=dtype)
        for t in range(longest):
            begin = np.array([len(h) == longest - t for h in history])
            waiting = np.array([len(h) < longest - t for h in history])
            if begin.any() and t > 0:
                self._masked_reset(begin)
            if self._mode == AutoresetMode.DISABLED and (self._ended & waiting).any():
                self._masked_reset(self._ended & waiting)
            offset = t - longest
            actions = np.stack([h[offset] if len(h) >= -offset else idle[i] for i, h in enumerate(history)])
            _, _, terminated, truncated, _ = self._env.step(actions)
            self._ended = terminated | truncated
        last = np.array([len(h) == 0 for h in history]) & ~ended
        if last.any() and longest > 0:
            self._masked_reset(last)
        self._history = history
        self._over = ended
        self._in_sync = ~ended
        self._state = state["state"].clone()
        self._images = {c: x.clone() for c, x in state["images"].items()}

    def close(self) -> None:
        self._env.close()

    def _masked_reset(self, mask: np.ndarray) -> Any:
        """Reset the sub-environments of `mask` with their seeds; the others must not notice."""
        seeds: Any = [seed % _GYM_SEED_LIMIT for seed in self._seeds]  # one each; Gymnasium annotates a single one
        if not self._started or mask.all():
            obs, _ = self._env.reset(seed=seeds)
            self._started = True
        else:
            some: Any = [s if m else None for s, m in zip(seeds, mask, strict=True)]
            obs, _ = self._env.reset(seed=some, options={"reset_mask": mask.copy()})
            others = ~mask & self._in_sync
            state, _ = self._convert(obs)
            if not np.array_equal(state.numpy()[others], self._state.numpy()[others], equal_nan=True):
                raise RuntimeError(
                    f"{self.spec.name} does not honour options['reset_mask'] "
                    "(a partial reset moved other environments); use gymnasium's SyncVectorEnv or AsyncVectorEnv"
                )
        self._ended = self._ended & ~mask
        return obs

    def _convert(self, obs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if not isinstance(obs, Mapping):
            if self._cameras:
                camera = next(iter(self._cameras))
                return torch.zeros(self.num_envs, 0), {camera: torch.as_tensor(np.asarray(obs))}
            return torch.as_tensor(np.asarray(obs, dtype=np.float32).reshape(self.num_envs, -1)), {}
        parts = [np.asarray(obs[k], dtype=np.float32).reshape(self.num_envs, -1) for k in self._state_keys]
        state = np.concatenate(parts, axis=1) if parts else np.zeros((self.num_envs, 0), np.float32)
        return torch.as_tensor(state), {c: torch.as_tensor(np.asarray(obs[c])) for c in self._cameras}

    def _keep(self, obs: Any, mask: np.ndarray) -> None:
        state, images = self._convert(obs)
        rows = torch.as_tensor(np.flatnonzero(mask))
        self._state[rows] = state[rows]
        for camera, image in images.items():
            self._images[camera][rows] = image[rows]

    def _keep_one(self, obs: Any, i: int) -> None:
        if not isinstance(obs, Mapping):
            if self._cameras:
                self._images[next(iter(self._cameras))][i] = torch.as_tensor(np.asarray(obs))
            else:
                self._state[i] = torch.as_tensor(np.asarray(obs, dtype=np.float32).reshape(-1))
            return
        if self._state_keys:
            parts = [np.asarray(obs[k], dtype=np.float32).reshape(-1) for k in self._state_keys]
            self._state[i] = torch.as_tensor(np.concatenate(parts))
        for camera in self._cameras:
            self._images[camera][i] = torch.as_tensor(np.asarray(obs[camera]))

    def _success(self, infos: Mapping[str, Any], ended: np.ndarray) -> np.ndarray:
        if self._success_key is None:
            return np.zeros(self.num_envs, dtype=bool)
        success = np.array(infos.get(self._success_key, np.zeros(self.num_envs)), dtype=bool)
        if self._mode == AutoresetMode.SAME_STEP and "final_info" in infos:
            final = np.array(infos["final_info"].get(self._success_key, np.zeros(self.num_envs)), dtype=bool)
            success = np.where(ended, final, success)
        return success


def _split_observation(space: gym.Space) -> tuple[dict[str, CameraSpec], list[str], tuple[str, ...]]:
    """Cameras, keys of the state, names of the state's entries."""

    def is_image(s: gym.Space) -> bool:
        return isinstance(s, gym.spaces.Box) and s.dtype == np.uint8 and len(s.shape) == 3 and s.shape[-1] == 3

    if isinstance(space, gym.spaces.Box):
        if is_image(space):
            return {"rgb": CameraSpec(*space.shape[:2])}, [], ()
        return {}, [], tuple(f"obs_{i}" for i in range(int(np.prod(space.shape))))
    if isinstance(space, gym.spaces.Dict):
        cameras = {k: CameraSpec(*s.shape[:2]) for k, s in space.spaces.items() if is_image(s) and s.shape is not None}
        keys = [k for k in space.spaces if k not in cameras]
        for key in keys:
            if not isinstance(space.spaces[key], gym.spaces.Box):
                raise ValueError(f"observation entry {key!r} is a {space.spaces[key]}; only Box entries are understood")
        names = tuple(f"{k}_{i}" for k in keys for i in range(int(np.prod(space.spaces[k].shape or (1,)))))
        return cameras, keys, names
    raise ValueError(f"the observation space must be a Box or a Dict of Boxes, got {space}; flatten it first")


def make_gym(
    env: str | Sequence[Callable[[], gym.Env]],
    num_envs: int = 1,
    *,
    instruction: str = "",
    success_key: str | None = None,
    images: bool = True,
    auto_reset: bool = True,
) -> ChunkedEnv:
    """Chunked environments from a Gymnasium id, or from one function an environment that builds it.

    Single environments run one after another in this process. Raises gymnasium's own error for an unknown id.
    """
    makers = [lambda: gym.make(env)] * num_envs if isinstance(env, str) else list(env)
    vector = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)
    step_env = GymStepEnv(vector, instruction=instruction, success_key=success_key)
    return ChunkedEnv(step_env, images=images, auto_reset=auto_reset)


@dataclass(frozen=True)
class GymConfig:
    """A Gymnasium environment in this process, for recipes.

    `task`: a registered id; "module:Id" imports the module first. `success`: the entry of `info` that says so, or "end"
    where a termination is one. `max_episode_steps`: None takes the registered limit.
    """

    task: str
    instruction: str = "do the task"
    success: str = "success"
    max_episode_steps: int | None = None
    control_hz: float = 20.0

    @property
    def cameras(self) -> tuple[str, ...]:
        """What the environment's observation has is what there is."""
        return ()

    def make(
        self,
        num_envs: int,
        *,
        split: str,
        auto_reset: bool = False,
        final_images: bool = False,
        task: str | None = None,
    ) -> ChunkedEnv:
        """`num_envs` environments of `split` ("train" or "test": no seed gives the same episode in both).

        Raises ValueError for an unknown split, and gymnasium's own error for an unknown id.
        """
        stream = split_stream(split, "gymnasium")
        name, steps = task or self.task, self.max_episode_steps
        makers = [lambda: gym.make(name, max_episode_steps=steps, render_mode="rgb_array")] * num_envs
        vector = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)
        vector.spec = vector.envs[0].spec  # Gymnasium knows it only of vectors that it made itself
        step_env = GymStepEnv(
            vector,
            instruction=self.instruction,
            success_key=None if self.success == "end" else self.success,
            success_is_end=self.success == "end",
            control_hz=self.control_hz,
            stream=stream,
        )
        return ChunkedEnv(step_env, final_images=final_images, auto_reset=auto_reset)


@dataclass(frozen=True)
class FunctionExpertConfig:
    """An expert that is a function of the state: `function`, "module:function", maps float32 [N, S] to actions [N, A].
    `action_noise`: see `add_noise`."""

    function: str
    action_noise: float = 0.0


class FunctionExpert:
    """Acts in `env` by a function of its state, with the noise of `add_noise`."""

    def __init__(self, env: ChunkedEnv, config: FunctionExpertConfig) -> None:
        module, _, name = config.function.partition(":")
        self._act: Callable[[np.ndarray], np.ndarray] = getattr(importlib.import_module(module), name)
        self._env, self._config = env, config

    def __call__(self) -> Tensor:
        """Actions [N, 1, A]."""
        actions = torch.as_tensor(self._act(self._env.observe().state.numpy()), dtype=torch.float32)[:, None]
        return add_noise(actions, self._env, self._config.action_noise)
