"""TinyVLA and the Gaussian policy: protocols, shapes, determinism, masks, freezing, and that they learn."""

import dataclasses

import pytest
import torch

from vla_rl.core import Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.policies.blocks.expert import ActionExpertConfig
from vla_rl.policies.blocks.flow_matching import FlowMatchingConfig
from vla_rl.policies.gaussian import GaussianMLP, GaussianMLPConfig
from vla_rl.policies.tiny import TinyVLA, TinyVLAConfig, resize_images
from vla_rl.protocols import FlowPolicy, GaussianPolicy, HasFeatures, HasSupervisedLoss, Prefix, require

torch.set_num_threads(1)

SMALL = TinyVLAConfig(
    state_dim=3,
    action_dim=2,
    cameras=("agent", "wrist"),
    image_size=32,
    action_horizon=4,
    prefix_width=16,
    vision_channels=8,
    vision_blocks=1,
    tokens_per_camera=2,
    text_width=16,
    max_text_tokens=48,
    expert=ActionExpertConfig(width=32, num_layers=1, num_heads=2),
)


def observation(n=3, size=32, seed=0, cameras=("agent", "wrist"), sentences=("reach the red block", "push")):
    g = torch.Generator().manual_seed(seed)
    images = {c: torch.randint(0, 256, (n, size, size, 3), generator=g, dtype=torch.uint8) for c in cameras}
    return Observation(images, torch.randn(n, 3, generator=g), tuple(sentences[i % len(sentences)] for i in range(n)))


def make(config=SMALL, seed=0):
    torch.manual_seed(seed)
    policy = TinyVLA(config)
    # the last layer starts at zero; a velocity that depends on everything makes the tests below mean something
    torch.nn.init.normal_(policy.expert.action_out.weight, std=0.5)
    for module in policy.expert.modules():
        if hasattr(module, "dense"):
            torch.nn.init.normal_(module.dense.weight, std=0.1)
    return policy


def test_protocols_and_size():
    policy = TinyVLA(TinyVLAConfig(state_dim=9, action_dim=7, cameras=("agent", "wrist")))
    require(policy, FlowPolicy, HasFeatures, HasSupervisedLoss, by="test")
    assert sum(p.numel() for p in policy.parameters()) < 1_000_000
    gaussian = GaussianMLP(GaussianMLPConfig(3, 2))
    require(gaussian, GaussianPolicy, HasFeatures, HasSupervisedLoss, by="test")
    assert not isinstance(gaussian, FlowPolicy)


def test_shapes():
    policy, obs = make(), observation()
    inputs = policy.preprocess(obs)
    assert inputs.images["wrist"].shape == (3, 3, 32, 32)
    assert inputs.images["wrist"].dtype == torch.uint8
    prefix = policy.encode(inputs)
    assert prefix.tokens.shape == (3, 2 * 2 + 2 + 1, 16)
    assert bool(prefix.mask.all())
    assert prefix.pooled.shape == (3, policy.feature_dim)
    out = policy.velocity(prefix, torch.randn(3, 4, 2), torch.rand(3))
    assert out.velocity.shape == (3, 4, 2)
    assert out.hidden.shape == (3, 4, policy.hidden_dim)
    assert out.velocity.dtype == out.hidden.dtype == torch.float32
    assert policy.act(obs, torch.randn(3, 4, 2)).actions.shape == (3, 4, 2)


def test_every_input_reaches_the_velocity():
    """Each of camera, sentence, state, noisy chunk, flow time and each token of the prefix changes the velocity."""
    policy, obs = make(), observation()
    x, t = torch.randn(3, 4, 2), torch.full((3,), 0.5)

    def velocity(obs, x=x, t=t):
        with torch.no_grad():
            return policy.velocity(policy.encode(policy.preprocess(obs)), x, t).velocity

    base = velocity(obs)
    changed = [
        velocity(obs, x=x + 1),
        velocity(obs, t=t + 0.1),
        velocity(dataclasses.replace(obs, state=obs.state + 1)),
    ]
    changed.append(velocity(dataclasses.replace(obs, instruction=("go to the blue block",) * 3)))
    changed += [
        velocity(dataclasses.replace(obs, images=obs.images | {camera: 255 - image}))  # pyright: ignore[reportOperatorIssue]
        for camera, image in obs.images.items()
    ]
    for other in changed:
        assert float((other - base).abs().amax(dim=(1, 2)).min()) > 1e-4


