"""OpenVLA: action tokens against tables, the model against transformers' Llama behind plain towers, cached
decoding against one pass, training."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit import openvla_public as public
from vla_rl.core import ActionSpec, CameraSpec, EnvSpec, Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.policies.blocks.action_tokens import actions_of_bins, bins_of_actions, pick_bins
from vla_rl.policies.blocks.gripper import GripperConfig
from vla_rl.policies.blocks.images import center_crop, resize_with_padding
from vla_rl.policies.blocks.prismatic import (
    Prismatic,
    PrismaticConfig,
    PrismaticInputsConfig,
    prismatic_7b,
)
from vla_rl.policies.blocks.vla_inputs import PromptConfig
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints.native import load_policy, save_policy
from vla_rl.policies.checkpoints.openvla import read_openvla
from vla_rl.policies.checkpoints.openvla_tensors import public_tensors
from vla_rl.policies.openvla import OpenVLA, OpenVLAConfig, openvla_7b_size
from vla_rl.protocols import HasSupervisedLoss, HasVisionTokens, LearnsFromPrefix, TokenPolicy, require

torch.set_num_threads(1)

SENTENCES = ("Open the drawer", "stack", "pick up the red block and put it down")


def spec(actions=4, cameras=("agent",)):
    names = tuple(f"a{i}" for i in range(actions))
    return EnvSpec(
        name="table",
        cameras={c: CameraSpec(40, 48) for c in cameras},
        state_names=("x", "y", "z"),
        action=ActionSpec((-1.0,) * actions, (1.0,) * actions, names),
        max_episode_steps=50,
        control_hz=20.0,
    )


def observation(n=3, size=28, cameras=("agent",), seed=3):
    generator = torch.Generator().manual_seed(seed)
    images = {c: torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator) for c in cameras}
    return Observation(images, torch.randn(n, 3, generator=generator), (SENTENCES * n)[:n])


def sampler(generator):
    return lambda logits, _: torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# --------------------------------------------------------------------------------------------------------------- tokens
def test_bins_and_ids_are_those_of_the_public_table():
    with torch.device("meta"):
        vlm = Prismatic(prismatic_7b())
    # action, np.digitize, id = 32000 - that, centre after decoding
    table = [
        (-1.0, 1, 31999, -254 / 255),
        (-3.0, 1, 31999, -254 / 255),
        (-0.9, 13, 31987, -230 / 255),
        (0.0, 128, 31872, 0.0),
        (0.5, 192, 31808, 128 / 255),
        (0.9999, 255, 31745, 254 / 255),
        (1.0, 256, 31744, 254 / 255),  # shares the centre of the interval below it
        (7.0, 256, 31744, 254 / 255),
    ]
    actions = torch.tensor([row[0] for row in table])
    bins = bins_of_actions(actions)
    assert (bins + 1).tolist() == [row[1] for row in table]
    assert vlm.action_ids(bins).tolist() == [row[2] for row in table]
    torch.testing.assert_close(actions_of_bins(bins), torch.tensor([row[3] for row in table]), rtol=0, atol=1e-7)


def test_bins_are_numpys_digitize_and_err_by_half_an_interval():
    actions = torch.linspace(-1.2, 1.2, 5001)
    edges = np.linspace(-1, 1, 256)
    expected = np.digitize(np.clip(actions.double().numpy(), -1, 1), edges)
    bins = bins_of_actions(actions)
    assert (bins + 1).tolist() == expected.tolist()
    assert (actions_of_bins(bins) - actions.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


def test_a_bin_is_drawn_at_the_quantile_of_the_noise():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    n = 10_000
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = pick_bins(logits.expand(n, 4), torch.special.ndtri(levels), temperature=2.0)
    shares = torch.bincount(drawn, minlength=4) / n
    torch.testing.assert_close(shares, (logits / 2.0).softmax(-1), rtol=0, atol=2 / n)
    assert pick_bins(logits[None], torch.tensor([9.0]), temperature=0.0).item() == 2
    assert pick_bins(logits[None], torch.tensor([40.0]), temperature=1.0).item() == 3  # Phi(40) rounds to 1


# -------------------------------------------------------------------------------------------------- inputs and outputs
@pytest.mark.parametrize(("kind", "model"), [("open_is_one", [0.0, 0.5, 1.0]), ("closed_is_one", [1.0, 0.5, 0.0])])
def test_gripper_conventions(kind, model):
    env = torch.tensor([[9.0, -1.0, 0.0], [9.0, 0.0, 0.0], [9.0, 1.0, 0.0]])
    gripper = GripperConfig(kind)
    chunk = gripper.to_model(env, 1)
    assert chunk[:, 1].tolist() == model
    assert torch.equal(gripper.to_environment(chunk, 1), env)
    binary = GripperConfig(kind, binary=True)
    sign = 1.0 if kind == "open_is_one" else -1.0
    assert binary.to_environment(torch.tensor([[0.0, 0.7], [0.0, 0.2]]), 1)[:, 1].tolist() == [sign, -sign]
    with pytest.raises(ValueError, match="binary has no effect"):
        GripperConfig(binary=True)


def test_liberos_gripper_is_scaled_signed_and_turned():
    config = OpenVLAConfig(3, 4, inputs=PrismaticInputsConfig(gripper=GripperConfig("closed_is_one", binary=True)))
    policy = OpenVLA(config)
    policy.set_normalization(
        Normalizer.identity(3), Normalizer("quantiles", torch.ones(4), torch.ones(4) * 2).keep([3])
    )
    chunk = torch.tensor([[[0.5, 0.0, -0.5, 0.8, 0.0, 0.0, 0.0]]])
    env = policy.unnormalize_actions(chunk)
    assert env.tolist() == [[[2.0, 1.0, 0.0, -1.0]]]
    assert policy.normalize_actions(env).tolist() == [[[0.5, 0.0, -0.5, 1.0, 0.0, 0.0, 0.0]]]


def test_center_crop_is_bilinear_from_corner_to_corner():
    image = torch.randint(0, 256, (1, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    side = 0.9**0.5
    at = [8 * ((1 - side) / 2 + side * i / 8) for i in range(9)]
    expected = torch.zeros(3, 9, 9)
    for i, y in enumerate(at):
        for j, x in enumerate(at):
            top, left = min(int(y), 7), min(int(x), 7)
            box = image[0, :, top : top + 2, left : left + 2].double()
            rows = torch.tensor([1 - (y - top), y - top]).double()
            columns = torch.tensor([1 - (x - left), x - left]).double()
            expected[:, i, j] = torch.floor((rows @ box @ columns) * 255.5 / 255)
    difference = (center_crop(image, 0.9)[0].float() - expected).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.02
    assert torch.equal(center_crop(image, 1.0), image)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (480, 640), (40, 64)])
def test_lanczos_resizing_is_that_of_pillow(height, width):
    """In a picture without extremes: Pillow clips what overshoots after each of its two passes."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(70, 186, (1, height // 4, width // 4, 3), dtype=torch.uint8, generator=generator)
    image = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    ours = resize_with_padding(image, 56, "stretch_lanczos")[0].permute(1, 2, 0).int()
    pillow = Image.fromarray(image[0].numpy()).resize((56, 56), Image.Resampling.LANCZOS)
    difference = (ours - torch.from_numpy(np.asarray(pillow).astype(np.int32))).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.3


