"""The CPU engine: live tensors, freezing, resets, per-simulation model fields, and bit-exact continuation."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest
import torch

from vla_rl.envs.tabletop import TabletopEnv
from vla_rl.sim.arm import FINGER_TRAVEL, HOME
from vla_rl.sim.engine import CpuEngine, Engine
from vla_rl.sim.scene import Block, Drawer, Scene, build_scene

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return build_scene([Block("free"), Block("fixed", movable=False), Drawer("drawer")])


def _place(engine: CpuEngine, scene: Scene) -> None:
    address = scene.placements["free"].address
    engine.qpos[:, address : address + 3] = torch.tensor([0.5, 0.0, 0.025], dtype=torch.float64)
    engine.mocap_pos[:] = torch.tensor([0.5, 0.2, 0.025], dtype=torch.float64)
    engine.mocap_pos[:, scene.placements["drawer"].address] = torch.tensor([0.55, -0.25, 0.0], dtype=torch.float64)
    engine.forward(torch.arange(engine.num_sims))


def _wiggle(engine: CpuEngine, steps: int, start: int = 0) -> None:
    """Different commands for every simulation, some of which hit the table."""
    everyone = torch.ones(engine.num_sims, dtype=torch.bool)
    for t in range(start, start + steps):
        phase = torch.arange(engine.num_sims, dtype=torch.float64)[:, None] + 0.3 * t + torch.arange(7)
        engine.ctrl[:, :7] = torch.tensor(HOME, dtype=torch.float64) + 0.25 * torch.sin(phase)
        engine.step(everyone, 5)


def _everything(engine: CpuEngine) -> list[torch.Tensor]:
    return [
        engine.qpos.clone(),
        engine.qvel.clone(),
        engine.xpos.clone(),
        engine.xaxis.clone(),
        engine.site_xpos.clone(),
    ]


def test_keeps_the_protocol(scene: Scene) -> None:
    engine = CpuEngine(scene.model, 2)
    assert isinstance(engine, Engine)
    assert engine.qpos.shape == (2, scene.model.nq)
    assert engine.site_xmat.shape == (2, scene.model.nsite, 9)
    assert engine.sensordata.shape == (2, 0)


def test_starts_at_home_with_open_jaws(scene: Scene) -> None:
    engine = CpuEngine(scene.model, 3)
    assert torch.allclose(engine.qpos[:, list(scene.arm_qpos)], torch.tensor(HOME, dtype=torch.float64), atol=1e-12)
    assert (engine.qpos[:, list(scene.finger_qpos)] == FINGER_TRAVEL).all()
    tip = engine.site_xpos[:, scene.sites["tip"]]
    assert torch.allclose(tip, torch.tensor([[0.46, 0.0, 0.20]], dtype=torch.float64), atol=1e-6)


def test_matches_a_plain_mujoco_loop(scene: Scene) -> None:
    """Derived tensors are current after a step, not one substep behind."""
    engine = CpuEngine(scene.model, 2, num_threads=1)
    _place(engine, scene)
    data = mujoco.MjData(scene.model)
    mujoco.mj_resetDataKeyframe(scene.model, data, 0)
    data.qpos[:] = engine.qpos[1].numpy()
    data.mocap_pos[:], data.mocap_quat[:] = engine.mocap_pos[1].numpy(), engine.mocap_quat[1].numpy()
    for t in range(6):
        engine.ctrl[1, 0] = 0.1 * t
        data.ctrl[:] = engine.ctrl[1].numpy()
        engine.step(torch.tensor([False, True]), 5)
        for _ in range(5):
            mujoco.mj_step(scene.model, data)
    mujoco.mj_fwdPosition(scene.model, data)
    np.testing.assert_array_equal(engine.qpos[1].numpy(), data.qpos)
    np.testing.assert_array_equal(engine.xpos[1].numpy(), data.xpos)
    np.testing.assert_array_equal(engine.site_xmat[1].numpy(), data.site_xmat)


def test_an_inactive_simulation_does_not_change_in_any_bit(scene: Scene) -> None:
    engine = CpuEngine(scene.model, 3)
    _place(engine, scene)
    _wiggle(engine, 3)
    before = engine.state_dict()["state"]
    engine.step(torch.tensor([True, False, True]), 5)
    after = engine.state_dict()["state"]
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])
    engine.step(torch.zeros(3, dtype=torch.bool), 5)
    assert torch.equal(after, engine.state_dict()["state"])


def test_reset_of_some_leaves_the_others(scene: Scene) -> None:
    engine = CpuEngine(scene.model, 3)
    fresh = engine.state_dict()["state"]
    _place(engine, scene)
    _wiggle(engine, 4)
    engine.xfrc_applied[:] = 1.0
    before = engine.state_dict()["state"]
    engine.reset(torch.tensor([1]))
    after = engine.state_dict()["state"]
    assert torch.equal(after[1], fresh[1])
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_a_loaded_state_goes_on_bit_for_bit(scene: Scene) -> None:
    """In the middle of contacts: the solver's warm start must be part of the state."""
    engine = CpuEngine(scene.model, 4)
    _place(engine, scene)
    engine.model_field("body_mass")[:] *= torch.linspace(0.9, 1.2, 4, dtype=torch.float64)[:, None]
    engine.refresh_constants(torch.arange(4))
    _wiggle(engine, 5)
    saved = engine.state_dict()
    _wiggle(engine, 8, start=5)
    expected = _everything(engine)

    other = CpuEngine(scene.model, 4, num_threads=1)
    other.load_state_dict(saved)
    _wiggle(other, 8, start=5)
    for ours, theirs in zip(expected, _everything(other), strict=True):
        assert torch.equal(ours, theirs)


