"""Supervised fine-tuning by two learners, with whole or with divided layers, against one process."""

import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.unit.two_learners import start_two
from vla_rl.core import Observation
from vla_rl.flow.noise import ShareGenerator
from vla_rl.policies.adaptation import AdaptationConfig, LoRAConfig, apply_adaptation, plain_state_dict
from vla_rl.policies.blocks.expert import ActionExpertConfig
from vla_rl.policies.blocks.flow_matching import FlowMatchingConfig, flow_matching_loss
from vla_rl.policies.checkpoints.native import load_policy
from vla_rl.policies.pi0 import Pi0, Pi0Config
from vla_rl.policies.tiny import TinyVLA, TinyVLAConfig
from vla_rl.train.augmentation import AugmentationConfig
from vla_rl.train.distributed import (
    is_divided,
    join_learners,
    learner,
    leave_learners,
    num_learners,
    share_of_learner,
)
from vla_rl.train.divergence import DivergenceError
from vla_rl.train.metrics import read_metrics
from vla_rl.train.sft import DIVERGED_FILE, SFTConfig, run_sft
from vla_rl.train.sharding import shard_layers, whole_layers, whole_state

BATCH = 5  # of which learner 0 has two
CONFIG = SFTConfig(
    num_updates=3,
    batch_size=BATCH,
    learning_rate=1e-3,
    warmup_updates=1,
    ema_decay=0.5,
    grad_clip=0.5,
    augmentation=AugmentationConfig(shift_pixels=2, brightness=0.2, contrast=0.2, state_dropout=0.3),
    log_interval=1,
    checkpoint_interval=2,
)
LONGER = replace(CONFIG, num_updates=4)
EXACT = {"atol": 2e-5, "rtol": 1e-3}  # Adam makes steps of a gradient that is rounding alone


def tiny(seed=0):
    torch.manual_seed(seed)
    expert = ActionExpertConfig(width=16, num_layers=2, num_heads=2)
    return TinyVLA(TinyVLAConfig(3, 2, ("agent",), image_size=32, action_horizon=4, expert=expert))


def pi0(seed=0):
    """Adapters in the language model, a frozen vision tower, an expert that learns whole; layers computed again."""
    torch.manual_seed(seed)
    policy = Pi0(Pi0Config(3, 2, action_horizon=4, num_steps=2))
    apply_adaptation(policy, AdaptationConfig(("expert",), LoRAConfig(rank=3), gradient_checkpointing=True), seed=seed)
    return policy


class Demonstrations:
    """Random rows; this learner's share of each batch."""

    def __init__(self, stop_at=None, nan_row=None):
        self.count, self.stop_at, self.nan_row = 0, stop_at, nan_row

    def batch(self):
        g = torch.Generator().manual_seed(self.count)
        self.count += 1
        images = torch.randint(0, 256, (BATCH, 64, 64, 3), generator=g, dtype=torch.uint8)
        state, actions = torch.randn(BATCH, 3, generator=g), torch.randn(BATCH, 4, 2, generator=g)
        mask = torch.rand(BATCH, 4, generator=g) > 0.3
        mask[:, 0] = True
        if self.nan_row is not None:
            actions[self.nan_row, 0] = torch.nan
        if self.stop_at == self.count and learner() == 1:
            signal.raise_signal(signal.SIGINT)
        rows = share_of_learner(BATCH)
        sentences = ("push", "pick up the cube", "go", "stop", "wait")[rows]
        return Observation({"agent": images[rows]}, state[rows], sentences), actions[rows], mask[rows]

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


CASES = {"tiny": (tiny, False), "pi0": (pi0, False), "tiny, divided": (tiny, True), "pi0, divided": (pi0, True)}


def fit(case, folder, *, seed=0, **options):
    make, shard = CASES[case]
    policy = make(seed)
    sampler = options.pop("sampler", None) or Demonstrations()
    shard = shard and num_learners() > 1
    result = run_sft(policy, sampler, options.pop("config", CONFIG), folder, tensorboard=False, shard=shard, **options)
    return policy, result


def copied(folder, to):
    return shutil.copytree(folder, to / "copy")


