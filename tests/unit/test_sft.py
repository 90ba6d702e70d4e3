"""Supervised fine-tuning: schedule and averages against formulas, resume bit for bit, stops, and divergence."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from vla_rl.core import CameraSpec, Observation
from vla_rl.data.chunks import ChunkDataset
from vla_rl.data.lerobot_format import DatasetSpec
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.data.lerobot_writer import LeRobotWriter
from vla_rl.policies.blocks.expert import ActionExpertConfig
from vla_rl.policies.checkpoints.native import load_policy
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.policies.gaussian import GaussianMLP, GaussianMLPConfig
from vla_rl.policies.tiny import TinyVLA, TinyVLAConfig
from vla_rl.protocols import PolicyInputs
from vla_rl.train.augmentation import AugmentationConfig, augment, random_light, random_shift
from vla_rl.train.divergence import DivergenceError
from vla_rl.train.ema import Ema
from vla_rl.train.interrupt import StopOnInterrupt
from vla_rl.train.metrics import read_metrics
from vla_rl.train.sft import DIVERGED_FILE, STATE_FILE, DatasetSampler, SFTConfig, SupervisedTrainer, run_sft

torch.set_num_threads(1)

TINY = TinyVLAConfig(
    state_dim=2,
    action_dim=2,
    cameras=("agent",),
    image_size=32,
    action_horizon=4,
    prefix_width=16,
    vision_channels=8,
    vision_blocks=1,
    tokens_per_camera=1,
    text_width=16,
    max_text_tokens=32,
    expert=ActionExpertConfig(width=16, num_layers=1, num_heads=2),
)


class Demonstrations:
    """The action is the state with its sign chosen by the sentence; a resumable sampler of random rows."""

    def __init__(self, batch_size=16, num=64, seed=0, nan_after=None):
        g = torch.Generator().manual_seed(seed)
        self.state = torch.rand(num, 2, generator=g) * 2 - 1
        sign = torch.randint(0, 2, (num,), generator=g)
        self.sentences = [("move along", "move against")[s] for s in sign.tolist()]
        self.actions = ((1 - 2 * sign)[:, None] * self.state)[:, None].expand(num, 4, 2).contiguous()
        self.images = torch.randint(0, 256, (num, 32, 32, 3), generator=g, dtype=torch.uint8)
        self.mask = torch.rand(num, 4, generator=g) > 0.2
        self.mask[:, 0] = True
        self.batch_size, self.nan_after, self.num_batches = batch_size, nan_after, 0
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self):
        rows = torch.randint(0, len(self.state), (self.batch_size,), generator=self.generator)
        obs = Observation(
            {"agent": self.images[rows]}, self.state[rows], tuple(self.sentences[i] for i in rows.tolist())
        )
        self.num_batches += 1
        actions = self.actions[rows]
        if self.nan_after is not None and self.num_batches > self.nan_after:
            actions = actions.clone()
            actions[3, 0, 1] = math.nan
            assert bool(self.mask[rows][3, 0])
        return obs, actions, self.mask[rows]

    def state_dict(self):
        return {"generator": self.generator.get_state(), "num_batches": self.num_batches}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.num_batches = state["num_batches"]


def tiny(seed=0):
    torch.manual_seed(seed)
    return TinyVLA(TINY)


CONFIG = SFTConfig(num_updates=12, batch_size=16, warmup_updates=3, log_interval=3, checkpoint_interval=4)


def same_parameters(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_learning_rate_schedule():
    config = SFTConfig(num_updates=110, warmup_updates=10, learning_rate=1.0, final_lr_fraction=0.1)
    assert config.learning_rate_at(0) == pytest.approx(0.1)
    assert config.learning_rate_at(9) == pytest.approx(1.0)
    assert config.learning_rate_at(10) == pytest.approx(1.0)
    assert config.learning_rate_at(60) == pytest.approx(0.55)
    assert config.learning_rate_at(110) == pytest.approx(0.1)


def test_ema_against_a_loop():
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    ema = Ema([parameter], decay=0.5)
    expected = torch.zeros(2, dtype=torch.float64)
    for n in range(20):
        parameter.data += 1.0
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * parameter.detach()
    torch.testing.assert_close(ema.average[0], expected)
    with ema.applied():
        assert torch.equal(parameter.detach(), ema.average[0])
    assert parameter.detach().tolist() == [20.0, 20.0]
    with pytest.raises(ValueError, match="ema decay"):
        Ema([parameter], 1.0)


@pytest.mark.parametrize(
    "make", [tiny, lambda: FlowMLP(FlowMLPConfig(2, 2)), lambda: GaussianMLP(GaussianMLPConfig(2, 2, 4))]
)
def test_every_policy_is_fitted_and_saved(tmp_path, make):
    torch.manual_seed(0)
    policy = make()
    config = dataclasses.replace(CONFIG, num_updates=60, learning_rate=5e-3, ema_decay=0.8)
    result = run_sft(policy, Demonstrations(), config, tmp_path, tensorboard=False)
    assert result.finished
    rows = read_metrics(tmp_path)
    assert [row["iteration"] for row in rows] == list(range(3, 61, 3))
    assert rows[-1]["sft/loss"] < 0.9 * rows[0]["sft/loss"]
    assert rows[-1]["sft/samples_per_s"] > 0
    assert same_parameters(policy, load_policy(result.policy_folder))


def test_a_chunk_is_learned_from_state_and_sentence(tmp_path):
    """Closed form: the action is +s or -s as the sentence says; the ODE's chunk must come close to it."""
    demonstrations = Demonstrations(batch_size=64, num=512)
    demonstrations.images[:] = 0
    policy = tiny()
    config = SFTConfig(num_updates=500, batch_size=64, learning_rate=5e-3, warmup_updates=20, ema_decay=0.95)
    run_sft(policy, demonstrations, config, tmp_path, tensorboard=False)
    state = torch.rand(64, 2, generator=torch.Generator().manual_seed(9)) * 2 - 1
    images = {"agent": torch.zeros(64, 32, 32, 3, dtype=torch.uint8)}
    noise = torch.randn(64, 4, 2, generator=torch.Generator().manual_seed(9))
    for sentence, sign in (("move along", 1.0), ("move against", -1.0)):
        actions = policy.act(Observation(images, state, (sentence,) * 64), noise).actions
        assert float((actions - sign * state[:, None]).abs().mean()) < 0.15


