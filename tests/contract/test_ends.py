"""Where and how an episode ends inside a chunk: every position, every cause, against the per-step reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.reference import Reference
from tests.contract.scripted_env import FAILURE, SUCCESS, SUCCESS_AND_TIME, SUCCESS_GOES_ON, TIME, ScriptedEnv, script
from vla_rl.core import chunk_discount, chunk_reward
from vla_rl.envs.vector import ChunkedEnv, episode_seed

K = 4


def _actions(n: int, k: int = K, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("position", range(K))
@pytest.mark.parametrize(
    ("kind", "terminated", "truncated", "success"),
    [
        (SUCCESS, True, False, True),
        (FAILURE, True, False, False),
        (TIME, False, True, False),
        (SUCCESS_AND_TIME, True, True, True),
    ],
)
def test_end_at_each_position(position: int, kind: int, terminated: bool, truncated: bool, success: bool) -> None:
    env = ChunkedEnv(ScriptedEnv(1))
    env.reset([script(kind, K + position + 1)])  # the episode ends in its second chunk
    first = env.step(_actions(1))
    assert not first.ended.any()
    assert first.executed.all()
    assert first.end_step.item() == -1

    actions = _actions(1, seed=1)
    step = env.step(actions)
    assert (step.terminated.item(), step.truncated.item(), step.success.item()) == (terminated, truncated, success)
    assert step.success_at_end.item() == success
    assert step.end_step.item() == position
    assert step.executed[0].tolist() == [i <= position for i in range(K)]

    expected = [0.1 * (K + i + 1) + float(actions[0, i, 0].clamp(-1, 1)) if i <= position else 0.0 for i in range(K)]
    assert step.rewards[0].tolist() == pytest.approx(expected, abs=1e-6)
    gamma = 0.9
    assert chunk_reward(step.rewards, step.executed, gamma).item() == pytest.approx(
        sum(gamma**i * r for i, r in enumerate(expected)), abs=1e-5
    )
    assert chunk_discount(step.executed, step.terminated, gamma).item() == pytest.approx(
        0.0 if terminated else gamma ** (position + 1), abs=1e-6
    )

    # The true successor is the frame at the end (time K + position + 1), what is shown next is a new episode (time 0).
    assert step.next_obs.state[0, 1].item() == K + position + 1
    assert step.obs.state[0, 1].item() == 0
    assert step.obs.state[0, 0].item() == episode_seed(script(kind, K + position + 1), 1) % 10_000


@pytest.mark.parametrize("limit", range(1, 2 * K + 1))
def test_time_limit_truncates(limit: int) -> None:
    env = ChunkedEnv(ScriptedEnv(1, max_episode_steps=limit))
    env.reset([script(SUCCESS, 99)])
    steps = [env.step(_actions(1)) for _ in range(1 + (limit - 1) // K)]
    assert [bool(s.truncated) for s in steps] == [False] * (len(steps) - 1) + [True]
    assert not steps[-1].terminated.any()
    assert steps[-1].end_step.item() == (limit - 1) % K
    assert sum(int(s.executed.sum()) for s in steps) == limit


def test_success_exactly_at_the_time_limit_is_terminal() -> None:
    env = ChunkedEnv(ScriptedEnv(1, max_episode_steps=3))
    env.reset([script(SUCCESS, 3)])
    step = env.step(_actions(1))
    assert step.terminated.item()
    assert step.truncated.item()
    assert step.success.item()
    assert chunk_discount(step.executed, step.terminated, 0.9).item() == 0.0


def test_success_that_does_not_last() -> None:
    """`success` remembers it within the chunk, `success_at_end` does not."""
    env = ChunkedEnv(ScriptedEnv(1))
    env.reset([script(SUCCESS_GOES_ON, 2)])
    step = env.step(_actions(1))
    assert step.success.item()
    assert not step.success_at_end.item()
    assert not step.ended.item()


def test_without_auto_reset_an_ended_environment_stays_frozen() -> None:
    env = ChunkedEnv(ScriptedEnv(2), auto_reset=False)
    env.reset([script(SUCCESS, 2), script(SUCCESS, 7)])
    end = env.step(_actions(2))
    assert end.ended.tolist() == [True, False]
    assert end.obs.state[0].tolist() == end.next_obs.state[0].tolist()
    after = env.step(_actions(2, seed=1))
    assert after.executed.sum(dim=1).tolist() == [0, 3]
    assert after.rewards[0].tolist() == [0.0] * K
    assert after.ended.tolist() == [False, True]  # an end is reported once
    assert torch.equal(after.obs.state[0], end.obs.state[0])
    obs = env.reset([script(FAILURE, 3)], env_ids=[0])
    assert obs.state[0, 1].item() == 0
    assert env.step(_actions(2)).executed.sum(dim=1).tolist() == [3, 0]


def test_no_image_is_rendered_inside_a_chunk() -> None:
    scripted = ScriptedEnv(3)
    env = ChunkedEnv(scripted)
    env.reset([script(SUCCESS, 99)] * 3)
    scripted.images_rendered = 0
    env.step(_actions(3, k=8))
    assert scripted.images_rendered == 3  # one a decision and environment, whatever K is
    assert scripted.frames_rendered == 0

    env.reset([script(SUCCESS, 3), script(SUCCESS, 99), script(SUCCESS, 99)])
    scripted.images_rendered = 0
    step = env.step(_actions(3), record=[0, 2])
    assert scripted.images_rendered == 4  # and one where an episode ended
    assert {i: len(f) for i, f in step.frames.items()} == {0: 3, 2: K}
    assert scripted.frames_rendered == 3 + K

    blind = ChunkedEnv(scripted, images=False)
    scripted.images_rendered = 0
    assert blind.reset([1, 2, 3]).images == {}
    assert blind.step(_actions(3)).obs.images == {}
    assert scripted.images_rendered == 0


@settings(max_examples=60, deadline=None)
@given(
    seeds=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 12)).map(lambda p: script(*p)), min_size=1, max_size=5),
    k=st.integers(1, 6),
    limit=st.one_of(st.none(), st.integers(1, 10)),
    auto_reset=st.booleans(),
)
def test_any_mix_of_ends_equals_the_reference(seeds: list[int], k: int, limit: int | None, auto_reset: bool) -> None:
    env = ChunkedEnv(ScriptedEnv(len(seeds), limit), auto_reset=auto_reset)
    env.reset(seeds)
    references = [Reference(ScriptedEnv(1, limit), s, images=True, auto_reset=auto_reset) for s in seeds]
    for t in range(5):
        actions = _actions(len(seeds), k, seed=t)
        step = env.step(actions)
        rewards, discounts = (
            chunk_reward(step.rewards, step.executed, 0.97),
            chunk_discount(step.executed, step.terminated, 0.97),
        )
        for i, reference in enumerate(references):
            expected = reference.step(actions[i])
            assert step.rewards[i].tolist() == pytest.approx(expected.rewards, abs=1e-6)
            assert step.executed[i].tolist() == expected.executed
            assert step.terminated[i].item() == expected.terminated
            assert step.truncated[i].item() == expected.truncated
            assert step.success[i].item() == expected.success
            assert step.success_at_end[i].item() == expected.success_at_end
            assert step.end_step[i].item() == expected.end_step
            assert torch.equal(step.next_obs.state[i], expected.next_obs.state[0])
            assert torch.equal(step.obs.state[i], expected.obs.state[0])
            assert torch.equal(step.next_obs.images["agent"][i], expected.next_obs.images["agent"][0])
            assert step.next_obs.instruction[i] == expected.next_obs.instruction[0]
            reward, discount = reference.discounted(expected, 0.97)
            assert rewards[i].item() == pytest.approx(reward, abs=1e-5)
            if any(expected.executed):
                assert discounts[i].item() == pytest.approx(discount, abs=1e-6)


def test_a_gap_in_executed_costs_no_discount() -> None:
    executed = torch.tensor([[True, False, True, True]])
    rewards = torch.tensor([[1.0, 5.0, 2.0, 4.0]])
    assert chunk_reward(rewards, executed, 0.5).item() == 1.0 + 0.5 * 2.0 + 0.25 * 4.0
    assert chunk_discount(executed, torch.tensor([False]), 0.5).item() == 0.125
