"""RLPD (arXiv 2302.02948): SAC from nothing, with the prior data in every minibatch.

It is SAC with the settings below, nothing else: a minibatch is half prior and half online rows, interleaved
(`vla_rl.data.replay_mixing`), and an environment step has UTD_RATIO critic updates, each on its own minibatch. On
chunks it is RLPD-AC, and with the data's log-likelihood in the actor's loss QC-RLPD (both arXiv 2507.07969).
"""

from __future__ import annotations

from dataclasses import replace

from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.networks import ActorNetConfig
from vla_rl.offpolicy.sac import SACConfig

UTD_RATIO = 20
BATCH_SIZE = 256  # of each of the UTD_RATIO minibatches
OFFLINE_SHARE = 0.5
NUM_RANDOM_STEPS = 5000  # environment steps with uniform actions before the first update


def rlpd_config(
    hidden_sizes: tuple[int, ...] = (256, 256, 256),
    num_members: int = 10,
    target_subset: int = 2,
    backup_entropy: bool = False,
    bc_weight: float = 0.0,
) -> SACConfig:
    """Defaults are those of the published commands; antmaze has `target_subset` 1.

    Ten critics with LayerNorm, an actor without, the least of two critics drawn without replacement in the target and
    the mean of all in the actor's loss, target entropy -H * A / 2, and one actor step on the last minibatch.
    """
    return SACConfig(
        actor=ActorNetConfig(hidden_sizes, layer_norm=False, out_scale=1.0),
        critic=MLPCriticConfig(num_members, hidden_sizes, layer_norm=True),
        actor_learning_rate=3e-4,
        critic_learning_rate=3e-4,
        temperature_learning_rate=3e-4,
        target_reduction=EnsembleReduction("min", target_subset, with_replacement=False),
        actor_reduction=EnsembleReduction("mean", None),
        backup_entropy=backup_entropy,
        initial_temperature=1.0,
        target_entropy_per_dim=0.5,
        entropy_on_next_obs=False,
        bc_weight=bc_weight,
        actor_batch="last",
    )


def qc_rlpd_config(hidden_sizes: tuple[int, ...] = (512, 512, 512, 512)) -> SACConfig:
    """QC-RLPD: RLPD on chunks with 0.01 times the log-likelihood of the data's chunks, executed steps only; critics as
    in Q-chunking. It has one update an environment step."""
    config = rlpd_config(hidden_sizes, bc_weight=0.01)
    return replace(config, critic=MLPCriticConfig(10, hidden_sizes, layer_norm=True, activation="gelu"))


__all__ = ["BATCH_SIZE", "NUM_RANDOM_STEPS", "OFFLINE_SHARE", "UTD_RATIO", "qc_rlpd_config", "rlpd_config"]
