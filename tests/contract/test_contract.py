"""What every environment of the project keeps, ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.contract.environments import ENVIRONMENTS, SLOW
from tests.contract.reference import Reference
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.protocols import StepEnv

K = 5
CHUNKS = 4


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in sorted(ENVIRONMENTS)])
def make(request: pytest.FixtureRequest) -> Iterator:
    """A factory that closes what it made."""
    made: list[StepEnv] = []

    def build(num_envs: int) -> StepEnv:
        made.append(ENVIRONMENTS[request.param](num_envs))
        return made[-1]

    yield build
    for env in made:
        env.close()


def _actions(env: StepEnv, n: int, seed: int) -> torch.Tensor:
    """Some inside, some outside the bounds: the environment clamps."""
    low, high = torch.tensor(env.spec.action.low), torch.tensor(env.spec.action.high)
    u = torch.rand(8, K, env.spec.action.dim, generator=torch.Generator().manual_seed(seed))[:n]
    return low + (1.2 * u - 0.1) * (high - low)


def _assert_equal_obs(a, b, row_a: int, row_b: int) -> None:
    assert torch.equal(a.state[row_a], b.state[row_b])
    assert a.instruction[row_a] == b.instruction[row_b]
    for camera in a.images:
        assert torch.equal(a.images[camera][row_a], b.images[camera][row_b])


@pytest.mark.parametrize("auto_reset", [True, False])
def test_equals_the_per_step_reference(make, auto_reset: bool) -> None:
    """Also says that a result does not depend on num_envs: the reference has one environment, the batch three."""
    seeds = [3, 11, 12]
    one, env = make(1), ChunkedEnv(make(3), auto_reset=auto_reset)
    chunks = [_actions(one, 3, t) for t in range(CHUNKS)]
    references = []
    for i, seed in enumerate(seeds):
        reference = Reference(one, seed, images=True, auto_reset=auto_reset)
        references.append((reference.observe(), [reference.step(actions[i]) for actions in chunks]))
    obs = env.reset(seeds)
    for i, (first, _) in enumerate(references):
        _assert_equal_obs(obs, first, i, 0)
    for t, actions in enumerate(chunks):
        step = env.step(actions)
        for i, (_, steps) in enumerate(references):
            expected = steps[t]
            assert step.rewards[i].tolist() == expected.rewards
            assert step.executed[i].tolist() == expected.executed
            assert (step.terminated[i].item(), step.truncated[i].item()) == (expected.terminated, expected.truncated)
            assert (step.success[i].item(), step.success_at_end[i].item()) == (
                expected.success,
                expected.success_at_end,
            )
            assert step.end_step[i].item() == expected.end_step
            _assert_equal_obs(step.next_obs, expected.next_obs, i, 0)
            _assert_equal_obs(step.obs, expected.obs, i, 0)


def test_spec_is_what_comes_out(make) -> None:
    env = ChunkedEnv(make(2))
    obs = env.reset([0, 1])
    assert obs.state.shape == (2, env.spec.state_dim)
    assert {c: x.shape[1:3] for c, x in obs.images.items()} == {
        c: (s.height, s.width) for c, s in env.spec.cameras.items()
    }
    step = env.step(_actions(env._env, 2, 0))
    assert step.rewards.shape == step.executed.shape == (2, K)
    assert step.rewards.dtype == torch.float32
    assert step.end_step.dtype == torch.int64


def test_partial_reset_leaves_the_others_alone(make) -> None:
    env, control = ChunkedEnv(make(3)), ChunkedEnv(make(3))
    env.reset([3, 11, 12])
    control.reset([3, 11, 12])
    env.step(_actions(env._env, 3, 0)[:, :2])
    control.step(_actions(env._env, 3, 0)[:, :2])
    obs = env.reset([99], env_ids=[1])
    fresh = ChunkedEnv(make(1))
    _assert_equal_obs(obs, fresh.reset([99]), 1, 0)
    actions = _actions(env._env, 3, 1)[:, :2]
    a, b, c = env.step(actions), control.step(actions), fresh.step(actions[1:2])
    for i in (0, 2):
        assert torch.equal(a.rewards[i], b.rewards[i])
        _assert_equal_obs(a.next_obs, b.next_obs, i, i)
    assert torch.equal(a.rewards[1], c.rewards[0])
    _assert_equal_obs(a.next_obs, c.next_obs, 1, 0)


@pytest.mark.parametrize("auto_reset", [True, False])
def test_state_dict_continues_bit_for_bit(make, auto_reset: bool) -> None:
    env = ChunkedEnv(make(3), auto_reset=auto_reset)
    env.reset([3, 11, 12])
    for t in range(2):
        env.step(_actions(env._env, 3, t))
    saved, shown = env.state_dict(), env.observe()
    resumed = ChunkedEnv(make(3), auto_reset=auto_reset)
    resumed.load_state_dict(saved)
    for i in range(3):
        _assert_equal_obs(resumed.observe(), shown, i, i)
    for t in range(2, 2 + CHUNKS):
        a, b = env.step(_actions(env._env, 3, t)), resumed.step(_actions(env._env, 3, t))
        assert torch.equal(a.rewards, b.rewards)
        assert torch.equal(a.executed, b.executed)
        assert torch.equal(a.end_step, b.end_step)
        for i in range(3):
            _assert_equal_obs(a.next_obs, b.next_obs, i, i)
            _assert_equal_obs(a.obs, b.obs, i, i)


def test_recording_changes_nothing(make) -> None:
    env, control = ChunkedEnv(make(2)), ChunkedEnv(make(2))
    env.reset([3, 11])
    control.reset([3, 11])
    a, b = env.step(_actions(env._env, 2, 0), record=[1]), control.step(_actions(env._env, 2, 0))
    assert torch.equal(a.rewards, b.rewards)
    assert torch.equal(a.next_obs.state, b.next_obs.state)
    assert len(a.frames[1]) == int(a.executed[1].sum())
    assert a.frames[1].dtype == torch.uint8
    assert 0 not in a.frames


def test_bad_input_is_refused_before_anything_moves(make) -> None:
    env = ChunkedEnv(make(2))
    env.reset([3, 11])
    before = env.observe()
    actions = _actions(env._env, 2, 0)
    poisoned = actions.clone()
    poisoned[1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"environments \[1\] are not finite"):
        env.step(poisoned)
    with pytest.raises(ValueError, match=r"actions must be \[N=2, K>=1"):
        env.step(actions[:1])
    with pytest.raises(ValueError, match="actions must be"):
        env.step(actions[..., :-1])
    with pytest.raises(ValueError, match="one seed an environment"):
        env.reset([1])
    with pytest.raises(ValueError, match="out of range"):
        env.reset([1], env_ids=[2])
    with pytest.raises(ValueError, match=r"seeds must lie in"):
        env.reset([-1, 0])
    assert torch.equal(env.observe().state, before.state)
