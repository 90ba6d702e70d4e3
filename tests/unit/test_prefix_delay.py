"""Training-time real-time chunking: chunks whose first steps are given, from the loss to what continues them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.flow_vlas import ARM, observation
from tests.unit.test_sft import TINY, Demonstrations
from tests.unit.tiny_families import FLOW, open_zeros, tiny_policy
from vla_rl.flow.sampling import ode
from vla_rl.policies.blocks.expert import ActionExpertConfig
from vla_rl.policies.blocks.flow_matching import FlowMatchingConfig, draw_flow_time, flow_matching_loss
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints.native import load_policy
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.policies.tiny import TinyVLA, TinyVLAConfig
from vla_rl.protocols import Prefix, VelocityOutput
from vla_rl.serving.rtc import RTCConfig, continue_chunks, trained_delay, trained_ode
from vla_rl.train.sft import SFTConfig, SupervisedTrainer, run_sft

NO_PREFIX = Prefix(torch.zeros(1, 0, 0), torch.zeros(1, 0, dtype=torch.bool), torch.zeros(1, 0))


def loss_of(config: FlowMatchingConfig, actions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss [N], and what the velocity, which is 0, was asked: x_t and flow times."""
    asked: list[Tensor] = []

    def velocity(x_t: Tensor, flow_time: Tensor) -> Tensor:
        asked.extend((x_t, flow_time))
        return torch.zeros_like(x_t)

    loss = flow_matching_loss(velocity, actions, mask, config, torch.Generator().manual_seed(3))
    return loss, asked[0], asked[1]


def test_the_given_steps_are_clean_and_bear_no_loss() -> None:
    n, horizon, draws = 200, 5, 3
    actions = torch.randn(n, horizon, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(n, horizon, dtype=torch.bool)
    mask[0, 2:] = False
    config = FlowMatchingConfig(num_draws=draws, max_prefix_delay=3)
    loss, x_t, time = loss_of(config, actions, mask)
    given = time == 0.0
    delays = given.sum(dim=1)
    assert torch.equal(given, torch.arange(horizon) < delays[:, None])  # the first ones, and no drawn time is 0
    assert delays.unique(return_counts=True)[0].tolist() == [0, 1, 2, 3]
    assert delays.unique(return_counts=True)[1].min() > 0.8 * n * draws / 4  # uniform: 150 each, 2.8 deviations
    assert torch.equal(time, torch.where(given, 0.0, time.amax(dim=1, keepdim=True)))  # the others share one
    unpadded = actions[1:].repeat(draws, 1, 1)
    rows = (torch.arange(n * draws) % n) > 0
    assert torch.equal(x_t[rows][given[rows]], unpadded[given[rows]])

    g = torch.Generator().manual_seed(3)  # the loss again: the same time and noise as without, and a mean over the rest
    draw_flow_time(n * draws, config, g)
    noise = torch.randn(draws, n, horizon, 2, generator=g)
    error = (noise - actions).square().mean(dim=3)
    weight = (~given.view(draws, n, horizon) & mask).float()
    expected = ((error * weight).sum(dim=2) / weight.sum(dim=2).clamp_min(1)).mean(dim=0)
    torch.testing.assert_close(loss, expected)


def test_without_a_delay_nothing_has_changed() -> None:
    """Bit for bit, and not one number more is drawn."""
    actions = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(0))
    config = FlowMatchingConfig(num_draws=2)
    g = torch.Generator().manual_seed(3)
    loss, x_t, time = loss_of(config, actions, torch.ones(6, 4, dtype=torch.bool))
    t = draw_flow_time(12, config, g)
    noise = torch.randn(2, 6, 4, 2, generator=g).flatten(0, 1)
    assert torch.equal(time, t)
    repeated = actions.repeat(2, 1, 1)
    assert torch.equal(x_t, t[:, None, None] * noise + (1.0 - t[:, None, None]) * repeated)
    error = (noise - repeated).square().mean(dim=2)
    assert torch.equal(loss, (error.sum(dim=1) / 4).view(2, 6).mean(dim=0))
    after = torch.Generator().manual_seed(3)
    flow_matching_loss(lambda x, _: x, actions, torch.ones(6, 4, dtype=torch.bool), config, after)
    assert torch.equal(after.get_state(), g.get_state())