def test_resume_is_bit_equal_to_an_uninterrupted_run(tmp_path):
    config = dataclasses.replace(CONFIG, augmentation=AugmentationConfig(shift_pixels=2, brightness=0.2))
    whole = tiny()
    run_sft(whole, Demonstrations(), config, tmp_path / "whole", tensorboard=False)

    class Killed(Exception):
        pass

    class DyingDemonstrations(Demonstrations):
        def batch(self):
            if self.num_batches == 7:  # three updates after the checkpoint of update 4
                raise Killed
            return super().batch()

    with pytest.raises(Killed):
        run_sft(tiny(), DyingDemonstrations(), config, tmp_path / "cut", tensorboard=False)
    resumed = tiny(seed=5)  # what it starts with must not matter
    sampler = Demonstrations()
    result = run_sft(resumed, sampler, config, tmp_path / "cut", resume=True, tensorboard=False)
    assert result.finished
    assert sampler.num_batches == 12
    assert same_parameters(whole, resumed)
    for file in ("policy/policy.safetensors", "policy/config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
    a, b = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "cut")
    assert [row["iteration"] for row in a] == [row["iteration"] for row in b]
    assert a[-1]["sft/grad_norm"] == b[-1]["sft/grad_norm"]
    # once more: nothing is left to do, nothing changes
    assert run_sft(resumed, sampler, config, tmp_path / "cut", resume=True, tensorboard=False).num_updates == 12
    assert same_parameters(whole, resumed)


