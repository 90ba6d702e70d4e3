"""Samples per second of a PPO update of pi0 with a frozen VLM: prefixes kept from the rollout, against rebuilt ones.

Both sides make the same update (the same losses, to rounding) by one-step Flow-SDE on the same samples; the peer
encodes pictures and sentence again in every pass, as trainers without a prefix cache do. The model has pi0's shape at a
size that a laptop holds; `--full-size` is the published one.

    make bench NAME=vla_ppo_update ARGS="--save"
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
from tests.benchmarks.vla_sample import CAMERAS, observation, small_pi0
from vla_rl.flow import FlowSamplerConfig
from vla_rl.onpolicy import ActorConfig, flow_sampler
from vla_rl.onpolicy.actor import ActorData, ActorUpdate
from vla_rl.policies.pi0 import Pi0, pi0_size


@dataclass(frozen=True)
class VLAUpdateConfig:
    """`num_samples` of an update, `num_epochs` over them in minibatches. `save`: keep the result beside it."""

    repeats: int = 3
    num_samples: int = 8
    num_epochs: int = 2
    minibatch_size: int = 4
    full_size: bool = False
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    num_threads: int = 1
    save: bool = False


def main(config: VLAUpdateConfig) -> None:
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(0)
    machine = hardware()
    size = replace(pi0_size() if config.full_size else small_pi0(), state_dim=8, action_dim=7, cameras=CAMERAS)
    policy = Pi0(size).eval()
    policy.freeze_encoder()
    on_gpu = config.device.startswith("cuda")
    policy = policy.to(config.device, torch.bfloat16 if on_gpu else torch.float32)
    sampling = FlowSamplerConfig(num_steps=size.num_steps)
    inputs = policy.preprocess(observation(CAMERAS, config.num_samples))
    with torch.no_grad():
        prefix = policy.encode(inputs)
        generator = torch.Generator(config.device).manual_seed(0)
        _, trace = flow_sampler(policy, sampling).sample(prefix, generator)
    advantages = torch.randn(config.num_samples, generator=torch.Generator().manual_seed(0)).to(config.device)
    actor = ActorConfig(num_epochs=config.num_epochs, minibatch_size=config.minibatch_size, target_kl=None)

    def side(data: ActorData) -> tuple[ActorUpdate, ActorData]:
        return ActorUpdate(flow_sampler(copy.deepcopy(policy), sampling), actor), data

    sides = {
        "cached": side(ActorData(prefix, None, trace, advantages)),
        "rebuilt": side(ActorData(None, inputs, trace, advantages)),
    }

    def update(name: str) -> dict[str, float]:
        learner, data = sides[name]
        return learner.update(data, torch.Generator(config.device).manual_seed(0))

    def rate(name: str) -> float:
        begin = time.perf_counter()
        update(name)
        if on_gpu:
            torch.cuda.synchronize()
        return config.num_samples * config.num_epochs / (time.perf_counter() - begin)

    losses = {name: update(name)["policy_loss"] for name in sides}
    if abs(losses["cached"] - losses["rebuilt"]) > 1e-3:
        raise RuntimeError(f"the two sides do not make the same update: their losses are {losses}")
    values = in_turns({name: lambda name=name: rate(name) for name in sides}, config.repeats)
    BenchmarkResult(
        name="vla_ppo_update",
        ours=round(median(values["cached"]), 3),
        peer=round(median(values["rebuilt"]), 3),
        ratio=round(median_ratio(values["cached"], values["rebuilt"]), 2),
        unit="samples/s",
        details={
            "rates": summary(values),
            "losses": losses,
            "cache_mib_per_sample": round(prefix.num_bytes / config.num_samples / 2**20, 2),
            "parameters": sum(p.numel() for p in policy.parameters()),
            "trained_parameters": sum(p.numel() for p in policy.parameters() if p.requires_grad),
            "config": {k: v for k, v in vars(config).items() if k != "save"},
            "hardware": machine,
        },
    ).finish(config.save)


if __name__ == "__main__":
    main(tyro.cli(VLAUpdateConfig))
