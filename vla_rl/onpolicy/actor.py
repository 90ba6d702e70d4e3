"""The clipped policy update that PPO, GRPO, DPPO and FPO share: minibatch epochs over scored traces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vla_rl.flow.likelihood import LogProb, chain_kl, k3_divergence
from vla_rl.flow.sampler import ChunkSampler
from vla_rl.protocols import HasSupervisedLoss, PolicyInputs, Prefix, require, trainable_parameters
from vla_rl.rollout.collector import RolloutBatch
from vla_rl.train.distributed import average_gradients, mean_over_learners, num_minibatches
from vla_rl.train.divergence import require_finite
from vla_rl.train.ema import Ema
from vla_rl.train.sharding import (
    clip_gradients,
    load_optimizer_state,
    load_whole,
    loss_share,
    optimizer_groups,
    optimizer_state,
    whole_layers,
)

DemoSource = Callable[[int], tuple[PolicyInputs, Tensor, Tensor]]
"""Batch size -> inputs, normalised actions [M, H, A], mask bool [M, H]."""


@dataclass(frozen=True)
class ActorConfig:
    """`learning_rate_decay`: factor from one update to the next (1: none). What is noise in the gradient moves a policy
    too; with `reference_kl_coef` a falling rate lets it come back from where noise alone has led it.
    `clip`: bound on |ratio - 1|. `clip_high`: another bound above (None: `clip`); a wider one lets what is improbable
    rise (0.28 over 0.2 in DAPO, arXiv 2503.14476, and SimpleVLA-RL). `dual_clip`: for a negative advantage the
    objective never falls below dual_clip * advantage (None: off). `target_kl`: stop the update where the k3 estimate of
    the joint KL of a minibatch exceeds it (None: never). `entropy_coef`: only where the exploration is learned.
    `reference_kl_coef`: KL to the policy as it was at the start. `bc_coef`: supervised loss on demonstrations.
    `recompute_log_probs`: score the traces once more before the update; needed where rollouts run in another precision.
    """

    learning_rate: float = 1e-4
    learning_rate_decay: float = 1.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    num_epochs: int = 4
    minibatch_size: int = 512
    max_grad_norm: float = 1.0
    clip: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    target_kl: float | None = 0.05
    entropy_coef: float = 0.0
    reference_kl_coef: float = 0.0
    bc_coef: float = 0.0
    recompute_log_probs: bool = False

    def __post_init__(self) -> None:
        if self.clip <= 0.0:
            raise ValueError(f"clip is {self.clip}, expected > 0")
        if self.clip_high is not None and self.clip_high <= 0.0:
            raise ValueError(f"clip_high is {self.clip_high}, expected > 0 (None: clip)")
        if self.dual_clip is not None and self.dual_clip <= 1.0:
            raise ValueError(f"dual_clip is {self.dual_clip}, expected > 1 (3 is customary)")
        if self.num_epochs < 1 or self.minibatch_size < 1:
            raise ValueError("num_epochs and minibatch_size must be at least 1")
        if self.target_kl is not None and self.target_kl <= 0.0:
            raise ValueError(f"target_kl is {self.target_kl}, expected > 0 (None: never stop)")
        if self.max_grad_norm <= 0.0 or self.learning_rate <= 0.0:
            raise ValueError("max_grad_norm and learning_rate must be positive")
        if not 0.0 < self.learning_rate_decay <= 1.0:
            raise ValueError(
                f"learning_rate_decay is {self.learning_rate_decay}, expected 0 < learning_rate_decay <= 1"
            )
        for name in ("entropy_coef", "reference_kl_coef", "bc_coef"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected >= 0")


class StepWeighting(Protocol):
    """What a loss may do differently at each denoising step; see `dppo.py`."""

    def advantage_weight(self, step: Tensor) -> Tensor:
        """Factor of the advantage at denoising step `step` (int64 [M, E])."""
        ...

    def clip(self, step: Tensor, clip: float) -> Tensor | float:
        """The ratio's clip at that step."""
        ...


@dataclass(frozen=True)
class ActorData:
    """M samples of an update. `prefix` is None where the encoder learns, and then `inputs` is encoded each time."""

    prefix: Prefix | None
    inputs: PolicyInputs | None
    trace: Any
    advantages: Tensor

    @staticmethod
    def from_rollout(batch: RolloutBatch, advantages: Tensor, valid: Tensor | None = None) -> ActorData:
        """The valid decisions of a rollout with their `advantages` [T, N]."""
        valid = batch.valid if valid is None else valid
        flat = advantages.flatten()
        if bool(valid.all()):
            return ActorData(batch.prefix, batch.inputs, batch.trace, flat)
        rows = valid.flatten().nonzero().flatten()
        prefix = None if batch.prefix is None else batch.prefix.select(rows)
        inputs = None if batch.inputs is None else batch.inputs.select(rows)
        return ActorData(prefix, inputs, batch.trace.select(rows), flat[rows])

    @staticmethod
    def concatenate(parts: Sequence[ActorData]) -> ActorData:
        prefixes = [p.prefix for p in parts if p.prefix is not None]
        inputs = [p.inputs for p in parts if p.inputs is not None]
        return ActorData(
            Prefix.concatenate(prefixes) if prefixes else None,
            PolicyInputs.concatenate(inputs) if inputs else None,
            type(parts[0].trace).concatenate([p.trace for p in parts]),
            torch.cat([p.advantages for p in parts]),
        )

    def __len__(self) -> int:
        return self.advantages.shape[0]