def test_an_untrained_expert_is_exact_for_standard_normal_actions():
    """The preconditioning: before training, velocity = E[noise - action | x_t] for actions N(0, 1), by sampling."""
    torch.manual_seed(0)
    policy = TinyVLA(SMALL)
    prefix = policy.encode(policy.preprocess(observation(n=1))).detach()
    for t in (0.1, 0.5, 0.8, 1.0):
        action, noise = torch.randn(2, 400_000, dtype=torch.float64)
        x = t * noise + (1 - t) * action
        slope = float(
            (x * (noise - action)).mean() / (x * x).mean()
        )  # both are normal, so the conditional mean is linear
        x_t = torch.randn(1, 4, 2)
        velocity = policy.velocity(prefix, x_t, torch.tensor([t])).velocity.detach()
        torch.testing.assert_close(velocity, slope * x_t, atol=0.02, rtol=0)


def test_act_is_deterministic_and_row_by_row():
    """The same noise gives the same bits; a row does not depend on the others of its batch."""
    policy, obs = make(), observation(n=5)
    noise = torch.randn(5, 4, 2)
    actions = policy.act(obs, noise).actions
    assert torch.equal(actions, policy.act(obs, noise).actions)
    assert not torch.equal(actions, policy.act(obs, torch.randn(5, 4, 2)).actions)
    rows = torch.tensor([3, 1])
    torch.testing.assert_close(actions[rows], policy.act(obs.select(rows), noise[rows]).actions, atol=1e-5, rtol=1e-5)


def test_act_does_not_depend_on_the_sentences_beside_a_row():
    """In a batch of the same size, to the last bit: one sentence in flight or many."""
    policy, obs = make(), observation(n=8)
    noise = torch.randn(8, 4, 2)
    many = Observation(obs.images, obs.state, tuple(f"touch the {'so ' * i}red block" for i in range(8)))
    one = Observation(obs.images, obs.state, (many.instruction[0],) * 8)
    assert torch.equal(policy.act(many, noise).actions[0], policy.act(one, noise).actions[0])


def test_act_is_the_euler_integral_in_normalised_space():
    policy, obs = make(), observation()
    policy.set_normalization(
        Normalizer.identity(3), Normalizer("quantiles", torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0]))
    )
    noise = torch.randn(3, 4, 2)
    with torch.no_grad():
        prefix = policy.encode(policy.preprocess(obs))
        x = noise
        for t in (1.0, 0.75, 0.5, 0.25):
            x = x - 0.25 * policy.velocity(prefix, x, torch.full((3,), t)).velocity
    expected = x * torch.tensor([0.5, 4.0]) + torch.tensor([1.0, -2.0])
    torch.testing.assert_close(policy.act(obs, noise).actions, expected)
    torch.testing.assert_close(policy.unnormalize_actions(policy.normalize_actions(x)), x)


def test_masked_prefix_tokens_do_not_matter():
    policy = make()
    prefix = policy.encode(policy.preprocess(observation())).detach()
    mask = prefix.mask.clone()
    mask[:, :3] = False
    garbage = prefix.tokens.clone()
    garbage[:, :3] = 100.0
    x, t = torch.randn(3, 4, 2), torch.rand(3)
    a = policy.velocity(Prefix(prefix.tokens, mask, prefix.pooled), x, t).velocity
    b = policy.velocity(Prefix(garbage, mask, prefix.pooled), x, t).velocity
    torch.testing.assert_close(a, b)
    full = policy.velocity(prefix, x, t).velocity
    assert float((a - full).detach().abs().max()) > 1e-5


def gradient(policy, actions, mask, inputs):
    policy.zero_grad()
    policy.supervised_loss(inputs, actions, mask, torch.Generator().manual_seed(7)).mean().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["tiny", "gaussian_nll", "gaussian_mse"])
def test_padded_actions_do_not_reach_the_gradient(kind):
    if kind == "tiny":
        policy = make()
    else:
        policy = GaussianMLP(GaussianMLPConfig(3, 2, action_horizon=4, supervised_loss=kind[-3:]))
    inputs = policy.preprocess(observation())
    actions = torch.randn(3, 4, 2)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    garbage = torch.where(mask[..., None], actions, 1e3)
    assert torch.equal(gradient(policy, actions, mask, inputs), gradient(policy, garbage, mask, inputs))
    real = actions.clone()
    real[2, 0] += 0.1
    assert not torch.equal(gradient(policy, actions, mask, inputs), gradient(policy, real, mask, inputs))


