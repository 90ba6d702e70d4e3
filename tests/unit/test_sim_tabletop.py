"""The tabletop environment and its scripted expert: resume, independence of the batch, sentences that matter."""

from __future__ import annotations

import pytest
import torch

from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv, make_tabletop
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.protocols import StepEnv
from vla_rl.sim.experts import ExpertConfig, ScriptedExpert

torch.set_num_threads(1)


def _actions(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.rand(n, k, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _play(env: ChunkedEnv, expert: ScriptedExpert, steps: int = 45) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Success, termination and length of one episode in every environment."""
    success = torch.zeros(env.num_envs, dtype=torch.bool)
    ended, length = success.clone(), torch.zeros(env.num_envs)
    for _ in range(steps):
        step = env.step(expert())
        success |= step.success
        ended |= step.terminated
        length += step.executed.sum(dim=1)
    return success, ended, length


# -------------------------------------------------------------------------------------------------- seeds and resume
def test_trajectories_do_not_depend_on_the_number_of_environments() -> None:
    """A batch of 33 and a batch of 1, same seed, same actions: bit for bit, over auto-resets."""
    many = make_tabletop("reach", 33, reward="dense", max_episode_steps=9, privileged_state=True)
    one = make_tabletop("reach", 1, reward="dense", max_episode_steps=9, privileged_state=True)
    many.reset([3, 1, 4, *range(100, 130)])
    one.reset([4])
    for t in range(6):
        actions = _actions(33, 4, t)
        a, b = many.step(actions), one.step(actions[2:3])
        assert torch.equal(a.obs.state[2], b.obs.state[0])
        assert torch.equal(a.rewards[2], b.rewards[0])
        assert torch.equal(a.executed[2], b.executed[0])
        assert a.obs.instruction[2] == b.obs.instruction[0]
    assert many.episode_seeds[2] == one.episode_seeds[0]


def test_resumes_bit_for_bit_in_the_middle_of_an_episode() -> None:
    options = {"reward": "dense", "cameras": {"agent": 32}, "max_episode_steps": 11, "control": "ee_delta"}
    env = make_tabletop("reach", 4, **options)
    env.reset([1, 2, 3, 4])
    for t in range(3):
        env.step(_actions(4, 2, t))
    saved = env.state_dict()
    expected = [env.step(_actions(4, 3, 10 + t)) for t in range(5)]
    fresh = make_tabletop("reach", 4, **options)
    fresh.load_state_dict(saved)
    for t, before in enumerate(expected):
        after = fresh.step(_actions(4, 3, 10 + t))
        assert torch.equal(before.obs.state, after.obs.state)
        assert torch.equal(before.rewards, after.rewards)
        assert torch.equal(before.obs.images["agent"], after.obs.images["agent"])
        assert before.obs.instruction == after.obs.instruction
    env.close()
    fresh.close()


def test_state_and_spec_agree() -> None:
    env = TabletopEnv("reach", 2, TabletopConfig(privileged_state=True))
    assert isinstance(env, StepEnv)
    env.reset(torch.arange(2), torch.arange(2))
    state = env.observe(torch.arange(2), images=False).state
    column = {name: state[:, i] for i, name in enumerate(env.spec.state_names)}
    assert torch.allclose(column["tip_z"], env.view.tip_pos[:, 2].float())
    assert torch.allclose(column["joint4"], env.view.joint_positions[:, 3].float())
    assert torch.allclose(column["gripper_opening"], torch.tensor(0.08))
    target = int(env.variables["target"][1])
    assert column["target_x"][1] == column[f"block{target}_x"][1]
    assert abs(float(column["target_z"][1]) - 0.06) < 1e-6
    assert env.spec.control_hz == pytest.approx(20.0)


def test_unknown_options_are_errors() -> None:
    for option, value, known in (("split", "val", "train, test"), ("control", "osc", "ee_delta"),
                                 ("reward", "shaped", "sparse, dense")):  # fmt: skip
        with pytest.raises(ValueError, match=known):
            make_tabletop("reach", 1, **{option: value})
    with pytest.raises(ValueError, match="agent, wrist"):
        make_tabletop("reach", 1, cameras={"front": 64})
    with pytest.raises(ValueError, match="at least 1"):
        make_tabletop("reach", 1, max_episode_steps=0)


# ----------------------------------------------------------------------------------------------------- reach, judged
def test_the_expert_succeeds_and_dense_reward_adds_up() -> None:
    env = make_tabletop("reach", 200, split="test", reward="dense", auto_reset=False)
    env.reset(list(range(200)))
    inner = env.step_env
    start = inner._progress.clone()
    expert, total = ScriptedExpert(env), torch.zeros(200)
    success = torch.zeros(200, dtype=torch.bool)
    for _ in range(40):
        step = env.step(expert())
        success |= step.success
        total += step.rewards.sum(dim=1)
    assert success.float().mean() >= 0.95
    assert torch.allclose(total, (inner._progress - start).float() + success, atol=1e-4)
    assert (total[success] > 1.4).all()


@pytest.mark.parametrize("split", ["ood", "train"])
def test_the_expert_succeeds_in_other_splits_and_in_blind_chunks(split: str) -> None:
    env = make_tabletop("reach", 200, split=split, auto_reset=False)
    env.reset(list(range(200)))
    expert = ScriptedExpert(env)
    success = torch.zeros(200, dtype=torch.bool)
    for _ in range(14):
        success |= env.step(expert.chunk(3)).success
    assert success.float().mean() >= 0.95


def test_the_wrong_block_ends_the_episode_as_a_failure() -> None:
    """The expert is told another colour than the predicate: it fails at once and earns nothing."""
    env = make_tabletop("reach", 120, auto_reset=False)
    env.reset(list(range(120)))
    inner = env.step_env
    truth = inner.variables["target"].clone()

    class Misled(ScriptedExpert):
        def __call__(self) -> torch.Tensor:
            inner.variables["target"] = (truth + 1) % 3
            actions = super().__call__()
            inner.variables["target"] = truth
            return actions

    success, terminated, length = _play(env, Misled(env))
    assert terminated.float().mean() >= 0.95
    assert success.float().mean() <= 0.05
    assert length.max() < 40


def test_the_sentence_matters() -> None:
    """An expert that ignores the sentence (always the first block) fails at half of the episodes or more."""
    env = make_tabletop("reach", 200, auto_reset=False)
    env.reset(list(range(200)))
    inner = env.step_env
    truth = inner.variables["target"].clone()

    class Deaf(ScriptedExpert):
        def __call__(self) -> torch.Tensor:
            inner.variables["target"] = torch.zeros_like(truth)
            actions = super().__call__()
            inner.variables["target"] = truth
            return actions

    success, terminated, _ = _play(env, Deaf(env))
    assert success.float().mean() <= 0.5
    assert torch.equal(success, (truth == 0) & terminated)


# ------------------------------------------------------------------------------------------------- clumsy experts
def test_noise_comes_from_the_episodes_seed() -> None:
    config = ExpertConfig(action_noise=0.4, target_bias=0.01)
    many, one = make_tabletop("reach", 3, auto_reset=False), make_tabletop("reach", 1, auto_reset=False)
    many.reset([7, 8, 9])
    one.reset([9])
    expert_many, expert_one = ScriptedExpert(many, config), ScriptedExpert(one, config)
    for _ in range(6):
        a, b = expert_many(), expert_one()
        assert torch.equal(a[2], b[0])
        assert not torch.equal(a[0], a[2])
        many.step(a)
        one.step(b)


def test_noise_and_bias_make_it_clumsier() -> None:
    lengths, rates = [], []
    for config in (ExpertConfig(), ExpertConfig(action_noise=0.5), ExpertConfig(target_bias=0.03)):
        env = make_tabletop("reach", 150, auto_reset=False)
        env.reset(list(range(150)))
        success, _, length = _play(env, ScriptedExpert(env, config))
        lengths.append(float(length.mean()))
        rates.append(float(success.float().mean()))
    assert lengths[1] > lengths[0]
    assert rates[0] >= 0.95 > rates[2]


def test_slow_experts_move_slower() -> None:
    env = make_tabletop("reach", 4)
    env.reset([0, 1, 2, 3])
    assert ScriptedExpert(env, ExpertConfig(max_action=0.3))()[..., :3].abs().max() <= 0.3 + 1e-6
    assert ScriptedExpert(env)()[..., :3].abs().max() == 1.0


def test_the_expert_follows_auto_resets() -> None:
    """After an end it starts over with the new episode's first waypoint, so it keeps succeeding."""
    env = make_tabletop("reach", 8)
    env.reset(list(range(8)))
    expert = ScriptedExpert(env)
    ends, successes = 0, 0
    for _ in range(60):
        step = env.step(expert())
        ends += int(step.ended.sum())
        successes += int(step.success.sum())
    assert ends >= 30
    assert successes >= 0.95 * ends


def test_what_an_expert_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match="Cartesian deltas"):
        ScriptedExpert(make_tabletop("reach", 1, control="joint_delta"))
    with pytest.raises(ValueError, match="max_action"):
        ExpertConfig(max_action=0.0)
