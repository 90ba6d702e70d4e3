"""What task, expert and control code sees of a simulation: named poses, as torch tensors of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vla_rl.sim.engine import Engine
from vla_rl.sim.scene import Scene


class SceneView:
    """Reads an engine by the scene's names. N environments; metres and radians; nothing is cached, all is current."""

    def __init__(self, scene: Scene, engine: Engine) -> None:
        self.scene = scene
        self.engine = engine
        self.num_envs = engine.num_sims
        self.device = engine.device
        self._tip = scene.sites["tip"]
        self._arm = torch.tensor(scene.arm_qpos, device=engine.device)
        self._fingers = torch.tensor(scene.finger_qpos, device=engine.device)
        self._bodies: dict[tuple[str, ...], Tensor] = {}

    @property
    def joint_positions(self) -> Tensor:
        """The arm's joints, rad, [N, 7]."""
        return self.engine.qpos.index_select(1, self._arm)

    @property
    def tip_pos(self) -> Tensor:
        """The point between the fingertips, m, [N, 3]."""
        return self.engine.site_xpos[:, self._tip]

    @property
    def tip_rotation(self) -> Tensor:
        """Rotation matrices of the gripper, [N, 3, 3]: the columns are its axes; the third points out of it."""
        return self.engine.site_xmat[:, self._tip].reshape(-1, 3, 3)

    @property
    def tip_yaw(self) -> Tensor:
        """Turn of the down-pointing gripper about z, rad, [N]; 0: the jaws move along y."""
        rotation = self.engine.site_xmat[:, self._tip]
        return torch.atan2(rotation[:, 3], rotation[:, 0])

    @property
    def gripper_opening(self) -> Tensor:
        """Distance between the jaws, m, [N], 0 (closed) to 0.08."""
        return self.engine.qpos.index_select(1, self._fingers).sum(dim=1)

    def object_pos(self, name: str) -> Tensor:
        """Origin of the asset `name`, m, [N, 3]."""
        return self.engine.xpos[:, self.scene.placements[name].body]

    def object_positions(self, names: Sequence[str]) -> Tensor:
        """Origins of the assets `names`, m, [N, len(names), 3]."""
        return self.engine.xpos.index_select(1, self._body_ids(tuple(names)))

    def object_quats(self, names: Sequence[str]) -> Tensor:
        """Orientations of the assets `names`, quaternions with w first, [N, len(names), 4]."""
        return self.engine.xquat.index_select(1, self._body_ids(tuple(names)))

    def object_yaw(self, name: str) -> Tensor:
        """Turn of the asset `name` about z, rad, [N]."""
        w, x, y, z = self.engine.xquat[:, self.scene.placements[name].body].unbind(dim=1)
        return torch.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))

    def object_speed(self, name: str) -> Tensor:
        """Speed of the movable asset `name`, m/s, [N]."""
        dof = self.scene.placements[name].dof
        if dof < 0:
            raise ValueError(f"object_speed: {name!r} is not movable")
        return torch.linalg.vector_norm(self.engine.qvel[:, dof : dof + 3], dim=1)

    def joint_position(self, asset: str) -> Tensor:
        """How far the sliding part of the asset (a drawer, a button) has moved, m, [N]."""
        joint = self.scene.assets[asset].joint
        if joint is None:
            raise ValueError(f"joint_position: {asset!r} has no joint; only drawers and buttons have")
        return self.engine.qpos[:, self.scene.joint_qpos[joint]]

    def site_pos(self, name: str) -> Tensor:
        """A site of the model, such as `drawer/handle`, m, [N, 3]."""
        return self.engine.site_xpos[:, self.scene.sites[name]]

    def _body_ids(self, names: tuple[str, ...]) -> Tensor:
        if names not in self._bodies:
            ids = [self.scene.placements[name].body for name in names]
            self._bodies[names] = torch.tensor(ids, dtype=torch.int64, device=self.device)
        return self._bodies[names]


def pick(candidates: Tensor, index: Tensor) -> Tensor:
    """Row `index[n]` of `candidates [N, M, ...]` for each n: [N, ...]; `index` int64 [N]."""
    rows = index.reshape(-1, *([1] * (candidates.ndim - 1))).expand(-1, 1, *candidates.shape[2:])
    return candidates.gather(1, rows).squeeze(1)