def test_a_frozen_encoder_keeps_its_features_and_gets_no_gradient():
    policy, obs = make(), observation()
    assert not policy.encoder_is_frozen
    policy.freeze_encoder()
    assert policy.encoder_is_frozen
    inputs = policy.preprocess(obs)
    before = policy.encode(inputs)
    assert not before.tokens.requires_grad
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    velocity = policy.velocity(before, torch.ones(3, 4, 2), torch.ones(3)).velocity.detach()
    policy.train()
    for _ in range(3):
        loss = policy.supervised_loss(
            inputs, torch.randn(3, 4, 2), torch.ones(3, 4, dtype=torch.bool), torch.Generator()
        )
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert all(p.grad is None for p in policy.encoder.parameters())
    after = policy.encode(inputs)
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.pooled, after.pooled)
    changed = policy.velocity(after, torch.ones(3, 4, 2), torch.ones(3)).velocity.detach()
    assert not torch.allclose(velocity, changed)


def test_every_parameter_is_trained():
    """A parameter without gradient would be dead weight, or an optimiser that silently skips it."""
    policy = make()
    inputs = policy.preprocess(observation(n=6))
    gradient(policy, torch.randn(6, 4, 2), torch.ones(6, 4, dtype=torch.bool), inputs)
    dead = [n for n, p in policy.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert dead == []


def test_preprocess_errors_say_what_is_wrong():
    policy = make()
    with pytest.raises(ValueError, match=r"render \['wrist'\]"):
        policy.preprocess(observation(cameras=("agent",)))
    with pytest.raises(ValueError, match=r"state \[N, 3\]"):
        policy.preprocess(dataclasses.replace(observation(), state=torch.zeros(3, 5)))
    with pytest.raises(ValueError, match="max_text_tokens"):
        policy.preprocess(observation(sentences=("a" * 60,)))
    with pytest.raises(ValueError, match="dimensions"):
        policy.set_normalization(Normalizer.identity(4), Normalizer.identity(2))
    with pytest.raises(ValueError, match="twice"):
        dataclasses.replace(SMALL, cameras=("agent", "agent"))


def test_resize_keeps_colours_and_places():
    image = torch.zeros(1, 128, 128, 3, dtype=torch.uint8)
    image[0, 32:64, 64:128] = torch.tensor([200, 100, 50], dtype=torch.uint8)
    small = resize_images(image, 64)
    assert small.shape == (1, 3, 64, 64)
    assert small[0, :, 24, 48].tolist() == [200, 100, 50]
    assert small[0, :, 5, 5].tolist() == [0, 0, 0]
    assert torch.equal(resize_images(image, 128), image.permute(0, 3, 1, 2))


# ---------------------------------------------------------------------------------------------------------- learning
def coloured_squares(n, seed):
    """One red and one blue square of 6 px on grey; the sentence names one; the action is the way to it, in [-1, 1]."""
    g = torch.Generator().manual_seed(seed)
    images = torch.full((n, 32, 32, 3), 110, dtype=torch.uint8)
    corner = torch.randint(0, 26, (n, 2, 2), generator=g)
    corner[:, 0, 0] = torch.randint(0, 10, (n,), generator=g)  # red in the upper part, blue in the lower: no overlap
    corner[:, 1, 0] = torch.randint(16, 26, (n,), generator=g)
    named = torch.randint(0, 2, (n,), generator=g)
    for i in range(n):
        for k, colour in enumerate(((200, 40, 40), (40, 60, 200))):
            y, x = corner[i, k].tolist()
            images[i, y : y + 6, x : x + 6] = torch.tensor(colour, dtype=torch.uint8)
    centre = (corner + 3.0) / 16.0 - 1.0
    target = centre[torch.arange(n), named].flip(1)
    sentences = tuple(("reach the red block", "reach the blue block")[k] for k in named.tolist())
    obs = Observation({"agent": images}, torch.randn(n, 3, generator=g), sentences)
    return obs, target[:, None, :].expand(n, 4, 2).contiguous(), centre.flip(2)


def test_it_learns_where_the_named_block_is():
    """Two sentences on the same picture lead to two places, each the right one, on pictures that it never saw."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        SMALL, cameras=("agent",), vision_channels=16, vision_blocks=2, flow_matching=FlowMatchingConfig(num_draws=8)
    )
    policy = TinyVLA(config)
    obs, actions, _ = coloured_squares(512, seed=0)
    inputs = policy.preprocess(obs)
    g = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, fused=True)
    mask = torch.ones(64, 4, dtype=torch.bool)
    losses = []
    num_updates = 400
    for update in range(num_updates):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (update + 1) / 20, 2.0 * (num_updates - update) / num_updates)
        rows = torch.randint(0, 512, (64,), generator=g)
        loss = policy.supervised_loss(inputs.select(rows), actions[rows], mask, g).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-20:]) / 20 < 0.1 * sum(losses[:10]) / 10
    held_out, _, centre = coloured_squares(128, seed=1)
    noise = torch.randn(128, 4, 2, generator=g)
    errors, crossed = [], []
    for k, colour in enumerate(("red", "blue")):
        asked = dataclasses.replace(held_out, instruction=(f"reach the {colour} block",) * 128)
        reached = policy.act(asked, noise).actions.mean(dim=1)
        errors.append((reached - centre[:, k]).norm(dim=1))
        crossed.append((reached - centre[:, 1 - k]).norm(dim=1))
    # a block is 0.375 wide in these units: the median error is well inside it, the other block far away
    assert float(torch.cat(errors).median()) < 0.12
    assert float((torch.cat(errors) < torch.cat(crossed)).float().mean()) > 0.95


# ---------------------------------------------------------------------------------------------------------- Gaussian
def test_gaussian_distribution_and_act():
    config = GaussianMLPConfig(3, 2, action_horizon=4, initial_std=0.2)
    policy = GaussianMLP(config)
    policy.set_normalization(
        Normalizer.identity(3), Normalizer("mean_std", torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.5]))
    )
    obs = observation()
    mean, std = policy.distribution(policy.encode(policy.preprocess(obs)))
    torch.testing.assert_close(std, torch.full((3, 4, 2), 0.2))
    noise = torch.randn(3, 4, 2)
    expected = (mean + 0.2 * noise) * torch.tensor([2.0, 0.5]) + torch.tensor([1.0, 2.0])
    torch.testing.assert_close(policy.act(obs, noise).actions, expected.detach())
    with torch.no_grad():
        policy.std_logit.fill_(1e3)
    assert (
        float(policy.distribution(policy.encode(policy.preprocess(obs)))[1].detach().max()) <= config.std_max * 1.0001
    )


def test_gaussian_nll_is_the_density():
    policy = GaussianMLP(GaussianMLPConfig(3, 2, action_horizon=4))
    inputs = policy.preprocess(observation())
    actions = torch.randn(3, 4, 2)
    mask = torch.tensor([[True] * 4, [True, False, False, False], [True, True, False, False]])
    loss = policy.supervised_loss(inputs, actions, mask, torch.Generator())
    mean, std = policy.distribution(policy.encode(inputs))
    log_prob = torch.distributions.Normal(mean, std).log_prob(actions).mean(dim=2)
    expected = torch.stack([-log_prob[i][mask[i]].mean() for i in range(3)])
    torch.testing.assert_close(loss, expected)


def test_gaussian_fits_mean_and_deviation():
    """Demonstrations a = (s_0, -s_1) + 0.1 noise: the mean follows, and the likelihood finds the deviation."""
    torch.manual_seed(0)
    policy = GaussianMLP(GaussianMLPConfig(3, 2, action_horizon=1, hidden_widths=(32,)))
    g = torch.Generator().manual_seed(0)
    state = torch.randn(1024, 3, generator=g)
    actions = (state[:, :2] * torch.tensor([1.0, -1.0]))[:, None] + 0.1 * torch.randn(1024, 1, 2, generator=g)
    inputs = policy.preprocess(Observation({}, state, ("",) * 1024))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(500):
        optimizer.zero_grad()
        policy.supervised_loss(inputs, actions, torch.ones(1024, 1, dtype=torch.bool), g).mean().backward()
        optimizer.step()
    mean, std = policy.distribution(policy.encode(inputs))
    assert float((mean[:, 0] - state[:, :2] * torch.tensor([1.0, -1.0])).detach().abs().mean()) < 0.06
    assert float(std.detach().min()) > 0.08
    assert float(std.detach().max()) < 0.12


def test_gaussian_config_errors():
    with pytest.raises(ValueError, match="std_min"):
        GaussianMLPConfig(3, 2, initial_std=2.0)
    with pytest.raises(ValueError, match="supervised_loss"):
        GaussianMLPConfig(3, 2, supervised_loss="mae")
    with pytest.raises(ValueError, match="state"):
        GaussianMLP(GaussianMLPConfig(4, 2)).preprocess(observation())
