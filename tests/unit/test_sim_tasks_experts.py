"""Every task: its expert succeeds, its sentence matters, its clocks and rewards make sense.

`make test-slow` runs 200 seeds of every split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv, make_tabletop
from vla_rl.sim.experts import ExpertConfig, ScriptedExpert
from vla_rl.sim.language import COLORS, OOD_COLORS
from vla_rl.sim.scene import Block
from vla_rl.sim.tasks import SPLITS, TASKS, store
from vla_rl.sim.tasks.base import OOD_AXES, Draw, EpisodeStart, Plan
from vla_rl.sim.tasks.pick import Pick
from vla_rl.sim.tasks.waypoints import CLOSED, OPEN, Waypoint, make_plan
from vla_rl.sim.view import SceneView

torch.set_num_threads(1)

# Of each task: the variables that the sentence speaks of, and to which assets they point, in the order of speech.
SPOKEN: dict[str, dict[str, str]] = {
    "reach": {"target": "block"},
    "push": {"block": "block", "zone": "zone"},
    "pick": {"target": "block"},
    "place": {"block": "block", "bin": "bin"},
    "stack": {"top": "block", "base": "block"},
    "press": {"target": "button"},
    "open_drawer": {"target": "drawer"},
    "close_drawer": {"target": "drawer"},
    "store": {"drawer": "drawer", "block": "block"},
}


@dataclass
class Played:
    """What became of `n` episodes: bool and float [n], and the dense reward's sum."""

    success: Tensor
    failure: Tensor
    length: Tensor
    total: Tensor
    env: TabletopEnv
    first_progress: Tensor


def _play(
    task: str, n: int, split: str = "train", *, deaf: Sequence[str] = (), config: ExpertConfig | None = None
) -> Played:
    """Play seeds 0 to n - 1. An expert that is `deaf` to variables acts on the values of another episode."""
    env = make_tabletop(task, n, split=split, reward="dense", auto_reset=False, num_threads=1)
    env.reset(range(n))
    inner = env.step_env
    assert isinstance(inner, TabletopEnv)
    expert = ScriptedExpert(env, config)
    truth = {name: inner.variables[name].clone() for name in deaf}
    success, failure = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    length, total, first = torch.zeros(n), torch.zeros(n), inner._progress.clone()
    for _ in range(inner.max_episode_steps):
        for name, value in truth.items():
            inner.variables[name].copy_(value.roll(1))
        actions = expert()
        for name, value in truth.items():
            inner.variables[name].copy_(value)
        step = env.step(actions)
        success |= step.success
        failure |= step.terminated & ~step.success
        length += step.executed.sum(dim=1)
        total += step.rewards.sum(dim=1)
        if not bool(step.executed.any()):
            break
    return Played(success, failure, length, total, inner, first)


def test_the_registry_is_what_is_tested_here() -> None:
    assert set(TASKS) >= set(SPOKEN)
    assert len(SPOKEN) >= 8


# ------------------------------------------------------------------------------------------------------- experts
@pytest.mark.parametrize("task", SPOKEN)
def test_the_expert_succeeds_in_time_and_is_paid_for_it(task: str) -> None:
    played = _play(task, 60)
    rate = float(played.success.float().mean())
    assert rate >= 0.95
    median, limit = float(played.length[played.success].median()), played.env.max_episode_steps
    assert 0.1 * limit <= median <= 0.67 * limit
    # The dense reward is a potential's change plus one: nothing can be earned by going to and fro.
    gained = (played.env._progress - played.first_progress).float() + played.success
    assert torch.allclose(played.total, gained, atol=1e-4)
    assert (played.first_progress < 0.55).all()
    assert (played.env._progress[played.success] > 0.8).all()


@pytest.mark.parametrize("task", SPOKEN)
def test_the_expert_succeeds_on_unseen_layouts(task: str) -> None:
    assert _play(task, 40, "ood").success.float().mean() >= 0.925


