"""A torch policy that learns from replay through a JAX critic: CO-RFT, WSRL and PA-RL for a VLA.

The critic values chunks that the policy proposes; better ones (re-ranked and ascended, `improvement.py`) become the
targets of the policy's own supervised loss. Nothing but arrays passes between the two, so any policy that learns from
features can be improved by any critic. The policy's encoder is frozen, and pictures are encoded once.

The critic sees chunks as they would be executed: clamped to the environment's bounds, which become [-1, 1]. A value
beyond them would never be stored, so nothing would correct a critic that took it for better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.core import ActionSpec, Observation
from vla_rl.data.feature_cache import FeatureCache
from vla_rl.data.flat_prefix import FlatPrefix
from vla_rl.data.normalization import Normalizer
from vla_rl.data.replay import ReplayBatch, ReplayBuffer
from vla_rl.offpolicy.arrays import to_jax, to_torch
from vla_rl.offpolicy.networks import AgentSpec
from vla_rl.offpolicy.pa_rl import CriticAgent, CriticAgentConfig
from vla_rl.offpolicy.train_state import TrainState, from_tensors, to_tensors, with_raw_key, wrap_raw_key
from vla_rl.offpolicy.wsrl import CarryOver, carry_over
from vla_rl.protocols import LearnsFromPrefix, Prefix, TokenPolicy, chunk_shape, require


@dataclass(frozen=True)
class PolicyLearnerConfig:
    """`critic`: `critic.improvement.num_candidates` chunks are improved for every row of the policy's batch.

    `num_next_actions` of the policy at each successor make the TD target. `policy_updates` after every call of the
    critic's update, of `policy_batch_size` rows. `improve_weight`, `bc_weight`: of the supervised loss on improved
    chunks and on the data's own. `q_weight`: of -Q(s, pi(s)), with gradients through the flow's steps; it and
    `bc_weight` are ConRFT's w_q and w_bc. `critic_warmup_calls`: calls that leave the policy alone.
    `explore`: act with the policy's own chunks, or with improved ones.
    """

    critic: CriticAgentConfig = field(default_factory=CriticAgentConfig)
    num_next_actions: int = 1
    policy_learning_rate: float = 1e-4
    policy_updates: int = 1
    policy_batch_size: int = 128
    improve_weight: float = 1.0
    bc_weight: float = 0.0
    q_weight: float = 0.0
    grad_clip: float = 1.0
    critic_warmup_calls: int = 0
    explore_improved: bool = False

    def __post_init__(self) -> None:
        if min(self.num_next_actions, self.policy_batch_size) < 1 or self.policy_updates < 0:
            raise ValueError(
                "PolicyLearnerConfig needs num_next_actions, policy_batch_size >= 1 and policy_updates >= 0, got "
                f"{self.num_next_actions}, {self.policy_batch_size}, {self.policy_updates}"
            )
        if min(self.improve_weight, self.bc_weight, self.q_weight) < 0.0:
            raise ValueError(
                f"weights must not be negative, got {self.improve_weight}, {self.bc_weight}, {self.q_weight}"
            )


class PolicyLearner:
    """`policy` is changed in place. `horizon`: steps of a chunk that count, those that are executed."""

    def __init__(
        self, policy: nn.Module, config: PolicyLearnerConfig, *, horizon: int, action_spec: ActionSpec, seed: int
    ) -> None:
        require(policy, LearnsFromPrefix, by="learning from replay")
        if config.q_weight and isinstance(policy, TokenPolicy):
            raise ValueError("q_weight is the gradient of Q through a chunk, and tokens have none; set it to 0")
        self.policy: Any = policy
        if not 1 <= horizon <= self.policy.action_horizon:
            raise ValueError(f"horizon is {horizon}, the policy predicts {self.policy.action_horizon} steps")
        if hasattr(policy, "freeze_encoder"):
            self.policy.freeze_encoder()
        self.config, self.horizon = config, horizon
        self.agent = CriticAgent(AgentSpec(self.policy.feature_dim, horizon, self.policy.action_dim), config.critic)
        self.needs_prefixes = self.agent.num_prefixes > 1
        self.state: TrainState = self.agent.init(seed)
        self._flat = FlatPrefix(policy)
        self.feature_dim: int = self._flat.width
        self.num_calls = 0
        self._cache = FeatureCache(policy)
        self._trained = [p for p in policy.parameters() if p.requires_grad]
        self._optimizer = torch.optim.Adam(self._trained, lr=config.policy_learning_rate)
        self._generator = torch.Generator().manual_seed(seed)
        self._key = jax.random.key(seed)
        self._bounds = Normalizer.action_box(action_spec).to(self._trained[0].device)

    # ------------------------------------------------------------------------------------------------------- acting
    @torch.no_grad()
    def explore(self, obs: Observation) -> Tensor:
        """Chunks [N, horizon, A] in the environment's units."""
        prefix = self.policy.encode(self.policy.preprocess(obs))
        if not self.config.explore_improved:
            return self.policy.unnormalize_actions(self._sample(prefix, 1)[0, :, : self.horizon])
        candidates = self._sample(prefix, self.config.critic.improvement.num_candidates)
        improved, _ = self._improve(prefix.pooled, candidates)
        return self.policy.unnormalize_actions(improved[:, : self.horizon])

    def random(self, num_envs: int) -> Tensor:
        """Uniform chunks within the action's bounds."""
        uniform = torch.rand(num_envs, self.horizon, self.policy.action_dim, generator=self._generator)
        return self._bounds.unnormalize((2.0 * uniform - 1.0).to(self._trained[0].device))

    def seed_exploration(self, seed: int) -> None:
        """Decides what `explore` and `random` draw from now on."""
        self._generator.manual_seed(seed)
        self._key = jax.random.key(seed)

    def acting_copy(self) -> Self:
        """A copy on the CPU, to act with in another process."""
        there = deepcopy(self)
        there.policy.to("cpu")
        there._bounds = there._bounds.to("cpu")
        return there

    def acting_weights(self) -> list[Tensor]:
        """What acting depends on and learning changes: of the critic, where it improves what is done."""
        critic = jax.tree.leaves(self.state.params["critic"]) if self.config.explore_improved else []
        return [*(p.detach() for p in self._trained), *(torch.from_numpy(np.array(x)) for x in critic)]

    @torch.no_grad()
    def act_with(self, weights: Sequence[Tensor]) -> None:
        """Act with the `acting_weights` of another learner of the same build."""
        for parameter, values in zip(self._trained, weights, strict=False):  # the critic's come after
            parameter.copy_(values)
        critic = [jnp.asarray(x.numpy()) for x in weights[len(self._trained) :]]
        if critic:
            params = self.state.params
            own = jax.tree.unflatten(jax.tree.structure(params["critic"]), critic)
            self.state = self.state._replace(params={**params, "critic": own})

    def publish(self) -> None:
        """Nothing: the policy that acts is the one that learns."""

    # ------------------------------------------------------------------------------------------------------ learning
    def prepare(self, buffer: ReplayBuffer) -> None:
        """Encode the observations that came in."""
        self._cache.refresh(buffer)

    def update(self, batches: ReplayBatch) -> dict[str, Any]:
        """U critic updates on minibatches [U, B, ...], then `policy_updates` of the policy."""
        u, b = batches.reward.shape
        f = self.feature_dim
        following = batches.next_obs if batches.prefix_next_obs is None else batches.prefix_next_obs
        candidates = self._chunks_at(following[..., :f].reshape(u, -1, f), self.config.num_next_actions)
        conservative = self.config.critic.conservative
        own = None if conservative is None else self._chunks_at(batches.obs[..., :f], conservative.num_actions)
        self.state, metrics = self.agent.update(self.state, self._seen_by_critic(batches), candidates, own)
        self.num_calls += 1
        if self.num_calls <= self.config.critic_warmup_calls:
            return dict(metrics)
        rows = ReplayBatch(*(None if x is None else x.reshape(u * b, *x.shape[2:]) for x in batches))  # pyright: ignore[reportArgumentType]
        return dict(metrics) | self._update_policy(rows)

    def _update_policy(self, rows: ReplayBatch) -> dict[str, Any]:
        """Distil improved chunks and the data's own, follow Q; each with its weight. The rows are those that the critic
        has seen."""
        config, metrics = self.config, {}
        device = self._trained[0].device
        for _ in range(config.policy_updates):
            size = min(config.policy_batch_size, len(rows.obs))
            chosen = torch.randperm(len(rows.obs), generator=self._generator)[:size].numpy()
            prefix = self._flat.unflatten(torch.from_numpy(rows.obs[chosen, : self.feature_dim]).to(device))
            loss = torch.zeros((), device=device)
            if config.improve_weight:
                candidates = self._sample(prefix, config.critic.improvement.num_candidates)
                targets, values = self._improve(prefix.pooled, candidates)
                mask = torch.zeros(targets.shape[:2], dtype=torch.bool, device=device)
                mask[:, : self.horizon] = True
                distil = self.policy.prefix_loss(prefix, targets, mask, self._generator).mean()
                loss = loss + config.improve_weight * distil
                metrics |= {"distil_loss": float(distil.detach()), "q_improved": float(values.mean())}
            if config.bc_weight:
                actions, mask = self._padded(rows.actions[chosen], rows.mask[chosen], device)
                cloning = self.policy.prefix_loss(prefix, actions, mask, self._generator).mean()
                loss = loss + config.bc_weight * cloning
                metrics["bc_loss"] = float(cloning.detach())
            if config.q_weight:
                towards_q, q_policy = self._towards_q(prefix)
                loss = loss - config.q_weight * towards_q
                metrics["q_policy"] = q_policy
            self._optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self._trained, config.grad_clip)
            self._optimizer.step()
        return metrics

    def _towards_q(self, prefix: Prefix) -> tuple[Tensor, float]:
        """A number whose gradient is that of the mean of Q(s, pi(s)), and that mean; one chunk a row.

        The critic's dQ/da is a constant to torch, which goes on from the chunk into the policy. Where the environment
        would clamp an action, that is flat.
        """
        chunks = self._to_critic(self._chunks(prefix, 1)[0, :, : self.horizon])
        self._key, key = jax.random.split(self._key)
        values, gradient = self.agent.action_gradient(self.state, to_jax(prefix.pooled), to_jax(chunks), key)
        towards_q = (chunks * to_torch(gradient, chunks.device)).sum(dim=(1, 2)).mean()
        return towards_q, float(values.mean())

    @torch.no_grad()
    def _sample(self, prefix: Prefix, num: int) -> Tensor:
        return self._chunks(prefix, num)

    def _chunks(self, prefix: Prefix, num: int) -> Tensor:
        """Chunks [num, N, H, A] of the deployed policy, normalised."""
        n = len(prefix)
        noise = torch.randn(num * n, *chunk_shape(self.policy), generator=self._generator).to(prefix.pooled)
        repeated = prefix.select(torch.arange(n, device=prefix.tokens.device).repeat(num))
        return self.policy.chunks(repeated, noise).unflatten(0, (num, n))

    def _chunks_at(self, features: np.ndarray, num: int) -> jax.Array:
        """features [U, M, F] -> the policy's chunks as the critic sees them [U, num, M, horizon, A]."""
        u, m, f = features.shape
        device = self._trained[0].device
        prefix = self._flat.unflatten(torch.from_numpy(np.ascontiguousarray(features.reshape(u * m, f))).to(device))
        chunks = self._sample(prefix, num)[:, :, : self.horizon].unflatten(1, (u, m))
        return to_jax(self._to_critic(chunks.transpose(0, 1)))

    def _to_critic(self, chunks: Tensor) -> Tensor:
        """The policy's normalised chunks [..., A] in the critic's [-1, 1], clamped as the environment clamps them."""
        return self._bounds.normalize(self.policy.unnormalize_actions(chunks)).clamp(-1.0, 1.0)

    def _improve(self, features: Tensor, candidates: Tensor) -> tuple[Tensor, np.ndarray]:
        """Improved chunks [N, H, A], normalised: the critic's steps, then those of the first candidate; and their
        values [N]."""
        self._key, key = jax.random.split(self._key)
        head = self._to_critic(candidates[:, :, : self.horizon])
        improved, values = self.agent.improve(self.state, to_jax(features), to_jax(head), key)
        tail = candidates[0, :, self.horizon :]
        steps = self.policy.normalize_actions(self._bounds.unnormalize(to_torch(improved, tail.device)))
        return torch.cat([steps, tail], dim=1), np.asarray(values)

    def _padded(self, actions: np.ndarray, mask: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """The data's chunks [N, horizon, A] as the policy's, normalised [N, H, A]; steps beyond bear no loss."""
        n, h, a = actions.shape
        full = torch.zeros(n, self.policy.action_horizon, a)
        valid = torch.zeros(n, self.policy.action_horizon, dtype=torch.bool)
        full[:, :h], valid[:, :h] = torch.from_numpy(actions), torch.from_numpy(mask)
        return self.policy.normalize_actions(full.to(device)), valid.to(device)

    def _seen_by_critic(self, batch: ReplayBatch) -> ReplayBatch:
        """Pooled features alone (they hold the state), actions in the critic's [-1, 1]."""
        f, prefix_next = self.policy.feature_dim, batch.prefix_next_obs
        actions = torch.from_numpy(batch.actions).to(self._trained[0].device)
        return batch._replace(
            obs=batch.obs[..., :f],
            next_obs=batch.next_obs[..., :f],
            prefix_next_obs=None if prefix_next is None else prefix_next[..., :f],
            actions=to_jax(self._bounds.normalize(actions).clamp(-1.0, 1.0)),
        )

    # --------------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "train_state": to_tensors(with_raw_key(self.state)),
            "key": torch.from_numpy(np.array(jax.random.key_data(self._key))),
            "generator": self._generator.get_state(),
            "num_calls": self.num_calls,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError where the critic's state is of another agent."""
        raw = from_tensors(state["train_state"], with_raw_key(self.state), "the stored state")
        self.policy.load_state_dict(state["policy"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.state = wrap_raw_key(raw)
        self._key = jax.random.wrap_key_data(jnp.asarray(state["key"].numpy()))
        self._generator.set_state(state["generator"])
        self.num_calls = int(state["num_calls"])

    def switch_from(self, offline: PolicyLearner, carried: CarryOver, seed: int) -> None:
        """Go on from what `offline` has learned; see `wsrl.carry_over`. `carried.moments` is of both optimisers."""
        self.state = carry_over(offline.state, self.agent, carried, seed)
        if carried.actor:
            self.policy.load_state_dict(offline.policy.state_dict())
        if carried.moments and carried.actor:
            self._optimizer.load_state_dict(deepcopy(offline._optimizer.state_dict()))  # else both would share it
            for group in self._optimizer.param_groups:
                group["lr"] = self.config.policy_learning_rate
        if carried.generator:
            self._generator.set_state(offline._generator.get_state())
            self._key = offline._key