@dataclass(frozen=True)
class _FixedScores:
    """`old_values` [M, E], `old_joint` [M]: of the behaviour policy. `reference`: the reference policy's, if in use."""

    old_values: Tensor
    old_joint: Tensor
    reference: LogProb | None


def clipped_loss(
    ratio: Tensor,
    advantages: Tensor,
    clip: Tensor | float,
    dual_clip: float | None,
    clip_high: Tensor | float | None = None,
) -> Tensor:
    """Negative PPO objective (arXiv 1707.06347, Eq 7; dual clip arXiv 1912.09729, Eq 5), elementwise.

    The ratio is clipped to [1 - clip, 1 + clip_high].
    """
    low = torch.as_tensor(clip, dtype=ratio.dtype, device=ratio.device)
    high = low if clip_high is None else torch.as_tensor(clip_high, dtype=ratio.dtype, device=ratio.device)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1.0 - low, 1.0 + high) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0.0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective


class ActorUpdate:
    """Owns the policy's optimiser (and the noise head's), and changes the policy in place.

    Raises TypeError or ValueError where an option cannot have its effect.
    """

    def __init__(
        self,
        sampler: ChunkSampler,
        config: ActorConfig,
        *,
        demos: DemoSource | None = None,
        step_weighting: StepWeighting | None = None,
    ) -> None:
        if (demos is not None) != (config.bc_coef > 0.0):
            raise ValueError("bc_coef > 0 and a source of demonstrations belong together: give both or neither")
        if demos is not None:
            require(sampler.policy, HasSupervisedLoss, by="the behaviour cloning term (bc_coef)")
        if config.reference_kl_coef > 0.0 and not sampler.has_transitions:
            raise ValueError(
                f"reference_kl_coef has no effect with {type(sampler).__name__}: it has no density. Set it to 0"
            )
        if config.entropy_coef > 0.0 and not sampler.has_entropy:
            raise ValueError("entropy_coef has no effect: this sampler's standard deviation is fixed. Set it to 0")
        self.sampler, self.config = sampler, config
        self.noise_head: nn.Module | None = getattr(sampler, "noise_head", None)
        self._demos, self._weighting = demos, step_weighting
        parameters = trainable_parameters(sampler.policy)
        if self.noise_head is not None:
            parameters = parameters + list(self.noise_head.parameters())
        if not parameters:
            raise ValueError("the policy has no trainable parameters")
        self._parameters = parameters
        self._optimizer = torch.optim.AdamW(
            optimizer_groups(parameters),
            lr=config.learning_rate,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        # the parameters of the start: an average that is never updated
        self._reference = Ema(parameters, 0.0) if config.reference_kl_coef > 0.0 else None

    def update(self, data: ActorData, generator: torch.Generator) -> dict[str, float]:
        """Minibatch epochs of the clipped objective. Metrics are means over minibatches unless their name says else."""
        config, policy = self.config, self.sampler.policy
        policy.eval()  # dropout would make the ratio noisy
        fixed = self._fixed_scores(data)
        splits = num_minibatches(len(data), config.minibatch_size)
        sums: dict[str, float] = {}
        count, first, stopped = 0, {}, False
        for _ in range(config.num_epochs):
            order = torch.randperm(len(data), generator=generator, device=generator.device).to(data.advantages.device)
            for rows in order.tensor_split(splits):
                loss, metrics, minibatch = self._loss(data, rows, fixed, generator)
                first = first or {"ratio_error_first": metrics["ratio_error"], "joint_kl_first": metrics["joint_kl"]}
                stopped = config.target_kl is not None and metrics["joint_kl"] > config.target_kl
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
                sums["joint_kl_max"] = max(sums.get("joint_kl_max", 0.0), metrics["joint_kl"])
                count += 1
                if stopped:
                    break
                sums["actor_grad_norm"] = sums.get("actor_grad_norm", 0.0) + self._step(loss, minibatch)
            if stopped:
                break
        learning_rate = self._optimizer.param_groups[0]["lr"]
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * config.learning_rate_decay
        highest, grad_norms = sums.pop("joint_kl_max", 0.0), sums.pop("actor_grad_norm", 0.0)
        means = {name: value / count for name, value in sums.items()}
        means["actor_grad_norm"] = grad_norms / max(1, count - stopped)
        return (
            means
            | first
            | {
                "joint_kl_max": highest,
                "joint_clip": self.sampler.joint_clip(config.clip),
                "learning_rate": learning_rate,
                "actor_steps": float(count - stopped),
                "kl_stopped": float(stopped),
            }
        )

    def _fixed_scores(self, data: ActorData) -> _FixedScores:
        """What stays as it is through the epochs. The behaviour policy's scores are those of the drawing, or computed
        again in the update's precision."""
        reference = None
        if self._reference is not None:
            with self._reference.applied():
                reference = self._score_all(data, distributions=True)
        if not self.config.recompute_log_probs:
            return _FixedScores(data.trace.values, data.trace.log_prob, reference)
        score = self._score_all(data, distributions=False)
        return _FixedScores(score.values, score.joint, reference)

    @torch.no_grad()
    def _score_all(self, data: ActorData, *, distributions: bool) -> LogProb:
        """`distributions`: of tokens, which are large; only the reference's are read again."""
        every = torch.arange(len(data), device=data.advantages.device)
        parts: list[LogProb] = []
        with whole_layers(self.sampler.policy):  # learners have different numbers of rows here
            for rows in every.split(self.config.minibatch_size):
                score = self.sampler.score(self._prefix(data, rows), data.trace.select(rows))
                parts.append(score if distributions else replace(score, token_log_probs=None))
        return LogProb.concatenate(parts)

    def _prefix(self, data: ActorData, rows: Tensor) -> Prefix:
        if data.prefix is not None:
            return data.prefix.select(rows)
        if data.inputs is None:
            raise ValueError("an update needs a cached prefix, or inputs to encode")
        return self.sampler.policy.encode(data.inputs.select(rows))

    def _loss(
        self, data: ActorData, rows: Tensor, fixed: _FixedScores, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
        config, old_joint = self.config, fixed.old_joint[rows]
        trace = data.trace.select(rows)
        score = self.sampler.score(self._prefix(data, rows), trace)
        ratio = torch.exp(score.values - fixed.old_values[rows])
        advantages, low, high = data.advantages[rows][:, None], config.clip, config.clip_high or config.clip
        if self._weighting is not None:
            advantages = advantages * self._weighting.advantage_weight(score.step)
            low, high = (self._weighting.clip(score.step, clip) for clip in (low, high))
        loss = clipped_loss(ratio, advantages, low, config.dual_clip, high).mean()
        metrics = {"policy_loss": loss.detach()}
        reference = None if fixed.reference is None else fixed.reference.select(rows)
        loss = loss + self._regularisers(score, reference, metrics, generator)
        with torch.no_grad():
            metrics["ratio_error"] = (ratio - 1.0).abs().max()
            metrics["clip_fraction"] = ((ratio < 1.0 - low) | (ratio > 1.0 + high)).float().mean()
            metrics["joint_kl"] = k3_divergence(score.joint - old_joint).mean()
        minibatch = {"advantages": data.advantages[rows], "old_log_prob": old_joint, "log_prob": score.joint}
        minibatch |= {"rows": rows} | {f"trace.{name}": x for name, x in vars(trace).items() if isinstance(x, Tensor)}
        require_finite("the policy's loss", loss, minibatch)
        means = mean_over_learners({name: float(value) for name, value in metrics.items()}, len(rows))
        return loss, means, minibatch

    def _regularisers(
        self, score: LogProb, reference: LogProb | None, metrics: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        config, total = self.config, torch.zeros((), device=score.joint.device)
        if score.entropy is not None:
            metrics["entropy"] = score.entropy.detach().mean()
            total = total - config.entropy_coef * score.entropy.mean()
        if reference is not None:
            divergence = chain_kl(score, reference).mean()
            metrics["reference_kl"] = divergence.detach()
            total = total + config.reference_kl_coef * divergence
        if self._demos is not None:
            inputs, actions, mask = self._demos(len(score.joint))
            loss = self.sampler.policy.supervised_loss(inputs, actions, mask, generator).mean()
            metrics["bc_loss"] = loss.detach()
            total = total + config.bc_coef * loss
        return total

    def _step(self, loss: Tensor, minibatch: Mapping[str, Tensor]) -> float:
        self._optimizer.zero_grad()
        num_rows = len(minibatch["rows"])
        (loss * loss_share(self._parameters, num_rows)).backward()
        average_gradients(self._parameters, num_rows)
        norm = clip_gradients(self._parameters, self.config.max_grad_norm)
        require_finite("the policy's gradient", norm, minibatch)
        self._optimizer.step()
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        """Of a divided policy divided, too; `whole_state` makes it whole, and `load_state_dict` takes it so."""
        return {
            "policy": self.sampler.policy.state_dict(),
            "noise_head": None if self.noise_head is None else self.noise_head.state_dict(),
            "optimizer": optimizer_state(self._optimizer, self._parameters),
            "reference": None if self._reference is None else self._reference.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_whole(self.sampler.policy, state["policy"])
        if self.noise_head is not None:
            self.noise_head.load_state_dict(state["noise_head"])
        load_optimizer_state(self._optimizer, self._parameters, state["optimizer"])
        if self._reference is not None:
            self._reference.load_state_dict(state["reference"])
