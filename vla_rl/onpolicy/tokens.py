"""Exploration of token policies: chunks drawn bin by bin from the softmax at a temperature.

    PPO(TokenSampler(policy, TokenSamplerConfig(temperature=1.6)), PPOConfig())

Every log-probability here is of the tempered distribution, softmax(logits / temperature), which is the one that
chunks are drawn from: a ratio is then that of the behaviour policy's true likelihoods. (Scoring at temperature 1 what
was drawn at 1.6 would optimise another policy than the one that collects.) Deployment is the policy's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vla_rl.flow.likelihood import LogProb, categorical_entropy
from vla_rl.flow.noise import NoiseSource, bins_of_noise, draw_normal
from vla_rl.protocols import Prefix, TokenPolicy, chunk_shape


@dataclass(frozen=True)
class TokenSamplerConfig:
    """`temperature` of the softmax; 1.6 in SimpleVLA-RL (arXiv 2509.09674). `reduction`: one PPO ratio for a "chunk",
    its true likelihood ratio, or one for each "token". `scored_horizon`: the action steps whose tokens count, those
    executed (None: all)."""

    temperature: float = 1.0
    reduction: Literal["chunk", "token"] = "chunk"
    scored_horizon: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError(f"temperature is {self.temperature}, expected > 0 (the mode is for deployment)")
        if self.reduction not in ("chunk", "token"):
            raise ValueError(f"reduction is {self.reduction!r}, expected chunk or token")


@dataclass(frozen=True)
class TokenTrace:
    """`bins`: int64 [N, L]. `values` [N, E] and `log_prob` [N]: at the sampler's temperature, of the scored tokens."""

    bins: Tensor
    values: Tensor
    log_prob: Tensor

    def __len__(self) -> int:
        return self.bins.shape[0]

    def _map(self, function: Callable[[Tensor], Tensor]) -> TokenTrace:
        return TokenTrace(function(self.bins), function(self.values), function(self.log_prob))

    def select(self, rows: Tensor) -> TokenTrace:
        return self._map(lambda x: x[rows])

    def to(self, device: torch.device | str) -> TokenTrace:
        return self._map(lambda x: x.to(device))

    @staticmethod
    def concatenate(parts: Sequence[TokenTrace]) -> TokenTrace:
        return TokenTrace(*(torch.cat(columns) for columns in zip(*(vars(p).values() for p in parts), strict=True)))


class TokenSampler:
    """Draws and scores the bins of a `TokenPolicy`. The entropy is exact for each token given those before it.

    Scored are the tokens that reach the environment, and those that such tokens depend on. What is left out (steps
    beyond `scored_horizon`, padding) only follows on them or is independent, so the score is the exact likelihood.
    With `reference_kl_coef` an update keeps the reference's distributions: 4 M E V bytes for M decisions of E tokens.
    """

    has_transitions = has_entropy = True

    def __init__(self, policy: TokenPolicy, config: TokenSamplerConfig) -> None:
        horizon = policy.action_horizon if config.scored_horizon is None else config.scored_horizon
        if not 1 <= horizon <= policy.action_horizon:
            raise ValueError(f"scored_horizon is {horizon}, expected 1..{policy.action_horizon}")
        self.policy, self.config = policy, config
        steps, dims = chunk_shape(policy)
        position = torch.arange(steps * dims).unflatten(0, (steps, dims))[:horizon]
        if getattr(policy, "decodes_in_parallel", False):
            position = position[:, : policy.action_dim]
        self._num_tokens = steps * dims
        last = int(position[-1, policy.action_dim - 1])
        self._scored = position[position <= last]  # int64 [E]

    @torch.no_grad()
    def sample(self, prefix: Prefix, generator: NoiseSource) -> tuple[Tensor, TokenTrace]:
        device, n = prefix.tokens.device, len(prefix)
        # one draw for all tokens: an addressed source counts its draws, and a row must not depend on its neighbours
        normal = draw_normal((n, self._num_tokens), generator, device)
        tokens = torch.full((n, self._num_tokens), torch.nan, device=device)

        def draw(logits: Tensor, position: int) -> Tensor:
            log_probs = self._log_softmax(logits)
            bins = bins_of_noise(log_probs, normal[:, position])
            tokens[:, position] = log_probs.gather(1, bins[:, None])[:, 0]
            return bins

        bins = self.policy.sample_tokens(prefix, draw)
        values, joint = self._reduce(tokens[:, self._scored.to(device)])
        return self.policy.actions_of_bins(bins), TokenTrace(bins, values, joint)

    def score(self, prefix: Prefix, trace: TokenTrace) -> LogProb:
        scored = self._scored.to(trace.bins.device)
        log_probs = self._log_softmax(self.policy.token_logits(prefix, trace.bins)[:, scored])
        values, joint = self._reduce(log_probs.gather(2, trace.bins[:, scored, None])[:, :, 0])
        no_step = torch.full(values.shape, -1, dtype=torch.int64, device=values.device)
        nothing = values.new_zeros(len(trace), 0, 0, 0)
        entropy = categorical_entropy(log_probs).mean(dim=1)
        return LogProb(values, no_step, joint, entropy, nothing, nothing, token_log_probs=log_probs)

    def joint_clip(self, clip: float) -> float:
        return clip * (len(self._scored) if self.config.reduction == "token" else 1)

    def _log_softmax(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits.float() / self.config.temperature, dim=-1)

    def _reduce(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`values` and `joint` from the log-probability of each scored token, [N, E]."""
        joint = tokens.sum(dim=1)
        return (tokens if self.config.reduction == "token" else joint[:, None]), joint


__all__ = ["TokenSampler", "TokenSamplerConfig", "TokenTrace"]