@pytest.mark.parametrize("task", SPOKEN)
def test_who_ignores_the_sentence_fails(task: str) -> None:
    """An expert that is told another episode's target: it fails at half of the episodes or more, and by failing the
    task, not by running out of time."""
    played = _play(task, 60, deaf=list(SPOKEN[task]))
    assert played.success.float().mean() <= 0.5
    assert played.failure.float().mean() >= 0.45


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", SPOKEN)
def test_two_hundred_seeds(task: str, split: str) -> None:
    assert _play(task, 200, split).success.float().mean() >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("task", SPOKEN)
def test_two_hundred_deaf_seeds(task: str) -> None:
    assert _play(task, 200, deaf=list(SPOKEN[task])).success.float().mean() <= 0.5


def test_a_clumsy_expert_starts_over_after_a_miss() -> None:
    """Noise makes it slower, not hopeless: what it loses it picks up again."""
    sure, clumsy = _play("pick", 60), _play("pick", 60, config=ExpertConfig(action_noise=0.4))
    assert clumsy.length[clumsy.success].mean() > sure.length[sure.success].mean() + 2
    assert clumsy.success.float().mean() >= 0.8


# ------------------------------------------------------------------------------------------------------ sentences
def _samples(task: str, split: str, count: int = 40) -> list[EpisodeStart]:
    return [TASKS[task].sample(Draw(task, split, seed)) for seed in range(count)]


def _color_name(rgba: tuple[float, ...]) -> str:
    return next(name for name, value in (COLORS | OOD_COLORS).items() if value == rgba)


@pytest.mark.parametrize("split", ["train", "ood"])
@pytest.mark.parametrize("task", SPOKEN)
def test_the_sentence_names_its_targets_and_nothing_else(task: str, split: str) -> None:
    for start in _samples(task, split):
        named = [_color_name(start.colors[f"{kind}{start.variables[v]}"]) for v, kind in SPOKEN[task].items()]
        words = start.instruction.replace(",", " ").split()
        assert sorted(w for w in words if w in COLORS | OOD_COLORS) == sorted(named)
        coloured = [c for asset, c in start.colors.items() if not asset.startswith("distractor")]
        assert len(set(coloured)) == len(coloured)


@pytest.mark.parametrize("task", SPOKEN)
def test_every_value_of_every_spoken_variable_occurs(task: str) -> None:
    starts = _samples(task, "train", 120)
    for variable, kind in SPOKEN[task].items():
        count = sum(asset.name.startswith(kind) for asset in TASKS[task].assets())
        seen = [int(start.variables[variable]) for start in starts]
        assert set(seen) == set(range(count))
        assert max(seen.count(i) for i in range(count)) < 120 * (1 / count + 0.15)


def _words(starts: list[EpisodeStart]) -> set[str]:
    """Sentences with the colours blanked out."""
    colors = COLORS | OOD_COLORS
    return {" ".join("#" if w.strip(",") in colors else w for w in s.instruction.split()) for s in starts}


@pytest.mark.parametrize("task", SPOKEN)
def test_each_shift_moves_its_own_axis_only(task: str) -> None:
    train = _samples(task, "train", 150)
    seen_words = _words(train)
    assert len(seen_words) >= 4
    spans = {name: _span(train, name) for name in train[0].poses}
    grays = {s.colors[name] for s in train for name in s.colors if name.startswith("distractor")}
    for split in SPLITS:
        shifted = set(OOD_AXES) if split == "ood" else {split.removeprefix("ood_")} & set(OOD_AXES)
        starts = _samples(task, split)
        assert _words(starts).isdisjoint(seen_words) == ("sentences" in shifted)
        for start in starts:
            bright = {c for name, c in start.colors.items() if not name.startswith("distractor")}
            dull = {c for name, c in start.colors.items() if name.startswith("distractor")}
            assert (bright <= set(OOD_COLORS.values())) == ("colors" in shifted)
            assert dull.isdisjoint(grays) == ("distractors" in shifted)
            assert dull
        outside = sum(
            not (lo - 0.005 <= value <= hi + 0.005)
            for start in starts
            for name, pose in start.poses.items()
            for value, (lo, hi) in zip((pose.x, pose.y), spans[name], strict=True)
        )
        assert (outside > len(starts) / 2) == ("positions" in shifted)