def test_a_delay_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="choose at most 3"):
        loss_of(FlowMatchingConfig(max_prefix_delay=4), torch.zeros(2, 4, 1), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="0 or more"):
        FlowMatchingConfig(max_prefix_delay=-1)
    with pytest.raises(ValueError, match="0 or more"):
        SFTConfig(max_prefix_delay=-1)
    with pytest.raises(ValueError, match="one for the whole chunk"):
        FlowMLPConfig(flow_matching=FlowMatchingConfig(max_prefix_delay=1))
    with pytest.raises(TypeError, match=r"FlowMLP does not\. Leave it at 0"):
        SupervisedTrainer(FlowMLP(FlowMLPConfig(state_dim=2, action_dim=2)), SFTConfig(max_prefix_delay=1))
    with pytest.raises(ValueError, match="less than the policy's 4 steps"):
        SupervisedTrainer(TinyVLA(TINY), SFTConfig(max_prefix_delay=4))


@pytest.mark.parametrize("name", ["tiny", *FLOW])
def test_a_time_for_each_step(name: str) -> None:
    """Equal times are one time; and a step's own time matters to it, and to the others through attention."""
    config = TINY if name == "tiny" else tiny_policy(name, 4, 2)
    policy: Any = build_policy(config, ARM, seed=0) if name != "tiny" else TinyVLA(TINY)
    open_zeros(policy)
    policy.eval()
    if name == "tiny":
        obs = observation(2, size=32, cameras=("agent",), state_dim=2)
    else:
        obs = observation(2, size=32, cameras=("front",), state_dim=3)
    with torch.no_grad():
        prefix = policy.encode(policy.preprocess(obs))
        x_t = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(1))
        one = policy.velocity(prefix, x_t, torch.tensor([0.9, 0.3])).velocity
        each = torch.tensor([0.9, 0.3])[:, None].repeat(1, 4)
        torch.testing.assert_close(policy.velocity(prefix, x_t, each).velocity, one)
        each[0, :2] = 0.0
        other = policy.velocity(prefix, x_t, each).velocity
    torch.testing.assert_close(other[1], one[1])
    assert ((other[0] - one[0]).abs().amax(dim=1) > 1e-5).all()


def test_the_saved_policy_says_how_it_was_trained(tmp_path: Any) -> None:
    config = SFTConfig(num_updates=2, batch_size=16, warmup_updates=0, max_prefix_delay=2)
    policy = TinyVLA(TINY)
    run_sft(policy, Demonstrations(), config, tmp_path, tensorboard=False)
    stored: Any = load_policy(tmp_path / "policy")
    assert trained_delay(policy) == trained_delay(stored) == 2
    SupervisedTrainer(stored, SFTConfig())  # 0 leaves what the policy says
    assert trained_delay(stored) == 2
    assert trained_delay(TinyVLA(TINY)) == trained_delay(nn.Linear(1, 1)) == 0


class StepTimes(nn.Module):
    """v = x / 2 + the step's own time: everything can be computed by hand."""

    action_dim = 1

    def __init__(self, max_prefix_delay: int) -> None:
        super().__init__()
        self.config = replace(TINY, flow_matching=FlowMatchingConfig(max_prefix_delay=max_prefix_delay))

    def velocity(self, prefix: Prefix, x_t: Tensor, flow_time: Tensor) -> VelocityOutput:
        time = flow_time if flow_time.ndim == 2 else flow_time[:, None].expand(x_t.shape[:2])
        return VelocityOutput(x_t / 2 + x_t.mean(dim=1, keepdim=True) + time[..., None], x_t)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        return actions / 2.0

    def unnormalize_actions(self, actions: Tensor) -> Tensor:
        return actions * 2.0