def test_resume_after_sigkill_is_bit_equal(tmp_path):
    """A real process, killed with SIGKILL in the middle; the test's own process goes on."""
    script = textwrap.dedent(
        f"""
        import importlib.util, os, signal, sys
        spec = importlib.util.spec_from_file_location("test_sft", {__file__!r})
        t = importlib.util.module_from_spec(spec); sys.modules["test_sft"] = t; spec.loader.exec_module(t)
        class Killing(t.Demonstrations):
            def batch(self):
                if self.num_batches == 10:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().batch()
        t.run_sft(t.tiny(), Killing(), t.CONFIG, {str(tmp_path / "cut")!r}, tensorboard=False)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    resumed, whole = tiny(3), tiny()
    run_sft(resumed, Demonstrations(), CONFIG, tmp_path / "cut", resume=True, tensorboard=False)
    run_sft(whole, Demonstrations(), CONFIG, tmp_path / "whole", tensorboard=False)
    assert same_parameters(whole, resumed)
    assert CONFIG.checkpoint_interval % CONFIG.log_interval  # a mean loss is resumed in the middle
    for ours, theirs in zip(*(read_metrics(tmp_path / name) for name in ("whole", "cut")), strict=True):
        assert ours["sft/loss"] == theirs["sft/loss"]


def test_interrupt_stops_after_an_update_and_resumes(tmp_path):
    class Interrupting(Demonstrations):
        def batch(self):
            if self.num_batches == 5:
                signal.raise_signal(signal.SIGINT)
            return super().batch()

    before = signal.getsignal(signal.SIGINT)
    policy = tiny()
    result = run_sft(policy, Interrupting(), CONFIG, tmp_path / "cut", tensorboard=False)
    assert not result.finished
    assert result.num_updates == 6
    assert signal.getsignal(signal.SIGINT) is before
    run_sft(policy, Demonstrations(), CONFIG, tmp_path / "cut", resume=True, tensorboard=False)
    whole = tiny()
    run_sft(whole, Demonstrations(), CONFIG, tmp_path / "whole", tensorboard=False)
    assert same_parameters(whole, policy)


def test_a_second_interrupt_raises_and_threads_are_left_alone():
    with StopOnInterrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    seen = []

    def work():
        with StopOnInterrupt() as other:
            seen.append(other.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_divergence_changes_nothing_and_dumps_the_batch(tmp_path):
    policy = tiny()
    trainer = SupervisedTrainer(policy, CONFIG)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    sampler = Demonstrations(nan_after=0)
    with pytest.raises(DivergenceError, match="supervised loss is not finite"):
        trainer.update(*sampler.batch())
    assert all(torch.equal(before[k], v) for k, v in policy.state_dict().items())
    assert trainer.num_updates == 0

    with pytest.raises(DivergenceError) as error:
        run_sft(policy, Demonstrations(nan_after=6), CONFIG, tmp_path, tensorboard=False)
    assert DIVERGED_FILE in error.value.__notes__[0]
    batch = load_file(tmp_path / DIVERGED_FILE)
    assert batch["actions"].shape == (16, 4, 2)
    assert bool(torch.isnan(batch["actions"][3, 0, 1]))
    assert batch["images.agent"].shape == (16, 3, 32, 32)
    with safe_open(tmp_path / DIVERGED_FILE, "pt") as file:
        details = json.loads(file.metadata()["details"])
    assert details["update"] == 6
    assert len(details["instruction"]) == 16
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    assert state["trainer"]["num_updates"] == 4  # the last good checkpoint is still there
    assert all(bool(torch.isfinite(p).all()) for p in load_policy(tmp_path / "policy").parameters())


def test_frozen_parts_stay(tmp_path):
    policy = tiny()
    policy.freeze_encoder()
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    run_sft(policy, Demonstrations(), CONFIG, tmp_path, tensorboard=False)
    changed = {k for k, v in policy.state_dict().items() if not torch.equal(before[k], v)}
    assert changed
    assert all(k.startswith("expert.") for k in changed)
    policy.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        SupervisedTrainer(policy, CONFIG)


def test_errors(tmp_path):
    run_sft(tiny(), Demonstrations(), CONFIG, tmp_path / "a", tensorboard=False)
    with pytest.raises(FileExistsError, match="resume it"):
        run_sft(tiny(), Demonstrations(), CONFIG, tmp_path / "a", tensorboard=False)
    other = dataclasses.replace(CONFIG, learning_rate=1e-4, log_interval=1)
    with pytest.raises(ValueError, match=r"learning_rate: 0.002 -> 0.0001\)"):
        run_sft(tiny(), Demonstrations(), other, tmp_path / "a", resume=True, tensorboard=False)
    (tmp_path / "a" / STATE_FILE).write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read"):
        run_sft(tiny(), Demonstrations(), CONFIG, tmp_path / "a", resume=True, tensorboard=False)
    with pytest.raises(ValueError, match=r"batches of 8, SFTConfig.batch_size is 16"):
        run_sft(tiny(), Demonstrations(batch_size=8), CONFIG, tmp_path / "b", tensorboard=False)
    with pytest.raises(TypeError, match="HasSupervisedLoss"):
        SupervisedTrainer(nn.Linear(2, 2), CONFIG)
    with pytest.raises(ValueError, match="for a GPU"):
        SupervisedTrainer(tiny(), dataclasses.replace(CONFIG, precision="bfloat16"))
    obs, actions, mask = Demonstrations().batch()
    with pytest.raises(ValueError, match="no unpadded step"):
        SupervisedTrainer(tiny(), CONFIG).update(obs, actions, mask & False)
    for bad in ({"num_updates": 0}, {"learning_rate": 0.0}, {"warmup_updates": 12}):
        with pytest.raises(ValueError, match="SFTConfig"):
            dataclasses.replace(CONFIG, **bad)


def test_a_dataset_on_disk_is_fitted(tmp_path):
    """From LeRobot episodes through chunks to a policy; the sampler goes on where its state was taken."""
    spec = DatasetSpec(20.0, ("x", "y"), ("dx", "dy"), {"agent": CameraSpec(32, 32)}, robot_type="test")
    writer = LeRobotWriter.open(tmp_path / "demos", spec)
    demonstrations = Demonstrations()
    for i in range(4):
        rows = slice(8 * i, 8 * i + 8)
        writer.add_episode(
            state=demonstrations.state[rows],
            action=demonstrations.actions[rows, 0],
            images={"agent": demonstrations.images[rows]},
            reward=torch.zeros(8),
            success=torch.zeros(8, dtype=torch.bool),
            instruction="move along",
        )
    writer.close()
    chunks = ChunkDataset(LeRobotDataset(tmp_path / "demos"), 4)
    sampler = DatasetSampler(chunks, 16, seed=0)
    result = run_sft(tiny(), sampler, CONFIG, tmp_path / "run", tensorboard=False)
    assert result.finished
    other = DatasetSampler(chunks, 16, seed=7)
    other.load_state_dict(sampler.state_dict())
    for a, b in zip(sampler.batch()[1:], other.batch()[1:], strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------ augmentation
def test_random_shift_moves_whole_pixels():
    g = torch.Generator().manual_seed(0)
    images = torch.zeros(64, 3, 16, 16, dtype=torch.uint8)
    images[:, 0, 8, 5] = 255
    shifted = random_shift(images, 2, g)
    assert shifted.dtype == torch.uint8
    places = (shifted[:, 0] == 255).nonzero()
    assert len(places) == 64
    offset = places[:, 1:] - torch.tensor([8, 5])
    assert sorted(offset[:, 0].unique().tolist()) == [-2, -1, 0, 1, 2]
    assert sorted(offset[:, 1].unique().tolist()) == [-2, -1, 0, 1, 2]
    edge = torch.full((1, 3, 8, 8), 9, dtype=torch.uint8)
    assert torch.equal(random_shift(edge, 4, g), edge)  # the border is repeated, nothing black comes in


def test_random_light_stays_in_its_range():
    g = torch.Generator().manual_seed(0)
    images = torch.full((512, 3, 2, 2), 100, dtype=torch.uint8)
    bright = random_light(images, 0.2, 0.0, g).float()
    assert 79 <= float(bright.min()) < 84
    assert 116 < float(bright.max()) <= 120
    assert torch.equal(random_light(images, 0.0, 0.0, g), images)
    contrast = random_light(images, 0.0, 0.5, g).float()
    assert 86 <= float(contrast.min()) < 90
    assert 110 < float(contrast.max()) <= 114


def test_augment_is_off_by_default_and_deterministic():
    inputs = PolicyInputs(
        {"agent": torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)}, torch.zeros(4, 1).long(), torch.zeros(4, 2)
    )
    g = torch.Generator().manual_seed(0)
    state = g.get_state()
    assert augment(inputs, AugmentationConfig(), g) is inputs
    assert torch.equal(g.get_state(), state)
    config = AugmentationConfig(shift_pixels=1, brightness=0.1, contrast=0.1)
    a = augment(inputs, config, torch.Generator().manual_seed(3))
    b = augment(inputs, config, torch.Generator().manual_seed(3))
    assert torch.equal(a.images["agent"], b.images["agent"])
    assert not torch.equal(a.images["agent"], inputs.images["agent"])
    with pytest.raises(ValueError, match="AugmentationConfig"):
        AugmentationConfig(brightness=1.0)


def test_state_dropout_blanks_whole_rows():
    inputs = PolicyInputs({}, torch.zeros(2000, 1).long(), torch.ones(2000, 2))
    state = augment(inputs, AugmentationConfig(state_dropout=0.3), torch.Generator().manual_seed(0)).state
    assert torch.equal(state[:, 0], state[:, 1])
    assert abs(float((state[:, 0] == 0).float().mean()) - 0.3) < 0.03
    with pytest.raises(ValueError, match="state_dropout"):
        AugmentationConfig(state_dropout=1.0)
