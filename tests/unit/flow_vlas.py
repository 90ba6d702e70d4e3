"""What the tests of pi0 and SmolVLA share: observations, an environment, training, log-probabilities row by row."""

import torch

from vla_rl.core import ActionSpec, CameraSpec, EnvSpec, Observation
from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.flow.sampler import FlowSampler

ARM = EnvSpec(
    name="arm",
    cameras={"front": CameraSpec(48, 64)},
    state_names=("a", "b", "c"),
    action=ActionSpec((-1.0, -1.0), (1.0, 1.0), ("x", "y")),
    max_episode_steps=10,
    control_hz=10.0,
)


def scatter(module, std=0.1):
    """Numbers that no part starts with, so that a missing part shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn_like(parameter)
    return module.eval()


def observation(n, *, size, seed=0, cameras=("base", "wrist"), state_dim=6):
    g = torch.Generator().manual_seed(seed)
    images = {c: torch.randint(0, 256, (n, size, size, 3), generator=g, dtype=torch.uint8) for c in cameras}
    sentences = ("pick", "push it", "open")
    return Observation(images, torch.randn(n, state_dim, generator=g), tuple(sentences[i % 3] for i in range(n)))


def check_training(policy, obs):
    """Forty updates on actions that the state decides, [N, 5, 4]."""
    n, g = len(obs.state), torch.Generator().manual_seed(0)
    inputs, mask = policy.preprocess(obs), torch.ones(n, 5) > 0
    actions = policy.normalize_actions(torch.tanh(obs.state[:, None, :4]).expand(n, 5, 4))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(40):
        loss = policy.supervised_loss(inputs, actions, mask, g).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), losses


@torch.no_grad()
def check_ratios(policy, obs, keys_dtype):
    """What a batch sampled is scored row by row, from a prefix made again: ratios are one until the policy changes."""
    sampler = FlowSampler(policy, FlowSamplerConfig(num_steps=4))
    prefix = policy.encode(policy.preprocess(obs))
    assert prefix.pooled.dtype == torch.float32
    assert prefix.layers[0].keys.dtype == keys_dtype
    _, trace = sampler.sample(prefix, torch.Generator().manual_seed(0))
    assert (trace.values.shape, trace.values.dtype) == ((len(obs.state), 1), torch.float32)

    def error():
        scored = []
        for row in range(len(obs.state)):
            rows = torch.tensor([row])
            again = policy.encode(policy.preprocess(obs.select(rows)))
            scored.append((sampler.score(again, trace.select(rows)).values - trace.values[rows]).exp())
        return (torch.cat(scored) - 1).abs().max().item()

    assert error() < 1e-4, error()
    policy.action_out_proj.bias += 0.01
    assert error() > 1e-3


def check_no_branch_on_data(policy, obs):
    prefix = policy.encode(policy.preprocess(obs)).detach()
    compiled = torch.compile(policy.velocity, backend="eager", fullgraph=True)
    x_t, time = torch.randn(3, 5, 7), torch.tensor([0.9, 0.5, 0.1])
    assert torch.equal(compiled(prefix, x_t, time).velocity, policy.velocity(prefix, x_t, time).velocity)


def equal_layers(one, other):
    """Whether two prefixes hold the same keys and values, to the last bit."""
    pairs = zip(one.layers, other.layers, strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


__all__ = ["ARM", "check_no_branch_on_data", "check_ratios", "check_training", "equal_layers", "observation", "scatter"]
