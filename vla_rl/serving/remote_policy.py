"""A policy behind a server, for evaluation: `vla-rl eval --policy ws://host:port`. Any server of openpi's protocol."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_rl.core import ActionChunk, EnvSpec, Observation
from vla_rl.serving.client import PolicyClient
from vla_rl.serving.config import RemoteConfig, read_api_key
from vla_rl.serving.requests import FLAT_KEYS, FlatKeys


class RemotePolicy:
    """Implements `Policy` over sessions with the server at `url`, for the environment of `spec`.

    Our servers take each row's noise, so that an evaluation is that of the policy's folder, up to rounding in batches
    of other sizes; other servers draw their own. Raises PolicyServerError where the server does not answer, or refuses
    an observation of this environment.
    """

    rows_are_independent = True  # so an evaluation sends no row twice

    def __init__(self, url: str, spec: EnvSpec, config: RemoteConfig | None = None) -> None:
        self._config = config or RemoteConfig()
        if self._config.num_sessions < 1:
            raise ValueError(f"num_sessions must be at least 1, got {self._config.num_sessions}")
        self._keys = FLAT_KEYS.get(self._config.keys)
        key = None if self._config.api_key_file is None else read_api_key(self._config.api_key_file)
        first = PolicyClient(url, api_key=key, timeout_s=self._config.first_timeout_s)
        black = {c: torch.zeros(1, s.height, s.width, 3, dtype=torch.uint8) for c, s in spec.cameras.items()}
        probe = Observation(black, torch.zeros(1, spec.state_dim), ("",))
        try:
            chunk = first.infer(write_observation(probe, 0, self._keys))["actions"]
        except BaseException:
            first.close()
            raise
        self.metadata = first.metadata
        self.action_horizon, self.action_dim = chunk.shape
        self.noise_dim = first.metadata["vla_rl"]["noise_shape"][1] if first.has_envelope else self.action_dim
        first.timeout_s = self._config.timeout_s
        self._clients = [first]
        for _ in range(self._config.num_sessions - 1):
            self._clients.append(PolicyClient(url, api_key=key, timeout_s=self._config.timeout_s))
        self._threads = ThreadPoolExecutor(len(self._clients), thread_name_prefix="remote-policy")

    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        """Each row is a request of its own; the server may answer several at once."""
        obs = Observation({c: i.cpu() for c, i in obs.images.items()}, obs.state.cpu(), obs.instruction)
        rows = noise.cpu().numpy()
        shares = [range(s, len(obs), len(self._clients)) for s in range(len(self._clients))]
        actions = np.zeros((len(obs), self.action_horizon, self.action_dim), np.float32)

        def ask(client: PolicyClient, share: range) -> None:
            for i in share:
                own = rows[i] if client.has_envelope else None
                actions[i] = client.infer(write_observation(obs, i, self._keys), noise=own)["actions"]

        for done in [self._threads.submit(ask, c, s) for c, s in zip(self._clients, shares, strict=True)]:
            done.result()
        return ActionChunk(torch.from_numpy(actions))

    def close(self) -> None:
        self._threads.shutdown()
        for client in self._clients:
            client.close()


def write_observation(obs: Observation, row: int, keys: FlatKeys | None = None) -> dict[str, Any]:
    """The message of one row. With flat `keys` the environment's cameras fill the picture slots in order, and each
    state key but the first takes one number from the state's end."""
    state = obs.state[row].numpy()
    images = {c: image[row].numpy() for c, image in obs.images.items()}
    if keys is None:
        return {"images": images, "state": state, "prompt": obs.instruction[row]}
    first = len(state) - len(keys.state) + 1
    parts = np.split(state, range(first, len(state)))
    return {
        **dict(zip(keys.images, images.values(), strict=False)),
        **dict(zip(keys.state, parts, strict=True)),
        keys.prompt: obs.instruction[row],
    }


__all__ = ["RemotePolicy", "write_observation"]
