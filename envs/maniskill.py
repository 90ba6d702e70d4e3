"""ManiSkill 3's tasks: on a CPU in processes of their own, on a GPU as one batch in this process.

env = ManiSkillConfig(task="PushCube-v1", cameras=()).make(4, split="train")

A CPU process wants a Vulkan driver, also for states (`make vulkan`, see `vla_rl.vulkan`), and the simulator's own
environment (`vla-rl env install maniskill`). The GPU batch wants `mani_skill` in this environment, and SAPIEN's physics
library for CUDA, which it downloads when first used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_rl.core import Observation
from vla_rl.envs.hosts import maniskill_host as host
from vla_rl.envs.install import simulator_python
from vla_rl.envs.remote import HostConfig, RemoteStepEnv, env_spec
from vla_rl.envs.vector import ChunkedEnv, split_stream, stream_seed
from vla_rl.protocols import StepOutcome
from vla_rl.vulkan import driver_environment

# The planner (mplib 0.1.1, pinned by mani_skill) is built for numpy 1 and crashes the process with numpy 2.
REQUIREMENTS = (("mani_skill==3.0.1", "torch==2.13.0", "numpy==1.26.4", "setuptools<81"),)

_PLANNED_STEPS = 300  # the planner takes its time: 50 to 280 steps, where most tasks give 50


@dataclass(frozen=True)
class ManiSkillConfig:
    """A ManiSkill task, by its registered id.

    `cameras`: of the task ("base_camera") or its robot ("hand_camera" with `robot="panda_wristcam"`), of `image_size`
    pixels in the square. `control`: a control mode of the robot, by ManiSkill's name. `reward`: "sparse" (1 at success,
    which ends the episode) or "dense" (ManiSkill's normalised one; success does not end the episode).
    `max_episode_steps`: None takes the registered one. `privileged_state`: all of ManiSkill's state, poses of objects
    too; else joints, the tool's pose and what pictures do not show. `backend`: "cpu" (`num_workers` processes, rendered
    by `render_backend` "cpu" or "gpu") or "gpu" (physics and pictures of all environments in one batch).
    `batch_seeds`: on the GPU, draw the episodes that begin together from one seed; fast, but then an episode depends on
    which others begin with it.
    """

    task: str = "PickCube-v1"
    cameras: tuple[str, ...] = ("base_camera",)
    image_size: int = 64
    control: str = "pd_ee_delta_pos"
    reward: str = "sparse"
    max_episode_steps: int | None = None
    privileged_state: bool = True
    robot: str | None = None
    backend: str = "cpu"
    render_backend: str = "cpu"
    num_workers: int = 1
    batch_seeds: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("reward", self.reward, ("sparse", "dense")),
            ("backend", self.backend, ("cpu", "gpu")),
            ("render_backend", self.render_backend, ("cpu", "gpu")),
        ):
            if value not in known:
                raise ValueError(f"ManiSkill: {name} {value!r} is unknown; use one of {', '.join(known)}")
        for name, number in (("image_size", self.image_size), ("num_workers", self.num_workers)):
            if number < 1:
                raise ValueError(f"ManiSkill: {name} must be at least 1, got {number}")
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise ValueError(f"ManiSkill: max_episode_steps must be at least 1, got {self.max_episode_steps}")
        if self.batch_seeds and self.backend == "cpu":
            raise ValueError("ManiSkill: batch_seeds is of the GPU batch alone; use backend='gpu' or leave it out")

    @property
    def control_hz(self) -> float:
        """Control steps a second of simulated time: ManiSkill's default, which its table-top tasks keep."""
        return 20.0

    @property
    def for_demos(self) -> ManiSkillConfig:
        """Where demonstrations are recorded: on the CPU, whose process has the experts, with time for a planner."""
        steps = self.max_episode_steps
        if self.control == "pd_joint_pos" and steps is None:
            steps = _PLANNED_STEPS
        return replace(self, backend="cpu", batch_seeds=False, max_episode_steps=steps)

    def options(self, task: str | None = None) -> dict[str, Any]:
        """What `hosts/maniskill_host.py` builds from."""
        return {
            "task": task or self.task,
            "cameras": list(self.cameras),
            "image_size": self.image_size,
            "control": self.control,
            "reward": self.reward,
            "max_episode_steps": self.max_episode_steps,
            "privileged_state": self.privileged_state,
            "robot": self.robot,
            "render_backend": "gpu" if self.backend == "gpu" else self.render_backend,
        }

    def make(
        self,
        num_envs: int,
        *,
        split: str,
        auto_reset: bool = False,
        final_images: bool = False,
        task: str | None = None,
    ) -> ChunkedEnv:
        """`num_envs` environments of `split` ("train" or "test"); `task` another one than the recipe's.

        Raises FileNotFoundError, with the command that helps, where the simulator is not installed.
        """
        options, stream = self.options(task), split_stream(split, "ManiSkill")
        if self.backend == "gpu":
            env: Any = ManiSkillGpuStepEnv(options, num_envs, stream=stream, batch_seeds=self.batch_seeds)
        else:
            drivers = driver_environment() if self.render_backend == "cpu" else {}
            config = HostConfig(simulator_python("maniskill"), "maniskill", options, drivers)
            env = RemoteStepEnv(config, num_envs, num_workers=min(self.num_workers, num_envs), stream=stream)
        return ChunkedEnv(env, auto_reset=auto_reset, final_images=final_images)


