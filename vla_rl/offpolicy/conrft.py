"""ConRFT (arXiv 2502.05450) of a flow policy, as two configurations of `PolicyLearner`.

    policy loss = bc_weight * supervised_loss - q_weight * Q(s, pi(s))

Both stages have one critic and one train state. Offline ("Cal-ConRFT") the critic's loss has the Cal-QL term and the
policy only imitates; online ("HIL-ConRFT") it is TD alone, half of each minibatch are demonstrations
(`OnlineConfig.offline_ratio`), to which a person's interventions are added (`interventions`), and the policy climbs Q
held by a little imitation. ConRFT's policy is a consistency head, one pass from noise to chunk; here the gradient goes
through the few Euler steps of a flow. There are two critic updates for one of the policy (`updates_per_call`).
"""

from __future__ import annotations

from dataclasses import replace

from vla_rl.offpolicy.calql import ConservativeConfig
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.pa_rl import CriticAgentConfig
from vla_rl.offpolicy.policy_learner import PolicyLearnerConfig

CRITIC_UPDATES, DEMO_SHARE = 2, 0.5


def conrft_offline() -> PolicyLearnerConfig:
    """Cal-ConRFT: two critics, 0.1 times the Cal-QL term without densities, its bound on random chunks too."""
    critic = CriticAgentConfig(
        critic=MLPCriticConfig(num_members=2, hidden_sizes=(256, 256)),
        target_reduction=EnsembleReduction("min", None),
        conservative=ConservativeConfig(alpha=0.1, num_actions=10, form="logsumexp", bound_random_actions=True),
    )
    return PolicyLearnerConfig(
        critic=critic, policy_learning_rate=3e-4, policy_batch_size=256, improve_weight=0.0, bc_weight=1.0
    )


def conrft_online(offline: PolicyLearnerConfig | None = None) -> PolicyLearnerConfig:
    """HIL-ConRFT after `offline` (None: `conrft_offline()`): TD only; a tenth of imitation beside Q."""
    offline = conrft_offline() if offline is None else offline
    return replace(offline, critic=replace(offline.critic, conservative=None), bc_weight=0.1, q_weight=1.0)


__all__ = ["CRITIC_UPDATES", "DEMO_SHARE", "conrft_offline", "conrft_online"]
