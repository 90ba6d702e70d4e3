"""A learned process reward: how far the episode has come, as a dense reward beside a sparse one.

A small head on the policy's features predicts progress towards success. Its labels need nobody: in a demonstration
the gripper's opening and closing divide the way into segments (after VLA-RL, arXiv 2505.18719), an episode of the
policy's own that succeeded came evenly along, and one that failed nowhere. Fitted to both, it says how far such states
come in the mean.

It enters as the difference of a potential P (Ng, Harada and Russell, ICML 1999),

    F = coef * (gamma^k P(s') - P(s)),   P = 0 after a termination

whose discounted sum over an episode is -coef * P of its first state whatever was done in between, so the best policy
stays the best. A reward for progress itself would rather be collected than finished. The price: episodes that all fail
have returned the same, so it shares credit out sooner and cannot teach a task that never succeeds. On the two-way reach
(60 demonstrations, 3 seeds, 25 to 60 updates) PPO learned as fast with it as without: try it where the critic is what
is slow, and compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vla_rl.onpolicy.critic import Critic
from vla_rl.rollout.collector import RolloutBatch
from vla_rl.train.distributed import num_learners
from vla_rl.train.divergence import require_finite


@dataclass(frozen=True)
class ProcessRewardConfig:
    """`coef`: potential of a finished task, in units of reward. `buffer_size`: decisions of finished episodes that are
    kept to learn from, the latest; with demonstrations every minibatch is one half of them."""

    coef: float = 1.0
    hidden: tuple[int, ...] = (128, 128)
    learning_rate: float = 1e-3
    num_updates: int = 32
    minibatch_size: int = 256
    buffer_size: int = 16384

    def __post_init__(self) -> None:
        if min(self.num_updates, self.minibatch_size, self.buffer_size) < 1 or self.learning_rate <= 0.0:
            raise ValueError(f"num_updates, minibatch_size, buffer_size and learning_rate must be positive: {self}")
        if self.coef <= 0.0:
            raise ValueError(f"coef is {self.coef}, expected > 0 (no process reward: process_reward=None)")


@dataclass(frozen=True)
class ProgressLabels:
    """`features`: float32 [M, F]. `progress`: float32 [M] in [0, 1]."""

    features: Tensor
    progress: Tensor

    def __len__(self) -> int:
        return len(self.progress)

    def select(self, rows: Tensor) -> ProgressLabels:
        return ProgressLabels(self.features[rows], self.progress[rows])

    @staticmethod
    def concatenate(parts: Sequence[ProgressLabels]) -> ProgressLabels:
        return ProgressLabels(torch.cat([p.features for p in parts]), torch.cat([p.progress for p in parts]))


def gripper_milestones(gripper: Tensor) -> list[int]:
    """The steps at which a gripper's command [T] has changed sides: passed the far quarter of its range.

    A command that goes back before it got there, or that never moves, is no milestone.
    """
    low, high = float(gripper.min()), float(gripper.max())
    if high - low < 1e-3:
        return []
    share = ((gripper - low) / (high - low)).tolist()
    side, found = share[0] > 0.5, []
    for t, value in enumerate(share):
        if (value >= 0.75 and not side) or (value <= 0.25 and side):
            side = not side
            found.append(t)
    return [t for t in found if t > 0]


def segment_progress(num_steps: int, milestones: Sequence[int] = ()) -> Tensor:
    """Progress [T] before each step of an episode that succeeds: j / m at the beginning of the j-th of its m segments,
    linear in between. `milestones`: ascending steps in 1..T-1 at which segments begin."""
    bounds = [0, *milestones, num_steps]
    if any(later <= earlier for earlier, later in pairwise(bounds)):
        raise ValueError(f"milestones {list(milestones)} must be ascending and lie in 1..{num_steps - 1}")
    number = len(bounds) - 1
    parts = [
        (j + torch.arange(stop - start) / (stop - start)) / number for j, (start, stop) in enumerate(pairwise(bounds))
    ]
    return torch.cat(parts)


class ProcessReward:
    """Owns the potential and its optimiser; learns from demonstrations, if given, and from rollouts as they end."""

    def __init__(
        self,
        feature_dim: int,
        config: ProcessRewardConfig,
        device: torch.device | str = "cpu",
        demos: ProgressLabels | None = None,
    ) -> None:
        if num_learners() > 1:
            raise ValueError("process_reward is for one learner; start this run without torchrun")
        self.config, self._demos = config, demos
        self.head = Critic(feature_dim, config.hidden).to(device)
        self._optimizer = torch.optim.Adam(self.head.parameters(), lr=config.learning_rate)
        empty = torch.zeros(0, feature_dim, device=device), torch.zeros(0, device=device)
        self._rollouts = ProgressLabels(*empty)
        self._running: list[Tensor] = []  # features of each environment's episode that goes on
        self._succeeded = torch.zeros(0, dtype=torch.bool, device=device)

    @property
    def has_labels(self) -> bool:
        """Before there are any the potential is 0."""
        return bool(len(self._rollouts) or self._demos)

    @torch.no_grad()
    def potential(self, features: Tensor) -> Tensor:
        """Expected progress [M], in [0, 1], from features [M, F]."""
        return torch.sigmoid(self.head(features)) if self.has_labels else features.new_zeros(len(features))

    @torch.no_grad()
    def shaping(self, batch: RolloutBatch, discounts: Tensor) -> Tensor:
        """The reward F of each decision, [T, N]. `discounts` [T, N]: gamma^k, 0 at a termination."""
        potentials = self.potential(torch.cat([batch.features, batch.bootstrap_features]))
        t, n = batch.valid.shape
        here, ends = potentials[: t * n].unflatten(0, (t, n)), potentials[t * n :]
        return self.config.coef * (discounts * batch.next_values(here, ends) - here)

    def update(self, batch: RolloutBatch, generator: torch.Generator) -> dict[str, float]:
        """Label the episodes that ended in `batch`, which follows on the last one given, and fit the potential."""
        self._label(batch)
        if not self.has_labels:
            return {}
        return {"progress_loss": self.fit(generator), "num_progress_labels": float(len(self._rollouts))}

    def fit(self, generator: torch.Generator) -> float:
        """`num_updates` steps of cross-entropy to the labels; its mean."""
        sources = [source for source in (self._demos, self._rollouts) if source is not None and len(source)]
        size = -(-self.config.minibatch_size // len(sources))
        total = 0.0
        for _ in range(self.config.num_updates):
            parts = []
            for source in sources:
                rows = torch.randint(len(source), (size,), generator=generator, device=generator.device)
                parts.append(source.select(rows.to(source.progress.device)))
            labels = ProgressLabels.concatenate(parts)
            loss = nn.functional.binary_cross_entropy_with_logits(self.head(labels.features), labels.progress)
            require_finite("the process reward's loss", loss, {"features": labels.features})
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            total += float(loss.detach())
        return total / self.config.num_updates

    def _label(self, batch: RolloutBatch) -> None:
        t, n = batch.valid.shape
        features = batch.features.unflatten(0, (t, n))
        if len(self._running) != n:
            self._running = [features.new_zeros(0, features.shape[2]) for _ in range(n)]
            self._succeeded = batch.success.new_zeros(n)
        found = [self._rollouts]
        for i in range(n):
            start = 0
            for end in [*batch.ended[:, i].nonzero().flatten().tolist(), None]:
                rows = slice(start, None if end is None else end + 1)
                seen = features[rows, i][batch.valid[rows, i]]
                self._running[i] = torch.cat([self._running[i], seen])
                self._succeeded[i] |= batch.success[rows, i].any()
                if end is None:
                    break
                if len(self._running[i]):
                    progress = segment_progress(len(self._running[i])).to(seen) * self._succeeded[i]
                    found.append(ProgressLabels(self._running[i], progress))
                self._running[i], self._succeeded[i], start = seen[:0], False, end + 1
        every = ProgressLabels.concatenate(found)
        self._rollouts = ProgressLabels(*(x[-self.config.buffer_size :] for x in (every.features, every.progress)))

    def state_dict(self) -> dict[str, Any]:
        return {
            "head": self.head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "features": self._rollouts.features,
            "progress": self._rollouts.progress,
            "running": list(self._running),
            "succeeded": self._succeeded.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        device = self._rollouts.progress.device
        self._rollouts = ProgressLabels(state["features"].to(device), state["progress"].to(device))
        self._running = [x.to(device) for x in state["running"]]
        self._succeeded = state["succeeded"].to(device).clone()


__all__ = [
    "ProcessReward",
    "ProcessRewardConfig",
    "ProgressLabels",
    "gripper_milestones",
    "segment_progress",
]
