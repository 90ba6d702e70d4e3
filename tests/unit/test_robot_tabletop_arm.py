"""A tabletop policy's actions and state on a measured arm are the simulator's own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vla_rl.configs import get_recipe
from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv
from vla_rl.real_robot.deploy_config import TabletopScene
from vla_rl.real_robot.deploy_processes import check_server
from vla_rl.real_robot.drivers.dds_arm import twin_arm_spec
from vla_rl.real_robot.interfaces import ArmState, Command
from vla_rl.real_robot.kinematics import ForwardKinematics
from vla_rl.real_robot.modes import Mode
from vla_rl.real_robot.tabletop_arm import TabletopArm, tabletop_chain

ONE = torch.tensor([0])


class Measuring:
    """The simulator's arm as a guarded arm that is only read."""

    def __init__(self, env, spec=None):
        self.env, self.spec = env, spec or twin_arm_spec()

    def state(self):
        view = self.env.view
        joints, width = view.joint_positions[0].numpy().copy(), float(view.gripper_opening[0])
        return ArmState(joints, np.zeros(7), width, 0.0)

    def read(self):
        return self.state(), Mode.RUN, ""


@pytest.mark.parametrize("control", ["ee_delta", "ee_delta_yaw", "joint_delta"])
def test_targets_and_state_are_those_of_the_simulator(control):
    env = TabletopEnv("pick", 1, TabletopConfig(split="test", control=control, num_threads=1))
    env.reset(ONE, torch.tensor([3]))
    arm = TabletopArm(Measuring(env), control)
    assert arm.action == env.spec.action
    arm.read()
    arm.begin()
    generator = np.random.default_rng(0)
    standing = Command(env.view.joint_positions[0].numpy(), 0.08)
    for _ in range(30):
        state, _, _ = arm.read()
        seen = env.observe(ONE, images=False).state[0].numpy()
        # Both fingers are measured as one width, so that is all that may differ.
        np.testing.assert_allclose(arm.observe(state), seen, atol=1e-6)
        action = generator.uniform(-1.5, 1.5, arm.action.dim)
        standing = arm.target(action, standing)
        env.step(torch.from_numpy(action)[None], torch.tensor([True]))
        target = env.engine.ctrl[0].numpy()
        np.testing.assert_allclose(standing.position, target[:7], atol=1e-12)
        assert standing.gripper == pytest.approx(target[7] + target[8])
    env.close()


def test_the_setpoint_begins_where_the_arm_is_and_stays_on_its_leash():
    env = TabletopEnv("reach", 1, TabletopConfig(num_threads=1))
    env.reset(ONE, torch.tensor([0]))
    arm = TabletopArm(Measuring(env))
    down, standing = np.array([0.0, 0.0, -1.0, 1.0]), Command(np.zeros(7), 0.0)
    arm.read()
    arm.begin()
    first = arm.target(down, standing).position
    for _ in range(10):  # the arm does not move: it is blocked, and the wish must not grow
        arm.read()
        blocked = arm.target(down, standing).position
    here = env.view.joint_positions[0].numpy()
    # The leash is 4 cm, two steps; the pull towards home is the same in both.
    assert 1.8 < np.abs(blocked - here).max() / np.abs(first - here).max() < 2.5
    arm.read()
    arm.begin()
    np.testing.assert_array_equal(arm.target(down, standing).position, first)
    env.close()


def test_what_cannot_be_executed_is_refused():
    env = TabletopEnv("reach", 1, TabletopConfig(num_threads=1))
    arm, standing = TabletopArm(Measuring(env)), Command(np.zeros(7), 0.0)
    with pytest.raises(ValueError, match=r"4 finite numbers \(dx, dy, dz, gripper\)"):
        arm.target(np.zeros(7), standing)
    with pytest.raises(ValueError, match="4 finite numbers"):
        arm.target(np.array([0.0, np.nan, 0.0, 0.0]), standing)
    spec = twin_arm_spec()
    with pytest.raises(ValueError, match="moves joint1"):
        TabletopArm(Measuring(env, replace(spec, joint_names=tuple("abcdefg"))))
    env.close()


def test_the_filters_chain_ends_between_the_fingertips():
    env = TabletopEnv("reach", 1, TabletopConfig(num_threads=1))
    tip = ForwardKinematics(tabletop_chain())
    for seed in range(5):
        env.reset(ONE, torch.tensor([seed]))
        np.testing.assert_allclose(tip(env.view.joint_positions[0].numpy()), env.view.tip_pos[0].numpy(), atol=1e-9)
    env.close()


def test_episodes_are_those_of_the_recipes_evaluation():
    recipe = get_recipe("demo")
    scene = TabletopScene.of(recipe, "runs/x/policy")
    assert (scene.task, scene.split, scene.first_seed) == ("reach", "test", 0)
    assert (scene.cameras, scene.image_size, scene.execution_horizon) == (("agent",), 64, 4)
    with pytest.raises(ValueError, match="privileged_state"):
        TabletopScene.of(replace(recipe, env=replace(recipe.env, privileged_state=True)), "x")
    with pytest.raises(ValueError, match="PointMazeConfig"):
        TabletopScene.of(get_recipe("maze_wsrl"), "x")


def test_a_server_of_another_robot_is_refused():
    action = TabletopArm(Measuring(env := TabletopEnv("reach", 1, TabletopConfig(num_threads=1)))).action
    env.close()
    check_server({}, action, "async")  # another server says nothing
    check_server({"vla_rl": {"action_names": ["dx", "dy", "dz", "gripper"], "rtc": True}}, action, "rtc")
    with pytest.raises(RuntimeError, match="actions are dx, dy, the arm's dx, dy, dz, gripper"):
        check_server({"vla_rl": {"action_names": ["dx", "dy"]}}, action, "async")
    with pytest.raises(RuntimeError, match="does not continue chunks"):
        check_server({"vla_rl": {"rtc": False}}, action, "rtc")