def test_configs_that_cannot_work_say_why():
    with pytest.raises(ValueError, match="9 action dimensions, the model at most 7"):
        OpenVLA(OpenVLAConfig(3, 9))
    with pytest.raises(ValueError, match="FiLM belongs to OpenVLA-OFT"):
        OpenVLAConfig(vlm=PrismaticConfig().with_film())
    with pytest.raises(ValueError, match="first token"):
        PrismaticInputsConfig(prompt=PromptConfig("question"))
    small = dataclasses.replace(PrismaticConfig().decoder, vocab_size=400)
    with pytest.raises(ValueError, match=r"has 80 ids before those of actions, bytes need 259"):
        OpenVLA(OpenVLAConfig(3, 4, vlm=PrismaticConfig(decoder=small)))
    tower = dataclasses.replace(PrismaticConfig().siglip, image_size=70)
    with pytest.raises(ValueError, match="fused patch by patch"):
        PrismaticConfig(siglip=tower)


# --------------------------------------------------------------------------------------------------------------- parity
@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    torch.manual_seed(0)
    folder, tensors = tmp_path_factory.mktemp("openvla"), public.model_tensors()
    public.write_folder(folder, tensors)
    return folder, tensors, read_openvla(folder)


@torch.no_grad()
def test_logits_and_actions_are_those_of_the_public_model(pretrained):
    """Row by row without padding, greedily, and the whole sequence again for each token."""
    folder, tensors, policy = pretrained
    obs, llama = observation(), public.llama(tensors)
    prefix = policy.encode(policy.preprocess(obs))
    bins = policy.sample_tokens(prefix, lambda logits, _: logits.argmax(-1))
    logits = policy.token_logits(prefix, bins)
    words = llama.get_input_embeddings()
    for row in range(3):
        ids = public.prompt_ids(folder, obs.instruction[row])
        seen = public.image_tokens(tensors, obs.images["agent"][row : row + 1])
        for position in range(7):
            embedded = words(torch.tensor([ids]))
            x = torch.cat([embedded[:, :1], seen, embedded[:, 1:]], dim=1)
            scores = llama(inputs_embeds=x).logits[0, -1]
            actions = scores[public.FIRST_ACTION : public.FIRST_ACTION + 256].flip(0)
            torch.testing.assert_close(logits[row, position], actions, rtol=0, atol=1e-5)
            ids.append(public.FIRST_ACTION + 255 - int(actions.argmax()))
        assert bins[row].tolist() == [public.FIRST_ACTION + 255 - i for i in ids[-7:]]
    centers = actions_of_bins(bins)[:, None]
    assert torch.equal(policy.act(obs, torch.randn(3, 1, 7)).actions, policy.unnormalize_actions(centers))


