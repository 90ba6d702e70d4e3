"""PPO on every family of VLAs, on the tabletop with a picture: right ratios, finite updates, exact resumes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.tiny_families import FAMILIES, open_zeros, tiny_policy, tiny_sampler
from vla_rl.data.normalization import Normalizer
from vla_rl.envs.config import EnvConfig
from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.onpolicy import PPO, ActorConfig, PPOConfig
from vla_rl.onpolicy.build import build_sampler
from vla_rl.onpolicy.fpo import FPOConfig
from vla_rl.onpolicy.grpo import GRPOConfig
from vla_rl.policies.adaptation import AdaptationConfig, LoRAConfig, apply_adaptation, part_of, plain_state_dict
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints.native import WEIGHTS_FILE, load_policy
from vla_rl.rollout.collector import RolloutCollector
from vla_rl.train.checkpoint import load_state
from vla_rl.train.loop import POLICY_FOLDER, STATE_FILE, TrainConfig, Trainer, run_training

HORIZON, EXECUTED, NUM_ENVS = 3, 2, 3
FLOAT32_ERROR = (
    5e-5  # of a ratio; measured: 1.3e-5 at most, for the narrow Laplace density; 8e-6 for tokens, 4e-6 for flows
)
ENV = EnvConfig(
    task="reach", cameras=("agent",), image_size=32, privileged_state=True, max_episode_steps=4, num_threads=1
)
PPO_CONFIG = PPOConfig(
    num_decisions=3,
    critic_warmup_iterations=0,
    actor=ActorConfig(learning_rate=1e-4, num_epochs=2, minibatch_size=5, target_kl=None, reference_kl_coef=0.02),
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_env(num_envs):
    return ENV.make(num_envs, split="train", auto_reset=True, final_images=True)


def make_policy(name, spec, seed=0) -> Any:
    policy: Any = build_policy(tiny_policy(name, HORIZON, chunk_dim=5), spec, seed=seed)
    open_zeros(policy)
    low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
    policy.set_normalization(Normalizer.identity(spec.state_dim), Normalizer.bounds(low, high, kind="min_max"))
    return policy


def train_config(name, **changes):
    start = TrainConfig(
        num_iterations=2, num_envs=NUM_ENVS, execution_horizon=EXECUTED, algorithm=PPO_CONFIG,
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
        assert row["update/ratio_error"] > 1e-3
        assert row["update/actor_steps"] == 4
        assert row["update/actor_grad_norm"] > 0.0
        assert row["rollout/episodes_finished"] > 0  # so successors of ended episodes are among the rows
        assert all(math.isfinite(value) for value in row.values())


@pytest.mark.parametrize("name", ["pi0", "hf_flow"])
def test_a_vision_tower_gets_batches_of_the_policys_size(name, monkeypatch):
    """So that a slice of environments has the tokens that it would have in the whole."""
    env, seen = make_env(6), []
    policy = make_policy(name, env.spec)
    apply_adaptation(policy, AdaptationConfig(train=("language_model", "expert")))
    look = policy.with_image_tokens
    sampler = build_sampler(policy, tiny_sampler(name, EXECUTED), seed=0)
    collector = RolloutCollector(env, sampler, execution_horizon=EXECUTED, seed=0, policy_batch_size=3)

    def spied(inputs):
        seen.append(len(inputs))
        return look(inputs)

    monkeypatch.setattr(policy, "with_image_tokens", spied)
    inputs = collector.collect(2).inputs
    env.close()
    assert seen == [3] * 6  # two batches at the start, and after each of two decisions
    assert inputs is not None
    assert inputs.image_tokens is not None
    assert inputs.image_tokens.shape[:2] == (12, 4)
    assert len(inputs.tokens) == 12


def run_whole_and_resumed(
    name: str, config: TrainConfig, tmp_path: Path, adaptation: AdaptationConfig | None = None
) -> tuple[Any, list[dict[str, float]], Any]:
    """Policy, metrics and sampler's state of a whole run, after another with an interruption has repeated it bit for
    bit."""

    def run(folder: str, num_iterations: int, seed: int, resume: bool = False) -> tuple[Any, dict[str, torch.Tensor]]:
        env = make_env(NUM_ENVS)
        policy = make_policy(name, env.spec, seed)
        apply_adaptation(policy, adaptation or AdaptationConfig())
        before = {k: v.clone() for k, v in policy.state_dict().items()}
        stage = replace(config, num_iterations=num_iterations)
        run_training(policy, env, stage, tmp_path / folder, resume=resume, tensorboard=False)
        env.close()
        return policy, before

    policy, before = run("whole", 2, seed=0)
    moved = {k for k, v in policy.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k, v in policy.named_parameters() if v.requires_grad}  # all that learns, and nothing else
    run("parts", 1, seed=0)
    first = load_state(tmp_path / "parts" / STATE_FILE)["learner"]["actor"]
    run("parts", 2, seed=5, resume=True)  # the policy that is built here has other weights, all to be replaced
    whole, parts = (load_state(tmp_path / folder / STATE_FILE)["learner"] for folder in ("whole", "parts"))
    for part in ("policy", "noise_head"):
        assert_equal(whole["actor"][part], parts["actor"][part])
    assert_equal(whole["actor"]["optimizer"]["state"], parts["actor"]["optimizer"]["state"])
    assert_equal(whole["critic"]["critic"], parts["critic"]["critic"])
    assert any(not torch.equal(value, first["policy"][key]) for key, value in whole["actor"]["policy"].items())
    stored = [(tmp_path / folder / POLICY_FOLDER / WEIGHTS_FILE).read_bytes() for folder in ("whole", "parts")]
    assert stored[0] == stored[1]
    assert_equal(load_policy(tmp_path / "parts" / POLICY_FOLDER).state_dict(), plain_state_dict(policy))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    return policy, metrics_of(tmp_path / "whole"), (first["noise_head"], whole["actor"]["noise_head"])


def assert_equal(ours: Any, theirs: Any) -> None:
    if ours is None or theirs is None:
        assert ours is theirs
    else:
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "whole"])
@pytest.mark.parametrize("name", FAMILIES)
def test_two_updates_and_a_resume(name, freeze, tmp_path):
    policy, rows, _ = run_whole_and_resumed(name, train_config(name, freeze_encoder=freeze), tmp_path)
    check_updates(rows, FLOAT32_ERROR)
    assert policy.encoder_is_frozen == freeze


KERNELS: dict[str, Any] = {
    "flow_noise": FlowSamplerConfig(kernel="flow_noise", num_steps=2, mode="full", scored_horizon=EXECUTED),
    "ou": FlowSamplerConfig(kernel="ou", num_steps=3, mode="full", scored_horizon=EXECUTED),
    "cps": FlowSamplerConfig(kernel="cps", num_steps=3, mode="full", scored_horizon=EXECUTED),
    "fpo": FPOConfig(num_steps=2, num_draws=4, scored_horizon=EXECUTED),
}


@pytest.mark.parametrize(("kernel", "name"), [(kernel, "pi0") for kernel in KERNELS] + [("flow_noise", "smolvla")])
def test_other_kernels_on_a_padded_chunk(kernel, name, tmp_path):
    """The head of Flow-Noise is as wide as the chunk, and learns; padded dimensions are not scored."""
    config = train_config(name, sampler=KERNELS[kernel])
    if kernel == "fpo":  # has no density
        actor = replace(PPO_CONFIG.actor, reference_kl_coef=0.0)
        config = replace(config, algorithm=replace(PPO_CONFIG, actor=actor))
    _, rows, (first, last) = run_whole_and_resumed(name, config, tmp_path)
    check_updates(rows, FLOAT32_ERROR)
    if kernel == "flow_noise":
        assert all(not torch.equal(first[key], last[key]) for key in first)


@pytest.mark.parametrize("name", ["pi0", "openvla_oft", "openvla"])
def test_grpo(name):
    """Groups of four episodes, with rewards at every step so that their returns differ."""
    config = GRPOConfig(group_size=2, groups_per_update=1, max_rounds=2, actor=PPO_CONFIG.actor)
    env = replace(ENV, reward="dense").make(4, split="train", auto_reset=True, final_images=True)
    trainer = Trainer(make_policy(name, env.spec), lambda _: env, train_config(name, num_envs=4, algorithm=config))
    for _ in range(2):
        metrics = trainer.iterate()
        assert metrics["update/ratio_error_first"] < FLOAT32_ERROR
        assert metrics["update/ratio_error"] > 1e-3
        assert all(math.isfinite(value) for value in metrics.values())
    trainer.close()


@pytest.mark.parametrize("name", ["pi0", "openvla_oft", "openvla", "hf_token"])
def test_adapters_of_the_language_model(name, tmp_path):
    """They are merged in the policy that is saved, and apart in the state that is gone on from."""
    train = () if name == "openvla" else ("expert",)
    adaptation = AdaptationConfig(train=train, lora=LoRAConfig(rank=2, alpha=4.0))
    policy, rows, _ = run_whole_and_resumed(name, train_config(name, freeze_encoder=False), tmp_path, adaptation)
    check_updates(rows, FLOAT32_ERROR)
    assert policy.vision_is_frozen


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "encoded_again"])
@pytest.mark.parametrize("name", ["pi0", "smolvla", "hf_token", "openvla_oft"])
def test_a_bfloat16_encoder(name, cached, tmp_path):
    """The expert is float32, and so are actions and likelihoods; prefixes are kept, or made a second time."""
    adaptation = AdaptationConfig(train=("expert",), precision="bfloat16")
    config = train_config(name, prefix_cache_gib=1.0 if cached else 0.0)
    policy, rows, _ = run_whole_and_resumed(name, config, tmp_path, adaptation)
    check_updates(rows, FLOAT32_ERROR)
    kinds = {part_of(k) for k, v in policy.named_parameters() if v.dtype == torch.bfloat16}
    assert kinds >= {"vision", "language_model"}
    assert {v.dtype for v in policy.parameters() if v.requires_grad} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_are_looked_at_once_where_vision_is_frozen(name, precision, tmp_path):
    parts = ("language_model",) if name == "openvla" else ("language_model", "expert")
    adaptation = AdaptationConfig(train=parts, precision=precision)
    config = train_config(name, freeze_encoder=False)
    env = make_env(NUM_ENVS)
    policy = make_policy(name, env.spec)
    apply_adaptation(policy, adaptation)
    sampler = build_sampler(policy, config.sampler, seed=0)
    collector = RolloutCollector(env, sampler, execution_horizon=EXECUTED, seed=0)
    learner, rows = PPO(sampler, PPO_CONFIG), []
    for _ in range(2):
        batch = collector.collect(3)
        assert batch.prefix is None
        assert batch.inputs is not None
        assert not batch.inputs.images
        tokens = batch.inputs.image_tokens
        assert tokens is not None
        assert len(tokens) == 3 * NUM_ENVS
        assert tokens.dtype == (torch.float32 if precision == "float32" else torch.bfloat16)
        assert float(tokens.float().std(dim=0).max()) > 1e-4  # pictures of other moments are other tokens
        with torch.no_grad():
            torch.testing.assert_close(policy.encode(batch.inputs).pooled, batch.features, atol=1e-5, rtol=0.0)
        rows.append(learner.update(batch))
        assert rows[-1]["ratio_error_first"] < FLOAT32_ERROR
        assert rows[-1]["ratio_error"] > 1e-3
    env.close()
    assert policy.vision_is_frozen
    assert not policy.encoder_is_frozen
    if precision == "float32" and name in ("smolvla", "hf_flow", "openvla"):
        check_updates(run_whole_and_resumed(name, config, tmp_path, adaptation)[1], FLOAT32_ERROR)
