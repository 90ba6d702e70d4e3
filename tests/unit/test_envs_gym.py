"""What the Gymnasium adapter refuses, and that environments from a registry work."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from tests.contract.gym_env import DriftEnv
from vla_rl.envs.gym import FunctionExpert, FunctionExpertConfig, GymConfig, GymStepEnv, make_gym


def test_registered_environment() -> None:
    env = make_gym("Pendulum-v1", num_envs=2, instruction="swing up")
    obs = env.reset([0, 1])
    assert obs.state.shape == (2, 3)
    assert obs.instruction == ("swing up", "swing up")
    plain = gym.make("Pendulum-v1")
    expected, _ = plain.reset(seed=1)
    np.testing.assert_array_equal(obs.state[1].numpy(), expected)
    actions = torch.full((2, 3, 1), 0.7)
    step = env.step(actions)
    rewards = [plain.step(np.array([0.7], np.float32))[1] for _ in range(3)]
    np.testing.assert_allclose(step.rewards[1].numpy(), rewards, rtol=1e-6)  # pyright: ignore[reportCallIssue]
    env.close()


def test_dict_observation_becomes_cameras_and_state() -> None:
    env = make_gym([DriftEnv] * 2, success_key="success")
    obs = env.reset([5, 6])
    assert list(obs.images) == ["pixels"]
    assert env.spec.state_names == ("position_0", "position_1", "speed_0")
    assert env.spec.control_hz == 20
    single, _ = DriftEnv().reset(seed=5)
    np.testing.assert_allclose(obs.state[0, :2].numpy(), single["position"], rtol=1e-6)
    env.close()


def test_success_is_read_in_every_autoreset_mode() -> None:
    found = {}
    for mode in AutoresetMode:
        env = GymStepEnv(SyncVectorEnv([DriftEnv] * 4, autoreset_mode=mode), success_key="success")
        env.reset(torch.arange(4), torch.arange(4))
        active, successes = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
        for _ in range(20):
            outcome = env.step(torch.tensor([[1.0, 0.0]] * 4), active)
            successes |= active & outcome.success
            active &= ~(outcome.terminated | outcome.truncated)
        found[mode] = successes.tolist()
        assert torch.equal(env.observe(torch.arange(4), False).state[:, 0] > 1, successes)  # frozen at the end
    assert found[AutoresetMode.DISABLED] == found[AutoresetMode.NEXT_STEP] == found[AutoresetMode.SAME_STEP]
    assert any(found[AutoresetMode.DISABLED])


def test_unsuitable_environments_are_refused() -> None:
    with pytest.raises(ValueError, match="one-dimensional Box"):
        make_gym("CartPole-v1")

    class Unbounded(DriftEnv):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    with pytest.raises(ValueError, match="must be bounded"):
        make_gym([Unbounded])

    class Discrete(DriftEnv):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = gym.spaces.Dict({"mode": gym.spaces.Discrete(3)})

    with pytest.raises(ValueError, match="only Box entries"):
        make_gym([Discrete])


def test_a_vector_environment_that_ignores_the_reset_mask_is_found_out() -> None:
    class Careless(SyncVectorEnv):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)

    env = GymStepEnv(Careless([DriftEnv] * 2, autoreset_mode=AutoresetMode.DISABLED))
    env.reset(torch.arange(2), torch.arange(2))
    env.step(torch.zeros(2, 2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="reset_mask"):
        env.reset(torch.tensor([0]), torch.tensor([7]))


def test_an_environment_without_pictures_says_so() -> None:
    class Blind(DriftEnv):
        def render(self) -> None:  # type: ignore[override]
            return None

        def _obs(self):
            return {"pixels": np.zeros((4, 4, 3), np.uint8), "position": self._x.copy(), "speed": np.zeros(1)}

    env = make_gym([Blind])
    env.reset([0])
    with pytest.raises(RuntimeError, match="render_mode='rgb_array'"):
        env.render([0])


def test_an_ended_and_parked_environment_is_resumed_as_ended():
    """Its episode ended inside a chunk and nobody reset it: the environment inside was parked since."""

    def make():
        makers = [lambda limit=limit: gym.make("Pendulum-v1", max_episode_steps=limit) for limit in (6, 30)]
        return make_gym(makers, auto_reset=False)

    env, resumed, actions = make(), make(), torch.full((2, 4, 1), 0.5)
    env.reset([1, 2])
    env.step(actions)
    assert env.step(actions).end_step.tolist() == [1, -1]
    resumed.load_state_dict(env.state_dict())
    ours, theirs = env.step(actions), resumed.step(actions)
    assert theirs.executed.tolist() == ours.executed.tolist() == [[False] * 4, [True] * 4]
    assert torch.equal(ours.rewards, theirs.rewards)
    assert torch.equal(ours.obs.state[1], theirs.obs.state[1])


def test_a_config_makes_disjoint_splits_and_an_expert_acts_by_a_function_of_the_state():
    config = GymConfig("MountainCarContinuous-v0", success="end", max_episode_steps=120)
    starts = {}
    for split in ("train", "test"):
        env = config.make(4, split=split)
        assert env.spec.max_episode_steps == 120
        starts[split] = {tuple(row) for row in env.reset(range(4)).state.tolist()}
        env.close()
    assert len(starts["train"] | starts["test"]) == 8
    env = config.make(3, split="train")
    env.reset(range(3))
    expert = FunctionExpert(env, FunctionExpertConfig("vla_rl.configs.simulators:with_its_momentum"))
    success = torch.zeros(3, dtype=torch.bool)
    while not env.ended.all():
        step = env.step(expert())
        assert torch.equal(step.success, step.terminated)  # success is the end
        success |= step.success
    assert success.all()
    with pytest.raises(ValueError, match="split 'ood' is unknown"):
        config.make(1, split="ood")
    env.close()


def test_an_experts_noise_follows_from_the_episode_and_the_step():
    config = GymConfig("MountainCarContinuous-v0", success="end")
    noisy = FunctionExpertConfig("vla_rl.configs.simulators:with_its_momentum", action_noise=0.5)
    seen = []
    for num_envs in (1, 3):
        env = config.make(num_envs, split="train")
        env.reset(range(num_envs))
        expert = FunctionExpert(env, noisy)
        actions = []
        for _ in range(3):
            actions.append(expert()[0].clone())
            env.step(actions[-1].expand(num_envs, 1, 1))
        seen.append(torch.stack(actions))
        env.close()
    assert torch.equal(*seen)
    assert len(torch.unique(seen[0])) == 3