# ------------------------------------------------------------------------------------------------------------- decoding
@torch.no_grad()
def test_one_pass_gives_the_logits_of_decoding_step_by_step():
    torch.manual_seed(0)
    policy = OpenVLA(OpenVLAConfig(3, 4, action_horizon=3, chunk_dim=4))
    require(policy, TokenPolicy, HasVisionTokens, HasSupervisedLoss, LearnsFromPrefix, by="the test")
    prefix = policy.encode(policy.preprocess(observation()))
    seen, generator = [], torch.Generator().manual_seed(0)

    def draw(logits, position):
        assert position == len(seen)
        seen.append(logits)
        return sampler(generator)(logits, position)

    bins = policy.sample_tokens(prefix, draw)
    assert bins.shape == (3, 12)
    assert bins.unique().numel() > 20
    torch.testing.assert_close(policy.token_logits(prefix, bins), torch.stack(seen, 1), rtol=0, atol=1e-5)
    other = bins.clone()
    other[:, 5] = (other[:, 5] + 100) % 256
    changed = (policy.token_logits(prefix, other) - policy.token_logits(prefix, bins)).abs().amax((0, 2)) > 1e-4
    assert changed.tolist() == [False] * 6 + [True] * 6  # a token changes what comes after it alone


def test_drawn_and_scored_log_probabilities_agree():
    from vla_rl.onpolicy.tokens import TokenSampler, TokenSamplerConfig

    policy = build_policy(OpenVLAConfig(), spec(), seed=0)
    tokens = TokenSampler(policy, TokenSamplerConfig(temperature=1.6, reduction="token"))
    prefix = policy.encode(policy.preprocess(observation()))
    _, trace = tokens.sample(prefix, torch.Generator().manual_seed(0))
    ratio = (tokens.score(prefix, trace).values - trace.values).exp()
    assert (ratio - 1).abs().max() < 1e-5