def _span(starts: list[EpisodeStart], name: str) -> tuple[tuple[float, float], tuple[float, float]]:
    xs, ys = [s.poses[name].x for s in starts], [s.poses[name].y for s in starts]
    return (min(xs), max(xs)), (min(ys), max(ys))


def test_train_and_test_share_words_but_no_episode() -> None:
    for task in SPOKEN:
        train, test = _samples(task, "train", 200), _samples(task, "test", 200)
        assert _words(train) == _words(test)
        assert not {s.poses["distractor0"] for s in train} & {s.poses["distractor0"] for s in test}


def test_every_block_could_be_pushed_onto_every_zone() -> None:
    for split in ("train", "ood"):
        for start in _samples("push", split, 100):
            for i in range(2):
                for j in range(2):
                    block, zone = start.poses[f"block{i}"], start.poses[f"zone{j}"]
                    assert zone.x - block.x > abs(zone.y - block.y)


def test_axes_of_a_draw_are_checked() -> None:
    assert Draw("pick", "ood_sentences", 0).select("sentences", 1, 2) == 2
    assert Draw("pick", "ood_sentences", 0).select("colors", 1, 2) == 1
    with pytest.raises(ValueError, match="axis 'words' is unknown; use one of colors"):
        Draw("pick", "train", 0).select("words", 1, 2)


# --------------------------------------------------------------------------------------- predicates, state by state
@dataclass
class Table:
    """An environment of one episode whose objects are put where a test wants them."""

    env: TabletopEnv

    def put(self, name: str, x: float, y: float, z: float) -> None:
        place, engine = self.env.scene.placements[name], self.env.engine
        engine.qpos[0, place.address : place.address + 7] = torch.tensor([x, y, z, 1, 0, 0, 0], dtype=torch.float64)
        engine.qvel[0, place.dof : place.dof + 6] = 0.0
        engine.forward(torch.tensor([0]))

    def slide(self, name: str, position: float) -> None:
        self.env.engine.qpos[0, self.env.scene.joint_qpos[str(self.env.scene.assets[name].joint)]] = position
        self.env.engine.forward(torch.tensor([0]))

    def where(self, name: str) -> tuple[float, float, float]:
        x, y, z = self.env.view.object_pos(name)[0].tolist()
        return x, y, z

    def judge(self) -> tuple[bool, bool]:
        """Success and failure now; what the task remembers is stored as a step would store it."""
        status = self.env.task.evaluate(self.env.view, self.env.variables)
        for name, value in status.variables.items():
            self.env.variables[name].copy_(value)
        assert torch.isfinite(status.progress).all()
        return bool(status.success[0]), bool(status.failure[0])


def _table(task: str, **said: int) -> Table:
    env = TabletopEnv(task, 1, TabletopConfig(joint_noise=0.0))
    env.reset(torch.tensor([0]), torch.tensor([0]))
    for name, value in said.items():
        env.variables[name].fill_(value)
    table = Table(env)
    assert table.judge() == (False, False)
    return table


def test_pick_wants_the_named_block_up_for_a_while() -> None:
    table = _table("pick", target=1)
    x, y, z = table.where("block1")
    table.put("block1", x, y, z + 0.101)
    assert [table.judge()[0] for _ in range(5)] == [False] * 4 + [True]
    table.put("block1", x, y, z + 0.099)
    assert table.judge() == (False, False)
    table.put("block1", x, y, z + 0.2)
    assert table.judge() == (False, False), "the count begins anew"
    table.put("block0", 0.5, 0.3, 0.022 + 0.041)
    assert table.judge() == (False, True)


