"""One decision of pi0: pictures and a sentence in, ten denoising steps, a chunk out; against transformers' PI0.

Both hold the same weights and return the same chunk (checked before anything is timed), on the same device, in turns.
`--full-size` is the published model (bf16 on a GPU), else one of the same shape that a laptop can hold. The robot has
`--num-cameras` of the model's three: what is missing we leave out, and transformers computes and masks it.

    make bench NAME=vla_sample ARGS="--save"
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import tyro

from tests.benchmarks.harness import BenchmarkResult, hardware, in_turns, median_ratio, summary
from tests.transformers_pi0 import same_weights, their_inputs, transformers_pi0
from vla_rl.core import Observation
from vla_rl.flow.sampling import ode
from vla_rl.policies.blocks.decoder import DecoderConfig
from vla_rl.policies.blocks.vision_transformer import VisionTransformerConfig
from vla_rl.policies.pi0 import Pi0Config, pi0_size

CAMERAS = ("base", "left_wrist", "right_wrist")


@dataclass(frozen=True)
class VLASampleConfig:
    """`save`: keep the result beside it. `compile`: ours with its denoising step compiled."""

    repeats: int = 7
    num_cameras: int = 3
    num_steps: int = 10
    full_size: bool = False
    compile: bool = False
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    num_threads: int = 1
    save: bool = False


def small_pi0() -> Pi0Config:
    """pi0 at a quarter of its widths and a third of its depths: 816 prefix tokens and chunks of 50, as in pi0."""
    return Pi0Config(
        max_action_dim=32,
        vision=VisionTransformerConfig(288, 9, 1076, 8, image_size=224, patch_size=14),
        language=DecoderConfig(512, 6, 4096, 8, 1, 64, vocab_size=2000, embedding_scale=512**0.5),
        expert=DecoderConfig(256, 6, 1024, 8, 1, 64),
    )


def observation(cameras: tuple[str, ...], num: int = 1) -> Observation:
    generator = torch.Generator().manual_seed(0)
    pictures = {c: torch.randint(0, 256, (num, 224, 224, 3), generator=generator, dtype=torch.uint8) for c in cameras}
    return Observation(pictures, torch.zeros(num, 8), ("pick up the red block",) * num)


def main(config: VLASampleConfig) -> None:
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(0)
    machine = hardware()
    size = pi0_size() if config.full_size else small_pi0()
    size = replace(size, state_dim=8, action_dim=7, cameras=CAMERAS[: config.num_cameras])
    theirs = transformers_pi0(size).eval()
    ours = same_weights(theirs, size).eval()
    dtype = torch.bfloat16 if config.device.startswith("cuda") else torch.float32
    theirs, ours = theirs.to(config.device, dtype), ours.to(config.device, dtype)
    inputs = ours.preprocess(observation(size.cameras))
    noise = torch.randn(1, size.action_horizon, size.max_action_dim, device=config.device)
    given = {
        k: v.to(config.device, dtype if v.is_floating_point() else None) for k, v in their_inputs(ours, inputs).items()
    }
    if config.compile:
        ours.velocity = torch.compile(ours.velocity, fullgraph=True)

    @torch.no_grad()
    def our_chunk() -> torch.Tensor:
        return ode(ours, ours.encode(inputs), noise, config.num_steps)

    @torch.no_grad()
    def their_chunk() -> torch.Tensor:
        return theirs.sample_actions(**given, noise=noise.to(dtype), num_steps=config.num_steps)

    error = float((our_chunk() - their_chunk()).abs().max())
    if error > (1e-4 if dtype == torch.float32 else 0.5):
        raise RuntimeError(f"the two sides do not return the same chunk: they differ by {error}")

    def rate(chunk: object) -> float:
        begin = time.perf_counter()
        chunk()  # pyright: ignore[reportCallIssue]
        if config.device.startswith("cuda"):
            torch.cuda.synchronize()
        return 1.0 / (time.perf_counter() - begin)

    values = in_turns({"ours": lambda: rate(our_chunk), "transformers": lambda: rate(their_chunk)}, config.repeats)
    BenchmarkResult(
        name="vla_sample" if config.num_cameras == len(CAMERAS) else f"vla_sample_{config.num_cameras}_cameras",
        ours=round(median(values["ours"]), 4),
        peer=round(median(values["transformers"]), 4),
        ratio=round(median_ratio(values["ours"], values["transformers"]), 2),
        unit="decisions/s",
        details={
            "rates": summary(values),
            "ms_per_decision": {name: round(1000.0 / median(v), 1) for name, v in values.items()},
            "difference": error,
            "parameters": sum(p.numel() for p in ours.parameters()),
            "prefix_tokens": len(size.cameras) * size.vision.num_patches + size.tokenizer.max_tokens,
            "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if config.device.startswith("cuda") else None,
            "config": {k: v for k, v in vars(config).items() if k != "save"},
            "hardware": machine,
        },
    ).finish(config.save)


if __name__ == "__main__":
    main(tyro.cli(VLASampleConfig))
