"""ConRFT (arXiv 2502.05450) for any policy with a supervised loss and a differentiable chunk.

    policy loss = bc_weight * supervised_loss - q_weight * Q(s, pi(s))

Both stages run on a `CriticAgent` with one train state. Offline ("Cal-ConRFT") its loss has the Cal-QL term and the
policy only imitates; online ("HIL-ConRFT") it is TD alone, half of each minibatch are demonstrations, to which the
person's interventions are added (`interventions`), and the policy climbs Q held by a little imitation. ConRFT's policy
is a consistency head, one pass from noise to chunk; where backpropagation through a policy's sampler is too dear,
distil `CriticAgent.improve`'s chunks instead, which is the same `supervised_loss` with other targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vla_rl.offpolicy.calql import ConservativeConfig
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.pa_rl import CriticAgentConfig


@dataclass(frozen=True)
class ConRFTStage:
    """`demo_share`: of each minibatch. `critic_updates`: for one step of the policy."""

    critic: CriticAgentConfig
    bc_weight: float
    q_weight: float
    demo_share: float
    critic_updates: int = 2

    def __post_init__(self) -> None:
        if min(self.bc_weight, self.q_weight) < 0.0 or not 0.0 <= self.demo_share <= 1.0 or self.critic_updates < 1:
            raise ValueError(
                "ConRFTStage needs weights of at least 0, demo_share within [0, 1] and critic_updates of at least 1, "
                f"got {self.bc_weight}, {self.q_weight}, {self.demo_share}, {self.critic_updates}"
            )


def conrft_offline() -> ConRFTStage:
    """Cal-ConRFT: two critics, 0.1 times the Cal-QL term without densities, its bound on random chunks too."""
    critic = CriticAgentConfig(
        critic=MLPCriticConfig(num_members=2, hidden_sizes=(256, 256)),
        target_reduction=EnsembleReduction("min", None),
        conservative=ConservativeConfig(alpha=0.1, num_actions=10, form="logsumexp", bound_random_actions=True),
    )
    return ConRFTStage(critic, bc_weight=1.0, q_weight=0.0, demo_share=1.0)


def conrft_online() -> ConRFTStage:
    """HIL-ConRFT: the same critics, TD only; the policy follows Q with a tenth of imitation."""
    critic = replace(conrft_offline().critic, conservative=None)
    return ConRFTStage(critic, bc_weight=0.1, q_weight=1.0, demo_share=0.5)


def conrft_policy_loss(stage: ConRFTStage, supervised_loss: Tensor, actions: Tensor, action_gradient: Tensor) -> Tensor:
    """Per-sample loss [B] whose gradient is that of bc_weight * supervised_loss - q_weight * Q(s, pi(s)).

    `supervised_loss` [B]; `actions` [B, H, A], normalised, with the policy's graph; `action_gradient` [B, H, A], dQ/da
    at those actions from `CriticAgent.action_gradient`. Only the gradient is meant, the value is not that of Q.
    """
    towards_q = (actions * action_gradient.detach()).sum(dim=(1, 2))
    return stage.bc_weight * supervised_loss - stage.q_weight * towards_q


__all__ = ["ConRFTStage", "conrft_offline", "conrft_online", "conrft_policy_loss"]
