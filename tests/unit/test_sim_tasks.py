"""Tasks: episodes that depend on their seed alone, disjoint splits, shifts that shift, and a user's own task."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv, make_tabletop
from vla_rl.sim.language import COLORS, OOD_COLORS
from vla_rl.sim.scene import Block, Zone
from vla_rl.sim.tasks import TASKS, get_task, register_task
from vla_rl.sim.tasks.base import (
    OOD_REGION,
    SPLITS,
    TRAIN_REGION,
    Draw,
    EpisodeStart,
    Plan,
    Pose,
    TaskStatus,
    falling,
)
from vla_rl.sim.tasks.reach import OOD_TEMPLATES, TEMPLATES
from vla_rl.sim.view import SceneView

torch.set_num_threads(1)


def _samples(split: str, count: int = 60) -> list[EpisodeStart]:
    return [TASKS["reach"].sample(Draw("reach", split, seed)) for seed in range(count)]


def test_an_episode_depends_on_task_split_and_seed() -> None:
    again, other = _samples("train"), _samples("test")
    for first, second, third in zip(_samples("train"), again, other, strict=True):
        assert first == second
        assert first.poses != third.poses
    assert Draw("a", "train", 0).rng.random() != Draw("b", "train", 0).rng.random()


def test_train_and_test_have_one_distribution_of_words_and_colours() -> None:
    for split in ("train", "test"):
        samples = _samples(split, 300)
        used = {color for s in samples for name, color in s.colors.items() if name.startswith("block")}
        assert used == set(COLORS.values())
        words = {s.instruction.replace("cube", "block") for s in samples}
        assert words == {t.format(color=c, noun="block") for t in TEMPLATES for c in COLORS}
        assert {s.variables["target"] for s in samples} == {0, 1, 2}  # pyright: ignore[reportUnhashable]


def test_objects_lie_apart_and_inside() -> None:
    for split, region in (("train", TRAIN_REGION), ("ood", OOD_REGION)):
        for start in _samples(split):
            poses = list(start.poses.values())
            assert all(region.contains(p.x, p.y) for p in poses)
            distances = [
                (a.x - b.x) ** 2 + (a.y - b.y) ** 2 for i, a in enumerate(poses) for b in poses[:i]
            ]  # fmt: skip
            assert min(distances) >= 0.085**2


def test_each_shift_moves_its_own_axis_only() -> None:
    unseen = set(OOD_COLORS.values())
    for split in SPLITS:
        shifted = Draw("reach", split, 0).shifted
        for start in _samples(split, 20):
            colors = {color for name, color in start.colors.items() if name.startswith("block")}
            assert (colors <= unseen) == ("colors" in shifted)
            assert any(TRAIN_REGION.contains(p.x, p.y) for p in start.poses.values()) != ("positions" in shifted)
            endings = [t.format(color="#", noun="#").split("#")[0] for t in OOD_TEMPLATES]
            assert any(start.instruction.startswith(e) for e in endings) == ("sentences" in shifted)
    assert Draw("reach", "ood", 0).shifted == {"colors", "positions", "distractors", "sentences"}
    assert Draw("reach", "ood_colors", 0).shifted == {"colors"}


def test_the_sentence_names_the_target() -> None:
    for start in _samples("train"):
        rgba = start.colors[f"block{start.variables['target']}"]
        name = next(n for n, c in COLORS.items() if c == rgba)
        assert f" {name} " in start.instruction


def test_bad_draws_are_errors() -> None:
    with pytest.raises(ValueError, match="train, test, ood"):
        Draw("reach", "validation", 0)
    with pytest.raises(ValueError, match="do not fit"):
        Draw("reach", "train", 0).place([f"b{i}" for i in range(12)], min_distance=0.15)
    with pytest.raises(ValueError, match="there are 6"):
        Draw("reach", "train", 0).colors(7)


def test_place_keeps_clear_of_what_is_there() -> None:
    draw = Draw("reach", "train", 4)
    first = draw.place(["a"], min_distance=0.0)
    second = draw.place(["b", "c"], min_distance=0.1, avoid=first)
    for pose in second.values():
        assert (pose.x - first["a"].x) ** 2 + (pose.y - first["a"].y) ** 2 >= 0.01


def test_falling_is_one_at_zero() -> None:
    assert torch.allclose(falling(torch.tensor([0.0, 0.2]), 0.2), torch.tensor([1.0, 0.2384]), atol=1e-4)


# ------------------------------------------------------------------------------------------- a task of another author
class PushToZone:
    """What a user writes: push the block onto the disc. Counts how long it has been there."""

    name = "push_to_zone"
    max_episode_steps = 30
    goal_names = ("zone_x", "zone_y")

    def assets(self) -> list[Block | Zone]:
        return [Block("block"), Zone("zone")]

    def sample(self, draw: Draw) -> EpisodeStart:
        (color,) = draw.colors(1).values()
        return EpisodeStart(
            poses=draw.place(["block", "zone"], min_distance=0.12),
            instruction=draw.sentence(["push the block onto the disc"], ["the disc wants the block"]),
            variables={"steps_on_zone": 0},
            colors={"zone": color},
        )

    def evaluate(self, view: SceneView, variables: Mapping[str, Tensor]) -> TaskStatus:
        gap = (view.object_pos("block") - view.object_pos("zone"))[:, :2].norm(dim=1)
        held = torch.where(gap < 0.06, variables["steps_on_zone"] + 1, 0)
        fallen = view.object_pos("block")[:, 2] < -0.05
        return TaskStatus(held >= 3, fallen, falling(gap, 0.2), {"steps_on_zone": held})

    def goal(self, view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
        return view.object_pos("zone")[:, :2]

    def plan(self, view: SceneView, variables: Mapping[str, Tensor]) -> Plan:
        block = view.object_pos("block")
        return Plan(block[:, None], -torch.ones(len(block), 1), torch.zeros(len(block), 1, dtype=torch.bool))


def test_a_users_task_runs_by_instance_and_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_tabletop(PushToZone(), num_envs=3, privileged_state=True, reward="dense")
    obs = env.reset([0, 1, 2])
    assert obs.instruction == ("push the block onto the disc",) * 3
    assert env.spec.state_names[-4:] == ("block_qw", "block_qx", "block_qy", "block_qz")
    assert "zone_x" in env.spec.state_names
    monkeypatch.setattr("vla_rl.sim.tasks.base.TASKS", dict(TASKS))
    register_task(PushToZone)
    assert make_tabletop("push_to_zone").spec.max_episode_steps == 30


def test_a_tasks_own_memory_counts_active_steps_only() -> None:
    env = TabletopEnv(PushToZone(), 2, TabletopConfig())
    env.reset(torch.arange(2), torch.arange(2))
    block, zone = env.scene.placements["block"].address, env.scene.placements["zone"].address
    env.engine.qpos[:, block : block + 2] = env.engine.mocap_pos[:, zone, :2]
    still = torch.zeros(2, 4)
    env.step(still, torch.tensor([True, True]))
    env.step(still, torch.tensor([True, False]))
    assert env.variables["steps_on_zone"].tolist() == [2, 1]
    outcome = env.step(still, torch.tensor([True, True]))
    assert outcome.success.tolist() == [True, False]
    env.reset(torch.tensor([0]), torch.tensor([9]))
    assert env.variables["steps_on_zone"].tolist() == [0, 2]


def test_mistakes_of_a_task_author_are_explained() -> None:
    class Forgetful(PushToZone):
        def sample(self, draw: Draw) -> EpisodeStart:
            return EpisodeStart(poses={"block": Pose(0.5, 0.0)}, instruction="?", colors={"blok": (1, 0, 0, 1)})

    with pytest.raises(ValueError, match=r"missing \['zone'\]; unknown \['blok'\]"):
        make_tabletop(Forgetful())

    class Impostor(PushToZone):
        name = "reach"

    with pytest.raises(ValueError, match="is taken by Reach"):
        register_task(Impostor)
    with pytest.raises(ValueError, match="there are"):
        get_task("fly")