class ManiSkillGpuStepEnv:
    """A `StepEnv` over ManiSkill's own batch, all tensors on its device.

    ManiSkill moves all environments at each step. Those that must not move are put back where they were, and until they
    are reset they show what they showed. Objects whose shape a task draws (PegInsertionSide) are drawn when this is
    made. State is saved as poses, velocities and targets of controllers; what the physics engine remembers of contacts
    is not in it, so that a resumed run is the same run up to that.

    `sim`: "physx_cuda"; "physx_cpu" runs the same code with one environment, to test it.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        num_envs: int,
        *,
        stream: Sequence[int] = (),
        batch_seeds: bool = False,
        sim: str = "physx_cuda",
    ) -> None:
        self.num_envs = num_envs
        self._env = env = host.open_env(options, num_envs, sim)
        self._cameras = host.check_cameras(env, options["cameras"])
        self._options, self._stream, self._batch_seeds = dict(options), tuple(stream), batch_seeds
        self._sentence = host.instruction_of(options["task"])
        info = env.get_info()
        self.spec = env_spec(host.spec_of(env, options, self._cameras, info))
        self._low, self._high = (
            torch.tensor(x, device=env.device) for x in (self.spec.action.low, self.spec.action.high)
        )
        self._state = self._read(info)

    def reset(self, env_ids: Tensor, seeds: Tensor) -> None:
        ids = env_ids.to(self._env.device)
        numbers = [stream_seed(self._stream, seed) for seed in seeds.tolist()]
        info: Mapping[str, Any] = {}
        # ManiSkill draws all episodes of a reset from its first seed, so each gets a reset of its own
        groups = [ids] if self._batch_seeds else ids[:, None]
        drawn = [int(np.random.SeedSequence(numbers).generate_state(1)[0])] if self._batch_seeds else numbers
        for group, seed in zip(groups, drawn, strict=True):
            _, info = self._env.reset(seed=[host.seed_of(seed)] * self.num_envs, options={"env_idx": group})
        self._state = self._state.index_copy(0, ids, self._read(info)[ids])

    def step(self, actions: Tensor, active: Tensor) -> StepOutcome:
        env = self._env
        moving = active.to(env.device)
        # one question to the device a step; PhysX's own step waits for it several times
        kept = None if bool(moving.all()) else self._snapshot()
        rest = torch.zeros_like(self._low)
        command = torch.where(moving[:, None], actions.to(env.device, torch.float32), rest).clamp(self._low, self._high)
        _, reward, _, _, info = env.step(command)
        reward, terminated, success = host.outcome(env, reward, info, self._options["reward"] == "dense")
        self._state = torch.where(moving[:, None], self._read(info), self._state)
        if kept is not None:
            self._put_back(kept, ~moving)
        flags = (terminated, torch.zeros_like(terminated), success)
        return StepOutcome(reward.to(actions.device), *(flag.to(actions.device) for flag in flags))

    def observe(self, env_ids: Tensor, images: bool) -> Observation:
        ids = env_ids.to(self._env.device)
        pictures = host.pictures_of(self._env, self._cameras) if images else {}
        return Observation(
            {camera: picture[ids] for camera, picture in pictures.items()},
            self._state[ids],
            (self._sentence,) * len(env_ids),
        )

    def render(self, env_ids: Tensor) -> Tensor:
        return self._env.render_rgb_array()[env_ids.to(self._env.device)]

    def state_dict(self) -> dict[str, Any]:
        return {**self._snapshot(), "state": self._state.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        everyone = torch.ones(self.num_envs, dtype=torch.bool, device=self._env.device)
        self._put_back({"sim": state["sim"], "controller": state["controller"]}, everyone)
        self._state = state["state"].to(self._env.device).clone()

    def close(self) -> None:
        self._env.close()

    def _read(self, info: Mapping[str, Any]) -> Tensor:
        return host.state_of(self._env, info, bool(self._options["privileged_state"]))

    def _snapshot(self) -> dict[str, Any]:
        """Poses and velocities of all, and the targets of controllers that have some."""
        tree = {"sim": self._env.scene.get_sim_state(), "controller": self._env.agent.get_controller_state()}
        return _mapped(tree, lambda leaf: leaf.clone())

    def _put_back(self, kept: Mapping[str, Any], rows: Tensor) -> None:
        """Put the environments of `rows` (bool [N]) where they were at `kept`."""
        env, ids = self._env, rows.nonzero().flatten()
        env.set_state_dict(_mapped(kept["sim"], lambda leaf: leaf.to(env.device)[ids]), ids)
        if kept["controller"]:
            now = env.agent.get_controller_state()
            before = _mapped(kept["controller"], lambda leaf: leaf.to(env.device))
            env.agent.set_controller_state(_mapped(now, lambda new, old: torch.where(rows[:, None], old, new), before))


def _mapped(tree: Mapping[str, Any], change: Callable[..., Tensor], *others: Mapping[str, Any]) -> dict[str, Any]:
    """`change` of each tensor of a nested dictionary, and of those at the same place in `others`."""
    return {
        key: _mapped(value, change, *(other[key] for other in others))
        if isinstance(value, Mapping)
        else change(value, *(other[key] for other in others))
        for key, value in tree.items()
    }