def test_with_temperature_noise_decides(pretrained):
    policy = OpenVLA(dataclasses.replace(pretrained[2].config, temperature=1.0)).eval()
    policy.load_state_dict(pretrained[2].state_dict())
    obs, noise = observation(), torch.randn(3, 1, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(policy.act(obs, noise).actions, policy.act(obs, noise).actions)
    assert not torch.equal(policy.act(obs, noise).actions, policy.act(obs, -noise).actions)


# ------------------------------------------------------------------------------------------------------------- training
def fit(policy, obs, actions, steps=60, lr=3e-3, prefix=None):
    inputs, mask = policy.preprocess(obs), torch.ones(actions.shape[:2], dtype=torch.bool)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(steps):
        loss = policy.supervised_loss(inputs, actions, mask, torch.Generator()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_supervised_loss_falls_and_the_fitted_policy_acts_so():
    policy = build_policy(OpenVLAConfig(), spec(cameras=("front", "wrist")), seed=0)
    assert policy.config.cameras == ("front", "wrist")
    obs = observation(cameras=("front", "wrist"))
    env_actions = torch.tensor([[[-0.8, 0.1, 0.5, 1.0]], [[0.3, 0.3, -0.7, -1.0]], [[0.9, -0.2, 0.0, 1.0]]])
    actions = policy.normalize_actions(env_actions)
    assert actions.shape == (3, 1, 7)
    assert actions[..., 4:].abs().max() == 0
    losses = fit(policy, obs, actions)
    assert all(p.grad is not None for p in policy.parameters())
    assert losses[0] > 4.0
    assert losses[-1] < 0.1
    assert (policy.act(obs, torch.zeros(3, 1, 7)).actions - env_actions).abs().max() < 0.005


def test_padded_steps_bear_no_loss():
    policy = OpenVLA(OpenVLAConfig(3, 4, action_horizon=2, chunk_dim=4))
    inputs, actions = policy.preprocess(observation()), torch.rand(3, 2, 4)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    with torch.no_grad():
        loss = policy.supervised_loss(inputs, actions, mask, torch.Generator())
        actions[1, 1] = -actions[1, 1]
        again = policy.supervised_loss(inputs, actions, mask, torch.Generator())
        actions[0, 1] = -actions[0, 1]
        changed = policy.supervised_loss(inputs, actions, mask, torch.Generator())
    assert torch.equal(loss, again)
    assert changed[0] != loss[0]


def test_a_frozen_encoder_gives_the_same_prefix_after_training():
    policy = build_policy(OpenVLAConfig(), spec(), seed=0)
    assert not policy.encoder_is_frozen
    assert not policy.vision_is_frozen
    policy.freeze_encoder()
    assert policy.encoder_is_frozen
    assert policy.vision_is_frozen
    inputs = policy.preprocess(observation())
    before = policy.encode(inputs)
    losses = fit(policy, observation(), torch.rand(3, 1, 7) * 2 - 1, steps=30)
    assert losses[-1] < 0.8 * losses[0]
    after = policy.encode(inputs)
    assert torch.equal(before.pooled, after.pooled)
    assert before.pooled.shape == (3, policy.feature_dim)
    for old, new in zip(before.layers, after.layers, strict=True):
        assert torch.equal(old.keys, new.keys)
        assert torch.equal(old.values, new.values)


@torch.no_grad()
def test_pictures_that_were_looked_at_once_give_the_same_prefix():
    policy = build_policy(OpenVLAConfig(), spec(), seed=0)
    inputs = policy.preprocess(observation())
    seen = policy.with_image_tokens(inputs)
    assert not seen.images
    assert seen.image_tokens.shape == (3, 16, 64)
    assert torch.equal(policy.encode(seen).layers[-1].values, policy.encode(inputs).layers[-1].values)


def test_round_trip_in_the_projects_own_layout(tmp_path):
    policy = build_policy(OpenVLAConfig(), spec(), seed=0)
    save_policy(policy, tmp_path, spec=spec())
    again = load_policy(tmp_path, spec=spec())
    assert again.config == policy.config
    assert all(torch.equal(a, again.state_dict()[k]) for k, a in policy.state_dict().items())


def test_size_of_the_published_model():
    """15,082,474,368 bytes of bfloat16, says the index of the published shards."""
    with torch.device("meta"):
        policy = OpenVLA(dataclasses.replace(openvla_7b_size(), state_dim=8, action_dim=7))
    vlm = policy.config.vlm
    assert sum(p.numel() for p in policy.parameters()) == 7_498_156_704
    published = public_tensors(policy.state_dict(), {"featurizer": vlm.dino, "fused_featurizer": vlm.siglip})
    assert sum(t.numel() for t in published.values()) * 2 == 15_082_474_368