def test_push_wants_one_pair_and_no_other() -> None:
    table = _table("push", block=0, zone=1)
    x, y, _ = table.where("zone1")
    table.put("block0", x + 0.031, y, 0.015)
    assert table.judge() == (False, False)
    table.put("block0", x + 0.029, y, 0.015)
    assert table.judge() == (True, False)
    table.env.engine.qvel[0, table.env.scene.placements["block0"].dof] = 0.2
    assert table.judge() == (False, False), "still sliding"
    table.put("block0", *table.where("zone0")[:2], 0.015)
    assert table.judge() == (False, True)
    table.put("block0", 0.5, 0.0, 0.015)
    table.put("block1", x, y, 0.015)
    assert table.judge() == (False, True)


def test_place_wants_one_pair_and_no_other() -> None:
    table = _table("place", block=1, bin=0)
    x, y, _ = table.where("bin0")
    table.put("block1", x, y, 0.10)
    assert table.judge() == (False, False), "above the bin, not in it"
    table.put("block1", x, y, 0.028)
    assert table.judge() == (True, False)
    table.put("block0", *table.where("bin1")[:2], 0.028)
    assert table.judge() == (False, True)
    table.put("block0", 0.3, 0.3, -0.1)
    assert table.judge() == (False, True), "a block is off the table"


def test_stack_wants_the_named_order_and_a_free_gripper() -> None:
    table = _table("stack", top=2, base=0)
    x, y, _ = table.where("block0")
    table.put("block2", x + 0.01, y, 0.066)
    assert table.judge() == (True, False)
    table.put("block2", x + 0.04, y, 0.066)
    assert table.judge() == (False, False)
    tip = table.env.view.tip_pos[0].tolist()
    table.put("block0", tip[0], tip[1], tip[2] - 0.044)
    table.put("block2", *tip)
    assert table.judge() == (False, False), "the block is still between the jaws"
    table.put("block2", 0.6, 0.2, 0.022)
    table.put("block0", 0.6, 0.2, 0.066)
    assert table.judge() == (False, True), "upside down"


def test_press_wants_the_named_button_alone() -> None:
    table = _table("press", target=2)
    table.slide("button2", 0.0119)
    assert table.judge() == (False, False)
    table.slide("button2", 0.0121)
    assert table.judge() == (True, False)
    table.slide("button0", 0.0121)
    assert table.judge() == (False, True)


def test_drawers_want_the_named_one_alone() -> None:
    table = _table("open_drawer", target=0)
    table.slide("drawer0", 0.091)
    assert table.judge() == (True, False)
    table.slide("drawer1", 0.046)
    assert table.judge() == (False, True)
    table = _table("close_drawer", target=0)
    table.slide("drawer0", 0.013)
    assert table.judge() == (False, False)
    table.slide("drawer0", 0.011)
    assert table.judge() == (True, False)
    table.slide("drawer2", 0.049)
    assert table.judge() == (False, True)


def test_store_goes_through_its_sub_goals_in_order() -> None:
    table = _table("store", drawer=1, block=0)
    x, y, _ = table.where("drawer1")
    progress = [float(table.env.task.evaluate(table.env.view, table.env.variables).progress[0])]

    def reached() -> int:
        assert table.judge() == (False, False)
        progress.append(float(table.env.task.evaluate(table.env.view, table.env.variables).progress[0]))
        return int(table.env.variables["sub_goal"][0])

    table.slide("drawer1", 0.10)
    assert reached() == 1
    table.put("block0", x - 0.115, y, 0.035)
    assert reached() == 2
    table.slide("drawer1", 0.02)
    table.put("block0", x - 0.035, y, 0.035)
    assert reached() == 2
    table.slide("drawer1", 0.005)
    assert table.judge() == (True, False)
    progress.append(float(table.env.task.evaluate(table.env.view, table.env.variables).progress[0]))
    assert progress == sorted(progress)
    assert progress[1] >= 1 / 3
    assert progress[2] >= 2 / 3
    assert progress[-1] == pytest.approx(1.0)
    table.put("block1", x - 0.035, y + 0.02, 0.075)
    table.put("block1", x - 0.035, y, 0.035)
    assert table.judge() == (False, True), "the other block is in there as well"


