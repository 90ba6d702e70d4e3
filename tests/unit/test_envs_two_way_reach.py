"""The two-way reach task: dynamics by hand, ends, demonstrations around both sides, and the policy that drives it."""

import pytest
import torch

from vla_rl.envs.two_way_reach import MAX_EPISODE_STEPS, TwoWayReachEnv, make_two_way_reach, scripted_demos
from vla_rl.flow import ode
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.protocols import FlowPolicy, HasSupervisedLoss, PolicyInputs, StepEnv

ALL = torch.tensor([True])


def make_env(position=(0.0, -0.9), goal=(0.5, 0.85)):
    env = TwoWayReachEnv(1)
    env.reset(torch.tensor([0]), torch.tensor([0]))
    state = env.state_dict()
    env.load_state_dict(state | {"position": torch.tensor([position]), "goal": torch.tensor([goal])})
    return env


def test_a_step_moves_by_a_clamped_action():
    env = make_env()
    env.step(torch.tensor([[0.5, 3.0]]), ALL)
    state = env.observe(torch.tensor([0]), False).state[0]
    torch.testing.assert_close(state, torch.tensor([0.06, -0.78, 0.5, 0.85, 1 / 32]))
    env.step(torch.tensor([[1.0, 1.0]]), torch.tensor([False]))
    assert torch.equal(env.observe(torch.tensor([0]), False).state[0], state)


@pytest.mark.parametrize(
    ("position", "action", "success", "ends"),
    [
        ((0.5, 0.70), (0.0, 1.0), True, True),  # 0.03 from the goal
        ((0.5, 0.60), (0.0, 1.0), False, False),
        ((0.0, -0.45), (0.0, 1.0), False, True),  # into the disc
        ((0.95, 0.0), (1.0, 0.0), False, True),  # out of the box
        ((0.5, -0.5), (0.0, 1.0), False, False),
    ],
)
def test_ends(position, action, success, ends):
    outcome = make_env(position).step(torch.tensor([action]), ALL)
    assert outcome.success.item() is success
    assert outcome.reward.item() == float(success)
    assert outcome.terminated.item() is ends
    assert not outcome.truncated.item()


def test_the_deadline_is_a_failure_that_terminates():
    env = make_two_way_reach(1, auto_reset=False)
    env.reset([3])
    for _ in range(MAX_EPISODE_STEPS // 4):
        step = env.step(torch.zeros(1, 4, 2))
    assert step.terminated.item()
    assert step.end_step.item() == 3
    assert step.final_obs.state[0, 4] == 1.0


def test_initial_states_fill_their_ranges():
    env = TwoWayReachEnv(2000)
    ids = torch.arange(2000)
    env.reset(ids, ids)
    state = env.observe(ids, False).state
    for column, low, high in ((0, -0.25, 0.25), (2, -0.6, 0.6)):
        assert low <= state[:, column].min() < low + 0.01
        assert high - 0.01 < state[:, column].max() <= high
    assert (state[:, 1] == -0.9).all()
    assert isinstance(env, StepEnv)


def test_demonstrations_reach_the_goal_on_both_sides():
    state, actions, mask = scripted_demos(20, seed=0)
    assert state.shape[1] == 5
    assert actions.shape[1:] == (4, 2)
    assert mask[:, 0].all()
    assert actions[mask].abs().max() <= 1.0
    assert (state[:, 4] == 0.0).sum() == 20  # one first decision a demonstration
    halfway = state[(state[:, 1] - 0.0).abs() < 0.25]
    assert (halfway[:, 0] > 0.4).any()
    assert (halfway[:, 0] < -0.4).any()
    # replayed in the environment the last chunk of each demonstration ends at its goal
    last = torch.cat([(state[1:, 4] == 0.0).nonzero().flatten(), torch.tensor([len(state) - 1])])
    end = state[last, :2] + 0.12 * (actions[last] * mask[last, :, None]).sum(dim=1)
    assert ((end - state[last, 2:4]).norm(dim=1) < 0.08).all()
    again = scripted_demos(20, seed=0)
    assert torch.equal(state, again[0])
    assert not torch.equal(actions[:10], scripted_demos(20, seed=1)[1][:10])


def test_picture_shows_point_goal_and_disc():
    picture = make_env(position=(-0.9, -0.9), goal=(0.5, 0.85)).render(torch.tensor([0]))
    assert picture.shape == (1, 64, 64, 3)
    assert picture[0, 32, 32].tolist() == [150, 150, 150]
    assert picture[0, 60, 3].tolist() == [200, 40, 40]  # bottom left
    assert picture[0, 4, 47].tolist() == [40, 160, 60]  # top right


# ------------------------------------------------------------------------------------------------ the state-only policy
def test_flow_mlp_has_the_capabilities():
    torch.set_num_threads(1)
    policy = FlowMLP(FlowMLPConfig(state_dim=5, action_dim=2))
    assert isinstance(policy, FlowPolicy)
    assert isinstance(policy, HasSupervisedLoss)
    assert 30_000 < sum(p.numel() for p in policy.parameters()) < 60_000
    with pytest.raises(ValueError, match="even"):
        FlowMLPConfig(state_dim=5, action_dim=2, time_dim=3)
    with pytest.raises(ValueError, match="needs state"):
        FlowMLP(FlowMLPConfig(state_dim=4, action_dim=2)).preprocess(make_env().observe(torch.tensor([0]), False))


def test_flow_mlp_acts_by_the_ode_and_learns_a_bimodal_target():
    """Actions are +0.5 or -0.5: the flow must sample both, where a mean would be 0."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy = FlowMLP(FlowMLPConfig(state_dim=1, action_dim=1, action_horizon=2))
    rng = torch.Generator().manual_seed(0)
    inputs = PolicyInputs({}, torch.zeros(256, 0, dtype=torch.int64), torch.zeros(256, 1))
    mask = torch.ones(256, 2, dtype=torch.bool)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(400):
        sign = torch.randint(2, (256, 1, 1), generator=rng) * 1.0 - 0.5
        loss = policy.supervised_loss(inputs, sign.expand(-1, 2, 1), mask, rng)
        assert loss.shape == (256,)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    noise = torch.randn(256, 2, 1, generator=rng)
    with torch.no_grad():
        actions = ode(policy, policy.encode(inputs), noise, 8)
    assert ((actions.abs() - 0.5).abs() < 0.2).float().mean() > 0.9
    assert 0.3 < (actions[:, 0] > 0).float().mean() < 0.7


def test_padded_steps_do_not_reach_the_gradient():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy = FlowMLP(FlowMLPConfig(state_dim=1, action_dim=1, action_horizon=3, width=16))
    inputs = PolicyInputs({}, torch.zeros(8, 0, dtype=torch.int64), torch.zeros(8, 1))
    mask = torch.tensor([[True, True, False]]).expand(8, 3)
    losses = []
    for padding in (0.0, 100.0):
        actions = torch.full((8, 3, 1), 0.3)
        actions[:, 2] = padding
        losses.append(policy.supervised_loss(inputs, actions, mask, torch.Generator().manual_seed(1)))
    assert torch.equal(losses[0], losses[1])