def test_continuing_by_hand() -> None:
    policy: Any = StepTimes(2)
    x_1, planned = torch.tensor([[[0.4], [-1.0], [2.0]]]), torch.tensor([[[3.0], [7.0], [0.0]]])
    x, target = torch.tensor([1.5, -1.0, 2.0]), 1.5  # the first step is given, in normalised units
    for t in (1.0, 0.5):
        x = x - (x / 2 + x.mean() + t) / 2
        x[0] = target
    got = continue_chunks(
        policy, NO_PREFIX, x_1, planned, torch.tensor([2]), torch.tensor([1]), RTCConfig(), num_steps=2
    )
    assert got[0, 0, 0] == 3.0
    torch.testing.assert_close(got.flatten(), 2.0 * x)
    frozen = torch.zeros(1, 3, dtype=torch.bool)
    torch.testing.assert_close(trained_ode(policy, NO_PREFIX, x_1, x_1, frozen, 5), ode(policy, NO_PREFIX, x_1, 5))


def test_which_method() -> None:
    x_1, planned = torch.ones(1, 3, 1), torch.zeros(1, 3, 1)
    rows = (torch.tensor([3]), torch.tensor([1]))

    def chunk(delay: int, method: Any) -> Tensor:
        policy: Any = StepTimes(delay)
        return continue_chunks(policy, NO_PREFIX, x_1, planned, *rows, RTCConfig(method=method), num_steps=3)

    assert torch.equal(chunk(1, "auto"), chunk(1, "trained"))
    assert torch.equal(chunk(0, "auto"), chunk(1, "guided"))
    assert not torch.allclose(chunk(1, "guided"), chunk(1, "trained"))
    with pytest.raises(TypeError, match="max_prefix_delay"):
        chunk(0, "trained")
    with pytest.raises(ValueError, match="method"):
        RTCConfig(method="learned")  # type: ignore[arg-type]


def test_what_was_taught_is_continued() -> None:
    """Chunks go left or right, by a coin that no observation shows: what is given decides the rest."""
    torch.manual_seed(0)
    config = TinyVLAConfig(
        state_dim=2, action_dim=1, cameras=(), action_horizon=6, prefix_width=16, text_width=16, max_text_tokens=16,
        num_steps=8, expert=ActionExpertConfig(width=32, num_layers=1, num_heads=2),
    )  # fmt: skip
    policy = TinyVLA(config)
    trainer = SupervisedTrainer(policy, SFTConfig(num_updates=250, batch_size=64, ema_decay=0, max_prefix_delay=3))
    g = torch.Generator().manual_seed(0)
    obs = observation(64, size=8, cameras=(), state_dim=2)
    for _ in range(250):
        side = torch.randint(0, 2, (64, 1, 1), generator=g) * 2.0 - 1.0
        noise = 0.1 * torch.randn(64, 6, 1, generator=g)
        trainer.update(obs, side + noise, torch.ones(64, 6, dtype=torch.bool))
    policy.eval()
    with torch.no_grad():
        prefix = policy.encode(policy.preprocess(obs))
        x_1 = torch.randn(64, 6, 1, generator=g)
        planned = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)[:, None, None].expand(64, 6, 1)
        delays = torch.full((64,), 2)
        got = continue_chunks(policy, prefix, x_1, planned, torch.full((64,), 6), delays, RTCConfig(), num_steps=8)
        free = ode(policy, prefix, x_1, 8)
    follows = (got[:, 2:] * planned[:, 2:] > 0.4).float().mean()
    assert follows > 0.95, follows
    assert 0.25 < (free.mean(dim=1) > 0).float().mean() < 0.75  # without it, both sides