def test_store_remembers_per_episode() -> None:
    n = 6
    env = make_tabletop("store", n, auto_reset=True, num_threads=1)
    env.reset(range(n))
    inner = env.step_env
    assert isinstance(inner, TabletopEnv)
    expert, seen = ScriptedExpert(env), []
    for _ in range(118):
        step = env.step(expert())
        seen.append(inner.variables["sub_goal"].clone())
        assert not (step.ended & (seen[-1] != 0)).any(), "a new episode begins at nothing"
    history = torch.stack(seen)
    assert history.amax(dim=0).tolist() == [store.NUM_SUB_GOALS - 1] * n


# ----------------------------------------------------------------------------------------------- plans and the expert
class _Scripted(Pick):
    """Pick's table with a plan of the test's own."""

    def __init__(self) -> None:
        self.lost = False

    def plan(self, view: SceneView, variables: object) -> Plan:
        tip = view.tip_pos
        everyone = torch.ones(view.num_envs, dtype=torch.bool)
        east, west = tip + torch.tensor([0.5, 0.0, 0.0]), tip - torch.tensor([0.5, 0.0, 0.0])
        return make_plan(
            view,
            [
                Waypoint(east, OPEN, done=everyone, dwell=3),
                Waypoint(west, CLOSED, done=~everyone, lost=everyone & self.lost, speed=0.25),
            ],
        )


def test_a_plan_has_dwell_speed_and_a_way_back() -> None:
    task = _Scripted()
    env = make_tabletop(task, 2, num_threads=1)
    env.reset([0, 1])
    expert = ScriptedExpert(env)
    actions = []
    for t in range(8):
        task.lost = t == 5
        actions.append(expert()[0, 0])
        env.step(actions[-1].expand(2, 1, 4))
    assert [round(float(a[0]), 4) for a in actions] == [1.0, 1.0, 1.0, -0.25, -0.25, 1.0, 1.0, 1.0]
    assert [float(a[3]) for a in actions] == [1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0]
    slow = ScriptedExpert(env, ExpertConfig(max_action=0.1))
    assert float(slow()[0, 0].abs()[:3].max()) == pytest.approx(0.1)


def test_a_waypoint_is_reached_within_its_tolerance() -> None:
    env = TabletopEnv("pick", 1)
    env.reset(torch.tensor([0]), torch.tensor([0]))
    tip = env.view.tip_pos
    points = [Waypoint(tip + torch.tensor([d, 0.0, 0.0]), OPEN, tolerance=0.02) for d in (0.019, 0.021)]
    plan = make_plan(env.view, points)
    assert plan.done.tolist() == [[True, False]]
    assert plan.targets.shape == (1, 2, 3)
    assert plan.openings.tolist() == [[1.0, 1.0]]
    assert plan.lost is not None
    assert not plan.lost.any()


def test_jaws_hold_a_block_without_crushing_it() -> None:
    """Contacts are soft at this time step: a grip as strong as a real one's would sink into a block and throw it."""
    played = _play("pick", 8)
    assert played.success.all()
    opening = played.env.view.gripper_opening
    assert ((opening > 0.036) & (opening < 0.044)).all(), "the block is 44 mm wide"


def test_blocks_are_things_that_the_jaws_can_take() -> None:
    for task in ("pick", "place", "stack", "store"):
        for asset in TASKS[task].assets():
            if isinstance(asset, Block) and asset.movable:
                assert 2 * asset.half * 1.25 < 0.08, "its width at a yaw of 0.25 rad"
