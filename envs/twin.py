"""The digital twin's arm as an environment: learning and evaluation in real time, through the safety filter, with a
person at hand. What a recipe's tabletop is in simulation, this is on "hardware".

    TwinEnvConfig(operator="keyboard").make(1, split="train", auto_reset=True)

Its processes (the twin, the supervisor that owns the arm) are started here and end with it; a twin that runs is used.
An arm on a table has a file like this one, with its own driver, cameras and `begin`: see docs/add_a_robot.md.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vla_rl.core import Observation
from vla_rl.envs.vector import ChunkedEnv

if TYPE_CHECKING:
    from vla_rl.envs.config import EnvConfig
    from vla_rl.real_robot.interfaces import Teleop
    from vla_rl.real_robot.tabletop_arm import TabletopArm

Operator = Literal["none", "keyboard", "gamepad", "spacemouse"]
_FRESH_S = 2.0  # for pictures of a new episode


@dataclass(frozen=True)
class TwinEnvConfig:
    """`task`, `cameras`, `image_size`, `max_episode_steps`, `randomization`: of the tabletop, as in `EnvConfig`.

    `success`: "task" takes the twin's own predicate, anything else is the folder of a success classifier
    (`SuccessClassifier.save`). `operator`: the device by which a person takes over, in the split "train" alone: an
    evaluation is the policy's own. `limits`, `speed_scale`, `max_state_age_s`, `silence_s`: as in `DeployConfig`. Where
    the arm was stopped, its episode is lost and the next one begins: nobody can be hurt, so nobody is asked.
    """

    task: str = "reach"
    cameras: tuple[str, ...] = ("agent",)
    image_size: int = 64
    max_episode_steps: int | None = None
    randomization: str = "off"
    success: str = "task"
    operator: Operator = "none"
    limits: Literal["tabletop", "panda"] = "tabletop"
    speed_scale: float = 1.0
    max_state_age_s: float = 0.12
    silence_s: float = 0.12

    @property
    def control_hz(self) -> float:
        """Control steps a second."""
        return self.for_demos.control_hz

    @property
    def for_demos(self) -> EnvConfig:
        """The simulator that the twin is of: demonstrations there need no real time."""
        from vla_rl.envs.config import EnvConfig

        return EnvConfig(
            self.task,
            self.cameras,
            self.image_size,
            max_episode_steps=self.max_episode_steps,
            randomization=self.randomization,
        )

    def make(
        self,
        num_envs: int,
        *,
        split: str,
        auto_reset: bool = False,
        final_images: bool = False,
        task: str | None = None,
    ) -> ChunkedEnv:
        """Raises ValueError for more than one environment, FileNotFoundError for a classifier that is not there,
        HardwareError where the twin does not answer or is another one."""
        if num_envs != 1:
            raise ValueError(f"there is one arm: num_envs is {num_envs}, set it to 1 (online, evaluation, rollout)")
        success = None
        if self.success != "task":
            from vla_rl.train.success_classifier import SuccessClassifier

            success = SuccessClassifier.load(self.success).success
        robot = TwinRobot(replace(self, task=task or self.task), split)
        try:
            teleop = None
            if self.operator != "none" and split == "train":
                teleop = _teleop(self.operator, robot.arm.spec.gripper_range)
            return robot.env(teleop=teleop, success=success, auto_reset=auto_reset, final_images=final_images)
        except BaseException:
            robot.close()
            raise


class TwinRobot:
    """A twin and its guarded arm, from which `env` makes an environment, once; its `close` ends both.

    Raises HardwareError where they do not answer, ModuleNotFoundError without `pip install 'vla-rl[robot]'`.
    """

    def __init__(self, config: TwinEnvConfig, split: str) -> None:
        # Imported here: a config needs no hardware's packages.
        from vla_rl.envs.robot_hold import KeptAlive
        from vla_rl.real_robot.deploy_config import CAMERA_HZ
        from vla_rl.real_robot.deploy_processes import start_twin
        from vla_rl.real_robot.drivers.dds_arm import DDSArm, DDSArmConfig, DDSCamera, DDSCameraConfig
        from vla_rl.real_robot.supervisor import SupervisorClient, SupervisorConfig
        from vla_rl.real_robot.tabletop_arm import TabletopArm, tabletop_limits, tabletop_safety
        from vla_rl.real_robot.twin import TwinConfig

        self.config = config
        self._stack = ExitStack()
        wanted = TwinConfig(config.task, split, 0, config.cameras, config.image_size, CAMERA_HZ, config.randomization)
        try:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vla_rl_twin_")))
            self.episodes = start_twin(wanted, folder / "twin.log", self._stack)
            cameras = [DDSCameraConfig(name, f"/camera/{name}/image_raw") for name in config.cameras]
            self.cameras = [DDSCamera(camera) for camera in cameras]
            make_arm = partial(DDSArm, tabletop_limits(config.limits), DDSArmConfig(periods_ahead=0.2))
            safety = replace(tabletop_safety(), speed_scale=config.speed_scale, max_state_age_s=config.max_state_age_s)
            supervisor = SupervisorConfig(safety, timeout_s=config.silence_s, linger_s=0.0)
            guarded = self._stack.enter_context(SupervisorClient.start(make_arm, supervisor))
            kept = KeptAlive(guarded)
            self._stack.callback(kept.close)
            self.arm: TabletopArm = TabletopArm(kept)
        except BaseException:
            self._stack.close()
            raise

    def env(
        self,
        *,
        teleop: Teleop | None = None,
        success: Callable[[Observation], bool] | None = None,
        auto_reset: bool = False,
        final_images: bool = False,
    ) -> ChunkedEnv:
        """`success`: None takes the twin's predicate."""
        from vla_rl.envs.robot import RobotEnvConfig, RobotParts, RobotStepEnv
        from vla_rl.real_robot.takeover import Takeover, TakeoverConfig

        steps = self.config.max_episode_steps or self.episodes.state().max_steps
        parts = RobotParts(
            self.arm,
            self.arm,
            self.cameras,
            success=success or (lambda _: self.episodes.state().success_once),
            failure=lambda _: self.episodes.state().failure,
            begin=self._begin,
            confirm=lambda text: print(text, flush=True),
            teleop=teleop,
            takeover=None if teleop is None else Takeover(self.arm.spec, TakeoverConfig(), self.arm.solve),
            state_names=self.arm.state_names,
            state_of=self.arm.observe,
        )
        config = RobotEnvConfig(f"tabletop/{self.config.task}", "", self.config.control_hz, steps)
        return _Owned(RobotStepEnv(parts, config), self.close, auto_reset=auto_reset, final_images=final_images)

    def close(self) -> None:
        self._stack.close()

    def _begin(self, seed: int) -> str:
        state = self.episodes.reset(seed % 2**63)
        begun, end = time.monotonic(), time.monotonic() + _FRESH_S
        # What comes from now on is of the new episode.
        while min((camera.latest().stamp for camera in self.cameras), default=begun) < begun and time.monotonic() < end:
            time.sleep(0.002)
        self.arm.read()
        self.arm.begin()
        return state.instruction


class _Owned(ChunkedEnv):
    """Ends what was started for it."""

    def __init__(self, env: Any, end: Callable[[], None], **options: Any) -> None:
        super().__init__(env, **options)
        self._end = end

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._end()


def _teleop(operator: Operator, gripper_range: tuple[float, float]) -> Teleop:
    from vla_rl.real_robot.teleop import AxesTeleop, Gamepad, Keyboard, SpaceMouse, TeleopConfig

    device = {"keyboard": Keyboard, "gamepad": Gamepad, "spacemouse": SpaceMouse}[operator]()
    return AxesTeleop(device, TeleopConfig(gripper_range=gripper_range))


__all__ = ["Operator", "TwinEnvConfig", "TwinRobot"]