def test_loading_restores_model_fields_that_the_state_did_not_have(scene: Scene) -> None:
    engine = CpuEngine(scene.model, 2)
    saved = engine.state_dict()
    engine.model_field("geom_friction")[:] = 0.01
    engine.load_state_dict(saved)
    np.testing.assert_array_equal(engine.model_field("geom_friction")[1].numpy(), scene.model.geom_friction)


def test_a_state_of_another_size_is_refused(scene: Scene) -> None:
    with pytest.raises(ValueError, match="same task and number of environments"):
        CpuEngine(scene.model, 2).load_state_dict(CpuEngine(scene.model, 3).state_dict())


def test_friction_differs_between_simulations(scene: Scene) -> None:
    """A block pushed at 0.5 m/s slides v^2 / (2 mu g): the per-simulation friction must reach the physics."""
    engine = CpuEngine(scene.model, 2)
    friction = engine.model_field("geom_friction")
    for geom in (scene.model.geom("free").id, scene.model.geom("table").id):
        friction[:, geom, 0] = torch.tensor([0.2, 0.8], dtype=torch.float64)
    _place(engine, scene)
    place = scene.placements["free"]
    engine.step(torch.ones(2, dtype=torch.bool), 20)
    start = engine.qpos[:, place.address].clone()
    engine.qvel[:, place.dof] = 0.5
    for _ in range(20):
        engine.step(torch.ones(2, dtype=torch.bool), 5)
    slid = engine.qpos[:, place.address] - start
    expected = 0.25 / (2 * torch.tensor([0.2, 0.8], dtype=torch.float64) * 9.81)
    assert torch.allclose(slid, expected, rtol=0.3)


def test_an_unknown_model_field_is_an_error(scene: Scene) -> None:
    with pytest.raises(ValueError, match="no_such_field"):
        CpuEngine(scene.model, 1).model_field("no_such_field")


def test_divergence_is_an_error_that_names_the_simulation(scene: Scene) -> None:
    engine = CpuEngine(scene.model, 3)
    _place(engine, scene)
    engine.qvel[1] = float("nan")
    with pytest.raises(RuntimeError, match=r"simulations \[1\] diverged"):
        engine.step(torch.ones(3, dtype=torch.bool), 5)


def test_num_sims_must_be_positive(scene: Scene) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CpuEngine(scene.model, 0)


def test_simulations_may_be_named_in_any_order(scene: Scene) -> None:
    engine, expected = CpuEngine(scene.model, 4), CpuEngine(scene.model, 4)
    for e, ids in ((engine, [3, 0, 3, 2]), (expected, [0, 2, 3])):
        _place(e, scene)
        _wiggle(e, 3)
        e.reset(torch.tensor(ids))
        e.model_field("body_mass")[:] *= 1.5
        e.refresh_constants(torch.tensor(ids))
        e.forward(torch.tensor(ids))
    for got, want in zip(_everything(engine), _everything(expected), strict=True):
        assert torch.equal(got, want)
    assert torch.allclose(engine.qpos[3, list(scene.arm_qpos)], torch.tensor(HOME, dtype=torch.float64), atol=1e-12)
    assert (engine.qvel[1] != 0).any()
    assert (engine.qvel[3] == 0).all()


def test_environments_may_be_reset_in_any_order() -> None:
    env, expected = TabletopEnv("reach", 4), TabletopEnv("reach", 4)
    env.reset(torch.tensor([2, 0, 3, 1]), torch.tensor([12, 10, 13, 11]))
    expected.reset(torch.arange(4), torch.tensor([10, 11, 12, 13]))
    assert env.instructions == expected.instructions
    assert torch.equal(env.engine.qpos, expected.engine.qpos)
    assert torch.equal(env.engine.mocap_pos, expected.engine.mocap_pos)
    assert torch.equal(env.engine.xpos, expected.engine.xpos)
