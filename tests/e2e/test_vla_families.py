"""PPO on every family of VLAs, on the tabletop with a picture: right ratios, finite updates, exact resumes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.tiny_families import FAMILIES, tiny_policy, tiny_sampler
from vla_rl.data.normalization import Normalizer
from vla_rl.envs.config import EnvConfig
from vla_rl.onpolicy import ActorConfig, PPOConfig
from vla_rl.policies.adaptation import AdaptationConfig, apply_adaptation
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints.native import WEIGHTS_FILE, load_policy
from vla_rl.train.checkpoint import load_state
from vla_rl.train.loop import POLICY_FOLDER, STATE_FILE, TrainConfig, run_training

HORIZON, EXECUTED, NUM_ENVS = 3, 2, 3
FLOAT32_ERROR = 1e-4  # of a ratio; measured: 1.4e-5 at most (the Laplace density of six numbers), 4e-6 elsewhere
ENV = EnvConfig(
    task="reach", cameras=("agent",), image_size=32, privileged_state=True, max_episode_steps=4, num_threads=1
)
PPO = PPOConfig(
    num_decisions=3,
    critic_warmup_iterations=0,
    actor=ActorConfig(learning_rate=1e-3, num_epochs=2, minibatch_size=5, target_kl=None),
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_env(num_envs):
    return ENV.make(num_envs, split="train", auto_reset=True, final_images=True)


def make_policy(name, spec, seed=0) -> Any:
    policy: Any = build_policy(tiny_policy(name, HORIZON, chunk_dim=5), spec, seed=seed)
    low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
    policy.set_normalization(Normalizer.identity(spec.state_dim), Normalizer.bounds(low, high, kind="min_max"))
    return policy


def train_config(name, **changes):
    start = TrainConfig(
        num_iterations=2, num_envs=NUM_ENVS, execution_horizon=EXECUTED, algorithm=PPO,
        sampler=tiny_sampler(name, EXECUTED),
    )  # fmt: skip
    return replace(start, **changes)


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]


def check_updates(rows: list[dict[str, float]], tolerance: float) -> None:
    """The first ratios of every update are one: what was drawn is what is scored. Then the policy moves."""
    assert len(rows) == 2
    for row in rows:
        assert row["update/ratio_error_first"] < tolerance
        assert row["update/ratio_error"] > 10 * row["update/ratio_error_first"]
        assert row["update/actor_steps"] == 4
        assert row["update/actor_grad_norm"] > 0.0
        assert row["rollout/episodes_finished"] > 0  # so successors of ended episodes are among the rows
        assert all(math.isfinite(value) for value in row.values())


def run_whole_and_resumed(name, config, tmp_path, adaptation=AdaptationConfig()) -> tuple[Any, list[dict[str, float]]]:
    """The policy as it began, and metrics of a whole run that one with an interruption has repeated bit for bit."""

    def begin(run_dir, num_iterations, seed, resume=False):
        env = make_env(NUM_ENVS)
        policy = make_policy(name, env.spec, seed)
        apply_adaptation(policy, adaptation)
        before = {k: v.clone() for k, v in policy.state_dict().items()}
        run = replace(config, num_iterations=num_iterations)
        run_training(policy, env, run, tmp_path / run_dir, resume=resume, tensorboard=False)
        env.close()
        return policy, before

    policy, before = begin("whole", 2, seed=0)
    begin("parts", 1, seed=0)
    first = load_policy(tmp_path / "parts" / POLICY_FOLDER).state_dict()
    begin("parts", 2, seed=5, resume=True)  # of the policy that is built here nothing may be left
    whole, parts = (load_state(tmp_path / folder / STATE_FILE)["learner"] for folder in ("whole", "parts"))
    for part in ("policy", "noise_head"):
        assert_equal(whole["actor"][part], parts["actor"][part])
    assert_equal(whole["actor"]["optimizer"]["state"], parts["actor"]["optimizer"]["state"])
    assert_equal(whole["critic"]["critic"], parts["critic"]["critic"])
    stored = [(tmp_path / folder / POLICY_FOLDER / WEIGHTS_FILE).read_bytes() for folder in ("whole", "parts")]
    assert stored[0] == stored[1]
    last = load_policy(tmp_path / "whole" / POLICY_FOLDER).state_dict()
    assert any(not torch.equal(last[k], first[k]) for k in last)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    moved = {k for k, v in policy.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k, v in policy.named_parameters() if v.requires_grad}  # all that learns, and nothing else
    return policy, metrics_of(tmp_path / "whole")


def assert_equal(ours: Any, theirs: Any) -> None:
    if ours is None or theirs is None:
        assert ours is theirs
    else:
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "whole"])
@pytest.mark.parametrize("name", FAMILIES)
def test_two_updates_and_a_resume(name, freeze, tmp_path):
    policy, rows = run_whole_and_resumed(name, train_config(name, freeze_encoder=freeze), tmp_path)
    check_updates(rows, FLOAT32_ERROR)
    assert policy.encoder_is_frozen == freeze
