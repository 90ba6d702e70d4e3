"""A stored policy that answers requests: read from its folder, asked in batches, deterministic by session."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla_rl.core import Observation
from vla_rl.policies.checkpoints.load_any import layout_of, load_any
from vla_rl.policies.checkpoints.native import read_description
from vla_rl.protocols import FlowPolicy, Policy, chunk_shape
from vla_rl.serving.requests import Request, RequestError, RequestShapes
from vla_rl.serving.rtc import RTCConfig, continue_chunks, trained_delay


@dataclass(frozen=True)
class ServedPolicy:
    """`version` rises with each reload. `digest`: of the folder's weights. `spec`: the environment's, where stored."""

    policy: Policy
    name: str
    version: int
    digest: str
    shapes: RequestShapes
    rtc: RTCConfig
    spec: Mapping[str, Any]

    @property
    def continues_chunks(self) -> bool:
        """Real-time chunking works: a flow policy that says how many steps it takes."""
        return isinstance(self.policy, FlowPolicy) and hasattr(getattr(self.policy, "config", None), "num_steps")

    def metadata(self) -> dict[str, Any]:
        """What clients are told of it when they connect."""
        return {
            "policy": self.name,
            "policy_version": self.version,
            "policy_digest": self.digest,
            "action_horizon": self.policy.action_horizon,
            "action_dim": self.policy.action_dim,
            "noise_shape": list(self.shapes.noise),
            "cameras": None if self.shapes.cameras is None else list(self.shapes.cameras),
            "state_dim": self.shapes.state_dim,
            "control_hz": self.spec.get("control_hz"),
            "action_names": list(self.spec.get("action", {}).get("names", [])),
            "rtc": self.continues_chunks,
            "rtc_trained_delay": trained_delay(self.policy),
        }

    @torch.no_grad()
    def act(self, requests: Sequence[Request], noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """Actions float32 [N, H, A] for requests with pictures of equal sizes and `noise` [N, H, D].

        Raises ValueError where the policy refuses an observation, RequestError "bad_request" where it has no real-time
        chunking and is asked for it.
        """
        obs = Observation(
            {c: _stack([r.images[c] for r in requests]) for c in requests[0].images},
            _stack([r.state for r in requests]),
            tuple(r.prompt for r in requests),
        )
        if any(r.prefix is not None for r in requests):
            return self._continue(obs, requests, torch.from_numpy(noise)).cpu().numpy()
        return self.policy.act(obs, torch.from_numpy(noise)).actions.float().cpu().numpy()

    def _continue(self, obs: Observation, requests: Sequence[Request], noise: Tensor) -> Tensor:
        policy: Any = self.policy
        if not self.continues_chunks:
            raise RequestError("bad_request", f"{type(policy).__name__} is no flow policy: it takes no prefix")
        horizon = policy.action_horizon
        planned = torch.zeros(len(requests), horizon, policy.action_dim)
        lengths = torch.zeros(len(requests), dtype=torch.int64)
        for row, request in enumerate(requests):
            if request.prefix is not None:
                lengths[row] = min(len(request.prefix), horizon)
                planned[row, : lengths[row]] = torch.tensor(request.prefix[:horizon])
        delays = torch.minimum(torch.tensor([r.delay for r in requests]), lengths)
        prefix = policy.encode(policy.preprocess(obs))
        device = prefix.pooled.device
        planned, lengths, delays = planned.to(device), lengths.to(device), delays.to(device)
        steps = policy.config.num_steps
        return continue_chunks(policy, prefix, noise.to(device), planned, lengths, delays, self.rtc, steps).float()

    def warm_up(self) -> None:
        """One answer before it is served: what is wrong with a policy shows now, and its first client does not wait."""
        cameras = self.spec.get("cameras", {})
        sizes = {c: cameras.get(c, {"height": 224, "width": 224}) for c in self.shapes.cameras or cameras}
        images = {c: np.zeros((size["height"], size["width"], 3), np.uint8) for c, size in sizes.items()}
        state_dim = (
            self.shapes.state_dim if self.shapes.state_dim is not None else len(self.spec.get("state_names", ()))
        )
        request = Request(images, np.zeros(state_dim, np.float32), "")
        actions = self.act([request], np.zeros((1, *self.shapes.noise), np.float32))
        if actions.shape != (1, self.policy.action_horizon, self.policy.action_dim):
            raise ValueError(f"{self.name} returns actions {actions.shape[1:]}, which is not what it says of itself")


def read_policy(folder: Path, version: int, *, device: str, rtc: RTCConfig) -> ServedPolicy:
    """The policy of `folder`, whoever wrote it, warm. Raises PolicyCheckpointError as `load_any`, and ValueError where
    `rtc.method` is "trained" and it was not."""
    policy: Any = load_any(folder, device=device)
    if rtc.method == "trained" and not trained_delay(policy):
        raise ValueError(f"{folder} was not fine-tuned with a max_prefix_delay; use rtc.method auto or guided")
    spec = (read_description(folder).get("spec") or {}) if layout_of(folder) == "native" else {}
    config = getattr(policy.config, "base", policy.config)  # a steered policy sees what its base sees
    state_dim = getattr(config, "state_dim", None)
    shapes = RequestShapes(
        cameras=tuple(getattr(config, "cameras", ())),
        state_dim=len(spec["state_names"]) if state_dim is None and spec else state_dim,
        noise=chunk_shape(policy),
        action_dim=policy.action_dim,
    )
    served = ServedPolicy(policy, folder.resolve().name, version, _digest(folder), shapes, rtc, spec)
    served.warm_up()
    return served


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


def _digest(folder: Path) -> str:
    """Of the weights' files, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix == ".safetensors"):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


__all__ = ["ServedPolicy", "read_policy"]
