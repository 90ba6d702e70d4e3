"""Conditions: each axis changes what it says and nothing else, so that its episodes pair with the nominal ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vla_rl.core import ChunkStep, Observation
from vla_rl.envs.config import (
    AnyEnvConfig,
    EnvConfig,
    PerturbedConfig,
    PointMazeConfig,
    demo_env,
    without_cameras,
)
from vla_rl.envs.experts import best_expert, make_expert
from vla_rl.envs.gym import GymConfig
from vla_rl.envs.libero import LiberoConfig
from vla_rl.envs.libero_sentences import SENTENCES, other_sentence
from vla_rl.envs.maniskill import ManiSkillConfig
from vla_rl.envs.metaworld import MetaworldConfig
from vla_rl.envs.ogbench import OGBenchConfig
from vla_rl.envs.perturbed import Perturbation, PerturbedEnv
from vla_rl.envs.robosuite import RobosuiteConfig
from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv
from vla_rl.evaluation.conditions import AXES, UnsupportedConditionError, apply_condition, crossed, parse_condition
from vla_rl.evaluation.evaluate import evaluate_controller
from vla_rl.policies.checkpoints.config_json import config_from_dict, config_to_dict
from vla_rl.sim.experts import ScriptedExpert
from vla_rl.sim.language import BLOCK_NOUNS, COLORS, OOD_BLOCK_NOUNS, contradicted, reworded
from vla_rl.sim.randomization import LooksConfig, PhysicsConfig, RandomizationConfig
from vla_rl.sim.shift import SceneShift, sample_episode
from vla_rl.sim.tasks import TASKS
from vla_rl.sim.tasks.base import TRAIN_REGION, Draw, EpisodeStart, Region, ring
from vla_rl.sim.tasks.reach import OOD_TEMPLATES, TEMPLATES, Reach

torch.set_num_threads(1)

REACH = EnvConfig(image_size=32, num_threads=1)
N = 2


def _start(env: AnyEnvConfig, n: int = N) -> tuple[Observation, ChunkStep, dict[str, torch.Tensor]]:
    """Observations at the start and after a chunk, and what decides success."""
    chunked = env.make(n, split="test")
    obs = chunked.reset(range(n))
    step = chunked.step(torch.rand(n, 3, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    inner = chunked.step_env
    inner = inner.inner if isinstance(inner, PerturbedEnv) else inner
    assert isinstance(inner, TabletopEnv)
    variables = {name: value.clone() for name, value in inner.variables.items()}
    chunked.close()
    return obs, step, variables


def _poses(split: str, seed: int, shift: SceneShift, task: str = "reach") -> EpisodeStart:
    return sample_episode(TASKS[task], split, seed, shift)[0]


# ----------------------------------------------------------------------------------------------------------- the words
def test_conditions_are_read_and_written() -> None:
    assert parse_condition("") == {}
    assert parse_condition("light@2+camera@1") == {"light": 2, "camera": 1}
    assert crossed(["camera", "light"], 3) == "light@3+camera@3"  # in the order of reports
    for wrong, text in (
        ("light", "level from 1 to 3"), ("light@4", "level from 1 to 3"), ("light@0", "level from 1 to 3"),
        ("fog@1", "axis 'fog' is unknown"), ("light@1+light@2", "there twice"),
        ("paraphrase@1+wrong_instruction@1", "both change the sentence"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            parse_condition(wrong)
    with pytest.raises(ValueError, match="axis 'fog' is unknown"):
        crossed(["fog"], 1)


def test_nominal_is_the_environment_itself() -> None:
    assert apply_condition(REACH, "") is REACH
    assert apply_condition(REACH, "light@1") == replace(REACH, shift=SceneShift(light=1))
    with pytest.raises(UnsupportedConditionError, match="already"):
        apply_condition(apply_condition(REACH, "sensor_noise@1"), "light@1")
    with pytest.raises(UnsupportedConditionError, match="already"):
        apply_condition(apply_condition(REACH, "color@1"), "light@1")
    with pytest.raises(UnsupportedConditionError, match="randomised already"):
        apply_condition(replace(REACH, randomization="test"), "light@1")


@pytest.mark.parametrize("condition", [f"{axis}@2" for axis in AXES] + ["light@1+sensor_noise@3"])
def test_configs_survive_json(condition: str) -> None:
    env = apply_condition(REACH, condition)
    assert config_from_dict(type(env), config_to_dict(env)) == env
    assert env.task == "reach"
    assert without_cameras(env).cameras == ()
    assert demo_env(env) == (env.env if isinstance(env, PerturbedConfig) else env)


# ---------------------------------------------------------------------------------------------- each axis by its effect
CHANGES = {  # axis: pictures at the start, states at the start, states after three actions, sentences
    "position": (True, False, False, False),
    "distractors": (True, False, False, False),
    "color": (True, False, False, False),
    "light": (True, False, False, False),
    "camera": (True, False, False, False),
    "sensor_noise": (True, True, True, False),
    "action_delay": (False, False, True, False),
    "physics": (False, False, True, False),
    "paraphrase": (False, False, False, True),
    "wrong_instruction": (False, False, False, True),
}


@pytest.fixture(scope="module")
def nominal() -> tuple[Observation, ChunkStep, dict[str, torch.Tensor]]:
    return _start(REACH)


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_changes_what_it_says_and_nothing_else(
    axis: str, nominal: tuple[Observation, ChunkStep, dict[str, torch.Tensor]]
) -> None:
    obs, step, goal = nominal
    pictures, start, later, sentence = CHANGES[axis]
    distances = []
    for level in (1, 3):
        other, other_step, other_goal = _start(apply_condition(REACH, f"{axis}@{level}"))
        for i in range(N):
            assert torch.equal(obs.images["agent"][i], other.images["agent"][i]) is not pictures
            assert torch.equal(obs.state[i], other.state[i]) is not start
            assert (obs.instruction[i] == other.instruction[i]) is not sentence
        assert torch.equal(step.next_obs.state, other_step.next_obs.state) is not later
        assert all(torch.equal(goal[name], other_goal[name]) for name in goal)  # what success asks for
        distances.append((obs.images["agent"].float() - other.images["agent"].float()).abs().mean().item())
    if pictures and axis != "position":
        assert distances[0] < distances[1]  # graded


@pytest.mark.parametrize("condition", ["position@2+distractors@3", "color@3+camera@2", "sensor_noise@2+action_delay@1"])
def test_an_episode_is_the_same_in_any_batch(condition: str) -> None:
    env = apply_condition(REACH, condition)
    many, alone = env.make(3, split="test"), env.make(1, split="test")
    actions = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    first, single = many.reset([5, 6, 7]), alone.reset([7])
    second, single_second = many.step(actions).next_obs, alone.step(actions[2:]).next_obs
    for a, b in ((first, single), (second, single_second)):
        assert torch.equal(a.images["agent"][2], b.images["agent"][0])
        assert torch.equal(a.state[2], b.state[0])
    many.close()
    alone.close()


# ------------------------------------------------------------------------------------------------------------- position
def test_rings_lie_outside_of_each_other() -> None:
    usual, unseen = Region(x=(0.0, 1.0), y=(0.0, 1.0)), Region(x=(-0.3, 1.6), y=(0.0, 1.0))
    rings = [ring(usual, unseen, level) for level in (1, 2, 3)]
    assert np.allclose(rings[0].x, (-0.1, 1.2))
    assert np.allclose(rings[2].x, unseen.x)
    assert rings[1].hole == Region(rings[0].x, rings[0].y)
    assert [r.contains(1.1, 0.5) for r in rings] == [True, False, False]
    assert [r.contains(1.5, 0.5) for r in rings] == [False, False, True]


def test_objects_lie_outside_of_the_training_region() -> None:
    def outside(pose: object) -> float:
        (x0, x1), (y0, y1) = TRAIN_REGION.x, TRAIN_REGION.y
        return max(x0 - pose.x, pose.x - x1, y0 - pose.y, pose.y - y1)

    for level in (1, 2, 3):
        starts = [_poses("train", seed, SceneShift(position=level)) for seed in range(20)]
        nominal = [_poses("train", seed, SceneShift()) for seed in range(20)]
        far = [outside(pose) for start in starts for pose in start.poses.values()]
        assert min(far) > 0
        assert max(far) <= level * 0.04 / 3 + 1e-9  # the unseen region ends 4 cm outside
        for start, own in zip(starts, nominal, strict=True):
            assert replace(start, poses=own.poses) == own


@pytest.mark.parametrize("task", sorted(TASKS))
def test_clutter_leaves_room(task: str) -> None:
    for seed in range(40):
        for position in (0, 3):
            start = _poses("test", seed, SceneShift(distractors=3, position=position), task)
            clutter = {name: pose for name, pose in start.poses.items() if name.startswith("clutter")}
            assert len(clutter) == 6
            own = [pose for name, pose in start.poses.items() if name not in clutter]
            for pose in clutter.values():
                assert min(np.hypot(pose.x - o.x, pose.y - o.y) for o in own) >= 0.085
            assert len({start.colors[name] for name in clutter}) == 6
            assert not {start.colors[name] for name in clutter} & set(COLORS.values())


def test_a_privileged_state_has_no_numbers_for_clutter() -> None:
    config = TabletopConfig(privileged_state=True, num_threads=1)
    plain = TabletopEnv("reach", 1, config)
    crowded = TabletopEnv("reach", 1, replace(config, shift=SceneShift(distractors=3)))
    assert len(crowded.scene.assets) == len(plain.scene.assets) + 6
    assert crowded.spec.state_names == plain.spec.state_names
    for env in (plain, crowded):
        env.reset(torch.arange(1), torch.tensor([3]))
    one = torch.arange(1)
    assert torch.allclose(crowded.observe(one, False).state, plain.observe(one, False).state, atol=1e-6)
    for env in (plain, crowded):
        env.close()


# --------------------------------------------------------------------------------------------------- looks and physics
def test_strengths_are_taken_whole() -> None:
    """At its limits a quantity takes one end of its range or the other, each about as often."""
    config = RandomizationConfig(
        LooksConfig(light_level=(0.5, 2.0), textures=("grid", "tiles", "gravel")),
        PhysicsConfig(friction=(0.5, 2.0), mass=(0.5, 2.0)),
        at_limits=True,
    )
    n = 60
    env = TabletopEnv("pick", n, TabletopConfig(randomization=config, num_threads=1))
    env.reset(torch.arange(n), torch.arange(n))
    model = env.engine.model
    light = env.engine.model_field("light_diffuse")[:, 0, 0] / model.light_diffuse[0, 0]
    friction = env.engine.model_field("geom_friction")[:, 0, 0] / model.geom_friction[0, 0]
    body = env.scene.placements["block0"].body
    mass = env.engine.model_field("body_mass")[:, body] / model.body_mass[body]
    for factor in (light, friction, mass):
        low, high = torch.isclose(factor, factor.min()), torch.isclose(factor, factor.max())
        assert bool((low | high).all())
        assert abs(factor.min().item() - 0.5) < 1e-6
        assert abs(factor.max().item() - 2.0) < 1e-6
        assert 15 <= int(low.sum()) <= 45
    assert len(env.engine.model_field("geom_matid")[:, model.geom("table").id].unique()) == 4  # textures: any, or none
    env.close()


def test_a_shift_sets_looks_itself() -> None:
    with pytest.raises(ValueError, match="randomization='off'"):
        TabletopConfig(randomization="train", shift=SceneShift(light=1))
    TabletopConfig(randomization="train", shift=SceneShift(position=1))
    with pytest.raises(ValueError, match="camera is a level from 0 to 3, got 4"):
        SceneShift(camera=4)
    with pytest.raises(ValueError, match="both change the sentence"):
        SceneShift(paraphrase=1, wrong_instruction=1)
    env, other = (TabletopEnv("reach", 1, TabletopConfig(shift=SceneShift(camera=c), num_threads=1)) for c in (1, 2))
    with pytest.raises(ValueError, match="differ in shift"):
        other.load_state_dict(env.state_dict())


# ------------------------------------------------------------------------------------------------------------ sentences
def _pattern(templates: tuple[str, ...], nouns: tuple[str, ...]) -> set[str]:
    return {template.format(color=color, noun=noun) for template in templates for color in COLORS for noun in nouns}


def test_paraphrases_are_farther_and_farther_from_training() -> None:
    said = [[_poses("train", seed, SceneShift(paraphrase=k)).instruction for seed in range(30)] for k in range(4)]
    assert set(said[0]) <= _pattern(TEMPLATES, BLOCK_NOUNS)
    assert set(said[1]) <= _pattern(TEMPLATES, OOD_BLOCK_NOUNS)
    assert set(said[2]) <= _pattern(OOD_TEMPLATES, OOD_BLOCK_NOUNS)
    for nominal, far, farther in zip(said[0], said[2], said[3], strict=True):
        assert far in farther
        assert [c for c in COLORS if c in nominal] == [c for c in COLORS if c in farther]  # the same object


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_wrong_instruction_names_what_is_there_and_not_meant(task: str) -> None:
    names = {color: name for name, color in COLORS.items()}
    for seed in range(20):
        nominal, wrong = (_poses("test", seed, SceneShift(wrong_instruction=k), task) for k in (0, 1))
        there = {names[color] for color in nominal.colors.values() if color in names}
        meant, said = ({c for c in COLORS if c in start.instruction.split()} for start in (nominal, wrong))
        assert said <= there
        assert said != meant
        assert wrong.poses == nominal.poses
        assert dict(wrong.variables) == dict(nominal.variables)
        severe = _poses("test", seed, SceneShift(wrong_instruction=3), task).instruction
        assert severe == f"do not {nominal.instruction}, {wrong.instruction}"


def test_who_follows_a_wrong_instruction_fails() -> None:
    """An expert that goes where the sentence says, told wrongly, reaches nothing of its goal."""

    class Obedient(ScriptedExpert):
        def __call__(self) -> torch.Tensor:
            meant = self._env.variables["target"].clone()
            for i, sentence in enumerate(self._env.instructions):
                start = sample_episode(self._env.task, "test", int(self._env.seeds[i]), SceneShift())[0]
                colors = [COLORS_BY_VALUE[start.colors[f"block{b}"]] for b in range(3)]
                self._env.variables["target"][i] = next(b for b, c in enumerate(colors) if c in sentence)
            actions = self.chunk(1)
            self._env.variables["target"].copy_(meant)
            return actions

    rates = []
    for condition in ("", "wrong_instruction@1"):
        env = apply_condition(replace(REACH, cameras=()), condition)
        result = evaluate_controller(
            lambda n, env=env: env.make(n, split="test"), Obedient, range(12), num_envs=12, progress=False
        )
        rates.append(sum(e.success_once for e in result.episodes) / 12)
    assert rates == [1.0, 0.0]


COLORS_BY_VALUE = {value: name for name, value in COLORS.items()}


def test_other_words_for_any_simulator() -> None:
    sentence = "pick up the milk and place it in the basket"
    assert reworded(sentence, 0) == sentence
    assert reworded(sentence, 1) == "could you please pick up the milk and place it in the basket"
    assert reworded(sentence, 2) == "please grab the milk and set it inside the basket"
    assert reworded(sentence, 2).removeprefix("please ") in reworded(sentence, 3)
    assert reworded("press the displaced button", 2) == "please push down on the displaced button"  # whole words alone
    assert contradicted("a", "b", 1) == "b"
    assert contradicted("a", "b", 2) == "b, do not a"


# ------------------------------------------------------------------------------------------------ noise, delay, experts
def test_noise_has_the_stated_size_and_is_fresh_each_step() -> None:
    env = apply_condition(replace(REACH, image_size=64), "sensor_noise@1")
    assert isinstance(env, PerturbedConfig)
    noisy, clean = env.make(2, split="test"), env.env.make(2, split="test")
    a, b = noisy.reset([1, 2]), clean.reset([1, 2])
    middle = (b.images["agent"] > 40) & (b.images["agent"] < 215)  # where nothing is clipped
    noise = a.images["agent"].float() - b.images["agent"].float()
    assert abs(noise[middle].std().item() - 8.0) < 0.2
    assert abs(noise[middle].mean().item()) < 0.2
    assert torch.equal(noisy.observe().images["agent"], a.images["agent"])  # a second look shows the same
    actions = torch.zeros(2, 1, 4)
    c, d = noisy.step(actions).obs, clean.step(actions).obs
    after = (c.images["agent"].float() - d.images["agent"].float())[middle]
    assert abs(torch.corrcoef(torch.stack([after, noise[middle]]))[0, 1].item()) < 0.05
    state_noise = [(noisy.step(actions).obs.state - clean.step(actions).obs.state) for _ in range(15)]
    assert abs(torch.stack(state_noise).std().item() - 0.002) < 0.0003
    noisy.close()
    clean.close()


@pytest.mark.parametrize(("level", "steps"), [(1, 1), (2, 2), (3, 3)])
def test_actions_arrive_late(level: int, steps: int) -> None:
    env = apply_condition(replace(REACH, cameras=()), f"action_delay@{level}")
    late, prompt = env.make(2, split="test"), REACH.make(2, split="test")
    late.reset([1, 2])
    prompt.reset([1, 2])
    actions = torch.rand(2, 8, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
    rest = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(2, steps, 4)
    a = late.step(actions).obs.state
    b = prompt.step(torch.cat([rest, actions[:, : 8 - steps]], dim=1)).obs.state
    assert torch.equal(a, b)
    late.close()
    prompt.close()


def test_a_delay_is_the_same_time_in_every_simulator() -> None:
    delays = {type(env): apply_condition(env, "action_delay@2") for env in (REACH, MetaworldConfig(), LiberoConfig())}
    steps = {kind: env.perturbation for kind, env in delays.items() if isinstance(env, PerturbedConfig)}
    assert {kind: p.action_delay for kind, p in steps.items()} == {EnvConfig: 2, MetaworldConfig: 8, LiberoConfig: 2}
    assert [p.open_gripper for p in steps.values()] == [1.0, -1.0, -1.0]


def test_a_state_is_of_its_perturbation() -> None:
    inner = TabletopConfig(num_threads=1)
    a, b = (PerturbedEnv(TabletopEnv("reach", 1, inner), Perturbation(state_noise=s)) for s in (0.1, 0.2))
    with pytest.raises(ValueError, match="this state is of"):
        b.load_state_dict(a.state_dict())
    for env in (a, b):
        env.close()
    with pytest.raises(ValueError, match="state_noise must not be negative"):
        Perturbation(state_noise=-1.0)
    with pytest.raises(ValueError, match="go together"):
        Perturbation(wrong_instruction=1)


def test_experts_act_in_perturbed_environments() -> None:
    env = apply_condition(replace(REACH, cameras=()), "sensor_noise@3")
    result = evaluate_controller(
        lambda n: env.make(n, split="test"),
        lambda made: make_expert(made, best_expert(env)),
        range(4),
        num_envs=4,
        progress=False,
    )
    assert [e.success_once for e in result.episodes] == [True] * 4
    assert {e.stage for e in result.episodes} == {"touched"}
    maze = apply_condition(PointMazeConfig("umaze"), "sensor_noise@1+action_delay@1")
    result = evaluate_controller(
        lambda n: maze.make(n, split="test"),
        lambda made: make_expert(made, best_expert(maze)),
        range(4),
        num_envs=4,
        progress=False,
    )
    assert len(result.episodes) == 4
    assert {e.stage for e in result.episodes} == {""}


# ------------------------------------------------------------------------------------------------- what is not possible
SIMULATORS: tuple[tuple[AnyEnvConfig, set[str]], ...] = (
    (EnvConfig(), set(AXES)),
    (LiberoConfig(), {"sensor_noise", "action_delay", "paraphrase", "wrong_instruction"}),
    (LiberoConfig("libero_10/2"), {"sensor_noise", "action_delay", "paraphrase"}),
    (RobosuiteConfig(), {"sensor_noise", "action_delay", "paraphrase"}),
    (RobosuiteConfig(control="joint_torque"), {"sensor_noise", "paraphrase"}),
    (ManiSkillConfig(control="pd_ee_delta_pos"), {"sensor_noise", "action_delay", "paraphrase"}),
    (ManiSkillConfig(control="pd_joint_pos"), {"sensor_noise", "paraphrase"}),
    (MetaworldConfig(), {"sensor_noise", "action_delay", "paraphrase"}),
    (PointMazeConfig(), {"sensor_noise", "action_delay"}),
    (OGBenchConfig(), {"sensor_noise", "action_delay"}),
    (GymConfig("CartPole-v1"), {"sensor_noise"}),
)


@pytest.mark.parametrize(("env", "possible"), SIMULATORS)
def test_what_a_simulator_cannot_do_is_said(env: AnyEnvConfig, possible: set[str]) -> None:
    for axis in AXES:
        if axis in possible:
            assert apply_condition(env, f"{axis}@1") != env
            continue
        with pytest.raises(UnsupportedConditionError, match=rf"^{axis}: .{{30,}}"):  # with a reason
            apply_condition(env, f"{axis}@1")


def test_a_task_that_names_nothing_cannot_be_told_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneBlock(Reach):
        """Touch the block: there is no other."""

        name = "one_block"

        def sample(self, draw: Draw) -> EpisodeStart:
            return replace(super().sample(draw), instruction="touch the block")

    monkeypatch.setitem(TASKS, "one_block", OneBlock())
    env = replace(REACH, task="one_block")
    assert apply_condition(env, "position@1").task == "one_block"
    with pytest.raises(UnsupportedConditionError, match=r"names nothing by Draw\.choice"):
        apply_condition(env, "wrong_instruction@1")
    with pytest.raises(ValueError, match="task 'fold' is unknown"):
        apply_condition(replace(REACH, task="fold"), "position@1")


def test_liberos_other_sentences() -> None:
    assert other_sentence("libero_object/0") == "pick up the cream cheese and place it in the basket"
    assert other_sentence("libero_object/pick_up_the_milk_and_place_it_in_the_basket") == (
        "pick up the butter and place it in the basket"
    )
    scene = "libero_10/LIVING_ROOM_SCENE2_put_both_the_alphabet_soup_and_the_tomato_sauce_in_the_basket"
    assert other_sentence(scene) == other_sentence("libero_10/0") == SENTENCES["libero_10"][1]
    for suite, sentences in SENTENCES.items():
        for number, sentence in enumerate(sentences):
            other = other_sentence(f"{suite}/{number}")
            assert other in sentences
            assert other != sentence
    for task in ("libero_10/2", "libero_90/0", "libero_goal/10", "libero_goal/dance"):
        assert other_sentence(task) is None
    env = apply_condition(LiberoConfig(), "wrong_instruction@2")
    with pytest.raises(ValueError, match="was asked for"):
        env.make(1, split="test", task="libero_object/1")
