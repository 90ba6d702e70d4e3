"""Domain randomisation: looks and physics really change, by the episode's seed alone, and resume exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vla_rl.core import Observation
from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv, make_tabletop
from vla_rl.sim.arm import FINGER_NAMES, JOINT_NAMES
from vla_rl.sim.experts import ScriptedExpert
from vla_rl.sim.randomization import (
    LEVELS,
    CameraJitter,
    LooksConfig,
    PhysicsConfig,
    RandomizationConfig,
    Randomizer,
    randomization_config,
    texture_mjcf,
)
from vla_rl.sim.scene import Asset, Block, Scene, SceneConfig, build_scene
from vla_rl.sim.tasks.base import Draw, EpisodeStart, Pose
from vla_rl.sim.tasks.reach import Reach

torch.set_num_threads(1)


class LooseBlock(Reach):
    """Reach beside a movable block, whose mass and friction can matter."""

    name = "loose_block"

    def assets(self) -> list[Asset]:
        return [*super().assets(), Block("loose")]

    def sample(self, draw: Draw) -> EpisodeStart:
        start = super().sample(draw)
        poses = {**start.poses, "loose": Pose(0.5, 0.24)}
        return EpisodeStart(poses, start.instruction, start.variables, start.colors)


def _actions(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.rand(n, k, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _only(looks: LooksConfig | None = None, physics: PhysicsConfig | None = None) -> RandomizationConfig:
    return RandomizationConfig(looks or LooksConfig(), physics or PhysicsConfig(), stream=9)


def _env(
    config: str | RandomizationConfig, n: int = 6, task: str | Reach = "reach", camera: bool = False
) -> TabletopEnv:
    cameras = {"agent": 48, "wrist": 48} if camera else {}
    env = TabletopEnv(task, n, TabletopConfig(randomization=config, cameras=cameras, num_threads=1))
    env.reset(torch.arange(n), torch.arange(n))
    return env


def _pictures(env: TabletopEnv) -> dict[str, torch.Tensor]:
    images = env.observe(torch.arange(env.num_envs), images=True).images
    env.close()
    return {camera: picture.float() for camera, picture in images.items()}


# ------------------------------------------------------------------------------------------------------------- looks
def test_off_changes_no_bit() -> None:
    """Off touches no model field but the episode's own colours, and a randomisation with no range is the same as off:
    pixels, states and rewards."""
    off, none = (make_tabletop("reach", 3, cameras={"agent": 48}, reward="dense", randomization=r)
                 for r in ("off", RandomizationConfig()))  # fmt: skip
    a, b = off.reset([1, 2, 3]), none.reset([1, 2, 3])
    for t in range(4):
        assert torch.equal(a.images["agent"], b.images["agent"])
        assert torch.equal(a.state, b.state)
        first, second = off.step(_actions(3, 4, t)), none.step(_actions(3, 4, t))
        assert torch.equal(first.rewards, second.rewards)
        a, b = first.obs, second.obs
    for env in (off, none):
        inner = env.step_env
        assert isinstance(inner, TabletopEnv)
        assert set(inner.engine.expanded_fields) <= {"geom_rgba"}
        assert inner.scene.model.nmat == 0
        env.close()


@pytest.mark.parametrize(
    ("looks", "agent_changes", "wrist_changes"),
    [
        (LooksConfig(surface_color=0.2), True, True),
        (LooksConfig(textures=("checker", "gravel")), True, True),
        (LooksConfig(light_level=(0.2, 2.0)), True, True),
        (LooksConfig(light_tilt=0.4), True, True),
        (LooksConfig(cameras={"agent": CameraJitter(shift=0.05)}), True, False),
        (LooksConfig(cameras={"agent": CameraJitter(turn=0.05)}), True, False),
        (LooksConfig(cameras={"wrist": CameraJitter(fovy=4.0)}), False, True),
        (LooksConfig(), False, False),
    ],
)
def test_each_look_changes_the_pictures_it_should(looks: LooksConfig, agent_changes: bool, wrist_changes: bool) -> None:
    off, on = _pictures(_env("off", camera=True)), _pictures(_env(_only(looks), camera=True))
    for camera, changes in (("agent", agent_changes), ("wrist", wrist_changes)):
        difference = (off[camera] - on[camera]).abs().mean(dim=(1, 2, 3))
        if changes:
            assert (difference > 0.3).sum() >= 2, difference  # a texture draw may be "none"
        else:
            assert (difference == 0).all()


def test_objects_keep_their_named_colour() -> None:
    """Changes stay within the range, are one for all geoms of an asset, and begin at the episode's own colours."""
    config = LEVELS["test"]
    off, on = _env("off", 40), _env(config, 40)
    before, after = off.engine.model_field("geom_rgba"), on.engine.model_field("geom_rgba")
    change = (after - before).abs()
    for name, place in on.scene.placements.items():
        geoms = list(place.geoms)
        assert 0 < change[:, geoms].max() <= config.looks.object_color + 1e-6, name
    table = on.scene.model.geom("table").id
    assert config.looks.object_color < change[:, table].max() <= config.looks.surface_color + 1e-6
    arm = [g for g in range(on.scene.model.ngeom) if on.scene.model.geom_bodyid[g] == on.scene.model.body("link1").id]
    assert config.looks.object_color < change[:, arm].max() <= config.looks.arm_color + 1e-6
    assert torch.equal(after[..., 3], before[..., 3])


