"""Samples per second of a PPO update of TinyVLA: with the frozen encoder's features kept from the rollout, and without.

Both sides make the same update of the same policy on the same rollout (the same losses, to float32 rounding); the peer
encodes pictures and sentences again for every minibatch, as a trainer without a feature cache does. A third side also
trains the encoder. A sample counts once an epoch.

    make bench NAME=ppo_update ARGS="--save"
"""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass, replace
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import tyro

from tests.benchmarks.harness import BenchmarkResult, hardware, in_turns, median_ratio, summary
from vla_rl.envs.tabletop import make_tabletop
from vla_rl.flow import FlowSamplerConfig
from vla_rl.onpolicy import PPO, ActorConfig, PPOConfig, flow_sampler
from vla_rl.policies.tiny import TinyVLA, TinyVLAConfig
from vla_rl.rollout.collector import RolloutBatch, RolloutCollector


@dataclass(frozen=True)
class PPOUpdateBenchmarkConfig:
    """`num_envs * num_decisions` samples an update, `num_epochs` over them. `save`: keep the result beside it."""

    repeats: int = 5
    num_envs: int = 64
    num_decisions: int = 8
    num_epochs: int = 4
    minibatch_size: int = 256
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    num_threads: int = 1
    save: bool = False


def rollout(config: PPOUpdateBenchmarkConfig) -> tuple[TinyVLA, RolloutBatch]:
    """An untrained policy and what it did in reach; rewards at random, so that advantages are not all the same."""
    torch.manual_seed(0)
    env = make_tabletop("reach", config.num_envs, cameras={"agent": 64})
    sizes = TinyVLAConfig(state_dim=env.spec.state_dim, action_dim=env.spec.action.dim)
    policy = TinyVLA(sizes).to(config.device)
    sampler = flow_sampler(policy, FlowSamplerConfig())
    collector = RolloutCollector(env, sampler, execution_horizon=8, seed=0, device=config.device)
    batch = collector.collect(config.num_decisions)
    env.close()
    rewards = torch.randn(batch.rewards.shape, generator=torch.Generator().manual_seed(0)).to(batch.rewards)
    return policy, replace(batch, rewards=rewards)


class Side:
    """Updates of a copy of `policy`. Whether features are cached is in `batch`. `warmup`: metrics of the first one."""

    def __init__(self, policy: TinyVLA, batch: RolloutBatch, config: PPOUpdateBenchmarkConfig, *, frozen: bool) -> None:
        policy = copy.deepcopy(policy)
        if frozen:
            policy.freeze_encoder()
        actor = ActorConfig(num_epochs=config.num_epochs, minibatch_size=config.minibatch_size, target_kl=None)
        self._ppo = PPO(flow_sampler(policy, FlowSamplerConfig()), PPOConfig(critic_warmup_iterations=0, actor=actor))
        self._batch, self._config = batch, config
        self.warmup = self._ppo.update(batch)

    def samples_per_second(self) -> float:
        begin = time.perf_counter()
        metrics = self._ppo.update(self._batch)
        if self._config.device.startswith("cuda"):
            torch.cuda.synchronize()
        return metrics["num_samples"] * self._config.num_epochs / (time.perf_counter() - begin)


def main(config: PPOUpdateBenchmarkConfig) -> None:
    torch.set_num_threads(config.num_threads)
    machine = hardware()
    policy, batch = rollout(config)
    assert batch.inputs is not None
    with torch.no_grad():
        cached = replace(batch, prefix=policy.encode(batch.inputs), inputs=None)
    sides = {
        "cached": Side(policy, cached, config, frozen=True),
        "encoded_again": Side(policy, batch, config, frozen=True),
        "encoder_learns": Side(policy, batch, config, frozen=False),
    }
    losses = [sides[name].warmup["policy_loss"] for name in ("cached", "encoded_again")]
    if abs(losses[0] - losses[1]) > 1e-3:
        raise RuntimeError(f"the two sides do not make the same update: their losses are {losses}")
    values = in_turns({name: side.samples_per_second for name, side in sides.items()}, config.repeats)
    ratios = {name: round(median_ratio(values["cached"], v), 2) for name, v in values.items() if name != "cached"}
    BenchmarkResult(
        name="ppo_update",
        ours=round(median(values["cached"]), 1),
        peer=round(median(values["encoded_again"]), 1),
        ratio=ratios["encoded_again"],
        unit="samples/s",
        details={
            "rates": summary(values),
            "ratios": ratios,
            "repeats": config.repeats,
            "samples_per_update": config.num_envs * config.num_decisions,
            "num_epochs": config.num_epochs,
            "minibatch_size": config.minibatch_size,
            "policy_parameters": sum(p.numel() for p in policy.parameters()),
            "warmup_losses": losses,
            "device": config.device,
            "num_threads": config.num_threads,
            "hardware": machine,
        },
    ).finish(config.save)


if __name__ == "__main__":
    main(tyro.cli(PPOUpdateBenchmarkConfig))