# -------------------------------------------------------------------------------------------------------- two learners
def learn(folder):
    """One of two learners: each case in one go, and stopped by a Ctrl-C that learner 1 alone got, and gone on with."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    folder, left = Path(folder), {}
    assert join_learners()
    for case in CASES:
        policy, result = fit(case, folder / case / "whole", seed=learner())  # learner 0's start counts
        assert result.finished
        _, result = fit(case, folder / case / "parts", sampler=Demonstrations(stop_at=2))
        assert (result.num_updates, result.interrupted) == (2, learner() == 1)
        resumed, result = fit(case, folder / case / "parts", seed=5, resume=True)
        assert result.num_updates == 3
        fit(case, folder / case / "longer", config=LONGER, sampler=Demonstrations(stop_at=3))
        left[case] = {
            "policy": whole_state(plain_state_dict(policy)),
            "resumed": whole_state(plain_state_dict(resumed)),
            "divided": sum(is_divided(p) for p in policy.parameters()),
        }
    with pytest.raises(DivergenceError, match="supervised loss is not finite"):
        fit("tiny", folder / "diverged", sampler=Demonstrations(nan_row=4))
    left["alone"] = call_alone()
    torch.save(left, folder / f"{learner()}.pt")
    leave_learners()


def call_alone():
    """Chunks of a divided policy that learner 1 asks for once and learner 0 twice, and which parts are whole."""
    policy = pi0().eval()
    shard_layers(policy)
    obs, _, _ = Demonstrations().batch()
    noise = torch.zeros(len(obs), 4, 32)
    together = policy.act(obs, noise).actions
    at_rest = sum(is_divided(p) for p in policy.parameters())
    with whole_layers(policy):
        chunks = [policy.act(obs, noise).actions for _ in range(2 - learner())]
        inside = sum(is_divided(p) for p in policy.parameters())
    after = sum(is_divided(p) for p in policy.parameters())
    same = all(torch.equal(c, together) for c in chunks)
    return {"same": same, "at_rest": at_rest, "inside": inside, "after": after}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """What both learners end with, and the folder of their runs. They are started as torchrun does."""
    folder = tmp_path_factory.mktemp("learners")
    return start_two("tests.unit.test_train_sft_learners:learn", folder), folder


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("case", CASES)
def test_two_learners_fit_as_one(learned, tmp_path, case):
    """Shares of two and three rows, augmented, with the same noise a row; a gradient that is clipped; an average."""
    (first, second), folder = learned
    one, _ = fit(case, tmp_path / "one")
    state, start = plain_state_dict(one), plain_state_dict(CASES[case][0]())
    assert (first[case]["divided"] > 0) == ("divided" in case)
    saved = load_policy(folder / case / "whole" / "policy").state_dict()
    for key, value in state.items():
        ours = first[case]["policy"][key]
        torch.testing.assert_close(ours, value, **EXACT, msg=key)
        assert torch.equal(ours, second[case]["policy"][key]), key
        assert torch.equal(ours, saved[key]), key
    moved = {k for k in state if not torch.equal(state[k], start[k])}
    assert any("expert" in k for k in moved)
    assert not any(k.startswith("vision") for k in moved)  # pi0's
    ours, theirs = (read_metrics(f) for f in (folder / case / "whole", tmp_path / "one"))
    for name in ("sft/loss", "sft/grad_norm"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in theirs], rel=1e-4), name
    assert theirs[0]["sft/grad_norm"] > CONFIG.grad_clip
    assert not (folder / case / "whole" / "learners").exists()


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_stopped_goes_on_exactly(learned, tmp_path, case):
    """Bit for bit with two learners; and with one, whatever divided layers were saved as."""
    (first, second), folder = learned
    for one in (first, second):
        assert all(torch.equal(one[case]["policy"][k], v) for k, v in one[case]["resumed"].items())
    whole, parts = (read_metrics(folder / case / name) for name in ("whole", "parts"))
    for name in ("iteration", "sft/loss", "sft/grad_norm"):
        assert [row[name] for row in whole] == [row[name] for row in parts]
    longer = fit(case, tmp_path / "one", config=LONGER)[0]
    alone = fit(case, copied(folder / case / "longer", tmp_path), seed=5, config=LONGER, resume=True)[0]
    for ours, theirs in zip(plain_state_dict(alone).values(), plain_state_dict(longer).values(), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_a_loss_that_is_not_finite_stops_both(learned):
    _, folder = learned
    assert (folder / "diverged" / DIVERGED_FILE).exists()
    rows = safetensors.torch.load_file(folder / "diverged" / "learners" / "1" / DIVERGED_FILE)["actions"]
    assert len(rows) == 3
    assert bool(rows[2, 0].isnan().all())


def test_divided_layers_are_whole_while_one_learner_calls_them(learned):
    for one in (both["alone"] for both in learned[0]):
        assert one["same"]
        assert one["inside"] == 0
        assert one["at_rest"] == one["after"] > 50


def test_shares_and_draws():
    generator = ShareGenerator()
    generator.num_rows, generator.rows = 5, slice(2, 5)
    config, actions, mask = FlowMatchingConfig(num_draws=3), torch.randn(5, 4, 2), torch.ones(5, 4, dtype=torch.bool)
    seen = []

    def velocity(x_t, flow_time):
        seen.append((x_t.unflatten(0, (3, -1)), flow_time.unflatten(0, (3, -1))))
        return torch.zeros_like(x_t)

    flow_matching_loss(velocity, actions, mask, config, torch.Generator().manual_seed(3))
    flow_matching_loss(velocity, actions[2:], mask[2:], config, generator.manual_seed(3))
    for whole, mine in zip(*seen, strict=True):
        assert torch.equal(whole[:, 2:], mine)
    with pytest.raises(ValueError, match="a draw for 5 rows"):
        flow_matching_loss(velocity, actions, mask, config, generator)