def test_colours_do_not_drift_over_episodes() -> None:
    """Each episode's change begins at the scene's own colours, not at those of the episode before."""
    env, fresh = _env("train", 2), _env("train", 2)
    for seed in range(5):
        env.reset(torch.arange(2), torch.tensor([50 + seed, 60 + seed]))
    env.reset(torch.arange(2), torch.arange(2))
    for name in fresh.engine.expanded_fields:
        assert torch.equal(env.engine.model_field(name), fresh.engine.model_field(name)), name


def test_camera_turns_are_rotations_within_range() -> None:
    env = _env(_only(LooksConfig(cameras={"agent": CameraJitter(shift=0.02, turn=0.03, fovy=2.0)})), 64)
    camera = env.scene.model.camera("agent")
    quat, pos = env.engine.model_field("cam_quat")[:, camera.id], env.engine.model_field("cam_pos")[:, camera.id]
    assert torch.allclose(torch.linalg.vector_norm(quat, dim=1), torch.ones(64, dtype=torch.float64), atol=1e-9)
    base = torch.from_numpy(env.scene.model.cam_quat[camera.id])
    angle = 2 * torch.arccos((quat @ base).abs().clamp(max=1.0))
    assert 0.02 < angle.max() <= 0.03 * math.sqrt(3) + 1e-6
    shift = (pos - torch.from_numpy(env.scene.model.cam_pos[camera.id])).abs()
    assert 0.015 < shift.max() <= 0.02
    fovy = env.engine.model_field("cam_fovy")[:, camera.id] - float(env.scene.model.cam_fovy[camera.id])
    assert 1.5 < fovy.abs().max() <= 2.0


def test_the_test_level_shows_other_textures() -> None:
    train, test = LEVELS["train"].looks.textures, LEVELS["test"].looks.textures
    assert train
    assert test
    assert not set(train) & set(test)


# ----------------------------------------------------------------------------------------------------------- physics
def test_physics_changes_the_motion_and_looks_do_not() -> None:
    def final_state(config: str | RandomizationConfig) -> torch.Tensor:
        env = _env(config)
        active = torch.ones(6, dtype=torch.bool)
        for t in range(5):
            env.step(_actions(6, 1, t)[:, 0], active)
        return env.observe(torch.arange(6), images=False).state

    plain = final_state("off")
    assert torch.equal(plain, final_state(_only(LEVELS["test"].looks)))
    for physics in (
        PhysicsConfig(gain=(0.7, 1.4)),
        PhysicsConfig(damping=(0.2, 8.0)),
        PhysicsConfig(max_action_delay=3),
    ):
        changed = (final_state(_only(physics=physics)) - plain).abs().amax(dim=1)
        assert (changed > 1e-5).sum() >= 4, physics


