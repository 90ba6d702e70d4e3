"""How robosuite, LIBERO and Metaworld are started: in their own Python, with the same options and the same OpenGL."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from vla_rl.envs.install import simulator_python
from vla_rl.envs.remote import HostConfig, RemoteStepEnv
from vla_rl.envs.vector import ChunkedEnv

_RENDER_SIZE = 256  # of pictures for people


def make_mujoco(
    simulator: str,
    options: Mapping[str, Any],
    num_envs: int,
    *,
    stream: Sequence[int],
    auto_reset: bool,
    final_images: bool,
    environment: Mapping[str, str] | None = None,
) -> ChunkedEnv:
    """`num_envs` environments of `hosts/<simulator>_host.py`.

    `options`: the fields of a simulator's config and what its host wants beside; `cameras` become squares of
    `image_size` pixels. `stream`: see `RemoteStepEnv`. `environment`: variables of the processes. Raises
    FileNotFoundError where the simulator is not installed, SimulatorError where it refuses the options.
    """
    size = options["image_size"]
    host = HostConfig(
        simulator_python(simulator),
        simulator,
        {
            **options,
            "cameras": {camera: [size, size] for camera in options["cameras"]},
            "render_size": [_RENDER_SIZE, _RENDER_SIZE],
        },
        environment={"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl"), **(environment or {})},
    )
    env = RemoteStepEnv(host, num_envs, num_workers=options["num_workers"], stream=stream)
    return ChunkedEnv(env, final_images=final_images, auto_reset=auto_reset)