def test_factors_lie_in_their_ranges_and_reach_the_right_fields() -> None:
    physics = PhysicsConfig(mass=(0.5, 2.0), friction=(0.6, 1.5), gain=(0.9, 1.2), damping=(0.5, 3.0))
    env = _env(_only(physics=physics), 64, LooseBlock())
    model, engine = env.scene.model, env.engine
    body = env.scene.placements["loose"].body

    def factor(name: str) -> torch.Tensor:
        base = torch.from_numpy(np.array(getattr(model, name)))
        ratio = engine.model_field(name) / base
        return torch.where(base != 0, ratio, torch.ones_like(ratio))

    mass = factor("body_mass")
    assert mass[:, body].min() < 0.65
    assert mass[:, body].max() > 1.5
    assert mass[:, body].min() >= 0.5
    assert mass[:, body].max() <= 2.0
    assert (mass[:, [b for b in range(model.nbody) if b != body]] == 1).all()
    assert torch.allclose(factor("body_inertia")[:, body, 0], mass[:, body])
    friction = factor("geom_friction")[..., 0]
    assert (friction.std(dim=1) < 1e-9).all()  # one factor an episode
    assert 0.6 <= friction.min() < 0.75 < 1.3 < friction.max() <= 1.5
    servos = [model.actuator(name).id for name in (*JOINT_NAMES, *FINGER_NAMES)]
    kp = factor("actuator_gainprm")[:, servos, 0]
    assert torch.allclose(kp, factor("actuator_biasprm")[:, servos, 1])  # a target is still reached without sag
    assert 0.9 <= kp.min() < 0.92
    assert 1.17 < kp.max() <= 1.2
    fingers = [int(model.jnt_dofadr[model.joint(name).id]) for name in FINGER_NAMES]
    assert (factor("dof_damping")[:, fingers] == 1).all()


def test_mass_reaches_the_dynamics() -> None:
    """A free block pushed by a known horizontal force accelerates by F / m while it slides without friction."""
    config = _only(physics=PhysicsConfig(mass=(0.4, 2.5)))
    env = _env(config, 8, LooseBlock())
    engine, place = env.engine, env.scene.placements["loose"]
    engine.qpos[:, place.address + 2] = 1.0  # in the air
    engine.xfrc_applied[:, place.body, 0] = 0.2
    engine.step(torch.ones(8, dtype=torch.bool), 10)
    mass = engine.model_field("body_mass")[:, place.body]
    expected = 0.2 / mass * 10 * env.scene.config.timestep
    assert torch.allclose(engine.qvel[:, place.dof], expected, rtol=1e-6)
    assert mass.max() / mass.min() > 2


def test_actions_arrive_late_by_the_episodes_delay() -> None:
    """Each environment with delay d executes what an undelayed one executed d steps earlier; first it rests."""
    physics = PhysicsConfig(max_action_delay=2)
    scene = build_scene([Block("b", movable=False)])
    env = _env(_only(physics=physics), 30)
    randomizer = Randomizer(_only(physics=physics), scene, env.engine, env.controller.action)
    randomizer.reset(torch.arange(30), [np.random.default_rng(i) for i in range(30)])
    delays = randomizer.state_dict()["delay_steps"]
    assert set(delays.tolist()) == {0, 1, 2}
    active = torch.ones(30, dtype=torch.bool)
    sent = [_actions(30, 1, t)[:, 0].double() for t in range(5)]
    for t, actions in enumerate(sent):
        arrived = randomizer.delay(actions, active)
        for i, delay in enumerate(delays.tolist()):
            rest = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
            assert torch.equal(arrived[i], sent[t - delay][i] if t >= delay else rest)
    before = randomizer.state_dict()["queue"]
    randomizer.delay(sent[0], torch.zeros(30, dtype=torch.bool))
    assert torch.equal(before, randomizer.state_dict()["queue"])


@pytest.mark.parametrize("level", ["train", "test"])
def test_the_task_can_still_be_done(level: str) -> None:
    """A closed-loop expert, which knows nothing of gains or delays, still succeeds nearly always."""
    env = make_tabletop("reach", 100, randomization=level, auto_reset=False)
    env.reset(list(range(100)))
    expert, success = ScriptedExpert(env), torch.zeros(100, dtype=torch.bool)
    for _ in range(40):
        success |= env.step(expert()).success
    assert success.float().mean() >= 0.9


# ------------------------------------------------------------------------------------------------- seeds and resume
def _observe(obs: Observation) -> list[torch.Tensor]:
    return [obs.state, *obs.images.values()]


def test_an_episode_does_not_depend_on_the_batch() -> None:
    """A batch of 17 and a batch of 1, over auto-resets: pixels and states bit for bit."""
    options = {"randomization": "test", "cameras": {"agent": 32}, "max_episode_steps": 5, "num_threads": 1}
    many, one = make_tabletop(LooseBlock(), 17, **options), make_tabletop(LooseBlock(), 1, **options)
    a, b = many.reset([3, 1, 4, *range(100, 114)]), one.reset([4])
    for t in range(5):
        for x, y in zip(_observe(a), _observe(b), strict=True):
            assert torch.equal(x[2], y[0])
        actions = _actions(17, 4, t)
        a, b = many.step(actions).obs, one.step(actions[2:3]).obs
    many.close()
    one.close()


def test_resumes_bit_for_bit_with_delays_underway() -> None:
    options = {"randomization": "test", "cameras": {"agent": 32}, "max_episode_steps": 11, "num_threads": 1}
    env = make_tabletop(LooseBlock(), 5, **options)
    env.reset([1, 2, 3, 4, 5])
    for t in range(3):
        env.step(_actions(5, 2, t))
    saved = env.state_dict()
    expected = [_observe(env.step(_actions(5, 3, 10 + t)).obs) for t in range(5)]
    fresh = make_tabletop(LooseBlock(), 5, **options)
    fresh.load_state_dict(saved)
    for t, before in enumerate(expected):
        after = _observe(fresh.step(_actions(5, 3, 10 + t)).obs)
        for x, y in zip(before, after, strict=True):
            assert torch.equal(x, y)
    env.close()
    fresh.close()


def test_levels_share_the_task_but_no_random_number() -> None:
    envs = {level: _env(level, 20) for level in ("off", "train", "test")}
    start = {level: env.observe(torch.arange(20), images=False) for level, env in envs.items()}
    assert start["off"].instruction == start["train"].instruction == start["test"].instruction
    assert torch.equal(start["off"].state, start["train"].state)
    assert torch.equal(start["off"].state, start["test"].state)
    # The same column of the same episodes, brought back to [0, 1]: equal if the streams were one.
    levels = {level: LEVELS[level].physics.friction for level in ("train", "test")}
    uniforms = []
    for level, (low, high) in levels.items():
        env = envs[level]
        factor = env.engine.model_field("geom_friction")[:, 0, 0] / float(env.scene.model.geom_friction[0, 0])
        uniforms.append((torch.log(factor) - math.log(low)) / math.log(high / low))
    assert (uniforms[0] - uniforms[1]).abs().max() > 0.2
    assert abs(float(np.corrcoef(uniforms[0].numpy(), uniforms[1].numpy())[0, 1])) < 0.6


def test_a_state_of_another_level_is_refused() -> None:
    off, on, test = (make_tabletop("reach", 2, randomization=level) for level in ("off", "train", "test"))
    for env in (off, on, test):
        env.reset([0, 1])
    for env, other in ((off, on), (on, off), (on, test), (test, on)):
        with pytest.raises(ValueError, match="differ in randomization"):
            env.load_state_dict(other.state_dict())


# ------------------------------------------------------------------------------------------------------------ errors
def test_what_is_unknown_is_said() -> None:
    with pytest.raises(ValueError, match="off, train, test"):
        make_tabletop("reach", 1, randomization="hard")
    with pytest.raises(ValueError, match=r"textures \['silk'\] are unknown"):
        RandomizationConfig(LooksConfig(textures=("silk",)))
    with pytest.raises(ValueError, match="positive factors"):
        PhysicsConfig(mass=(0.0, 1.0))
    with pytest.raises(ValueError, match="counts steps"):
        PhysicsConfig(max_action_delay=-1)
    assert randomization_config("off") is None
    assert randomization_config("train") is LEVELS["train"]


def test_a_scene_without_the_textures_is_said() -> None:
    def env(scene: Scene) -> TabletopEnv:
        return TabletopEnv("reach", 1, TabletopConfig(randomization="train"), scene=scene)

    assets = Reach().assets()
    with pytest.raises(ValueError, match="asset_mjcf"):
        env(build_scene(assets))
    env(build_scene(assets, SceneConfig(asset_mjcf=texture_mjcf())))
