"""A recipe: everything that decides a run, from demonstrations to the evaluation, in one frozen config.

Recipes are made by the functions in `vla_rl.configs`; the command line changes any field.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from vla_rl.data.demos import Keep
from vla_rl.envs.config import AnyEnvConfig, EnvConfig
from vla_rl.envs.experts import AnyExpertConfig
from vla_rl.policies.adaptation import AdaptationConfig
from vla_rl.policies.build import PolicyConfig
from vla_rl.policies.tiny import TinyVLAConfig
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.sim.experts import ExpertConfig
from vla_rl.sim.tasks import SPLITS
from vla_rl.train.loop import TrainConfig
from vla_rl.train.offpolicy import OffPolicyConfig
from vla_rl.train.sft import SFTConfig

Normalization = Literal["mean_std", "quantiles", "min_max", "identity"]


@dataclass(frozen=True)
class DemosConfig:
    """`num_episodes` of the scripted expert in the split "train", `num_envs` at a time. `keep`: "all" or "success".
    `expert`: an `ExpertConfig` on a table, a `WaypointConfig` in a maze, a `FunctionExpertConfig` in a Gymnasium
    environment, a `RemoteExpertConfig` in a simulator of its own process, a `CubeOracleConfig` in OGBench. `seed`:
    chooses the episodes."""

    num_episodes: int = 300
    num_envs: int = 32
    keep: Keep = "success"
    expert: AnyExpertConfig = field(default_factory=ExpertConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_episodes < 1 or self.num_envs < 1:
            raise ValueError(f"DemosConfig: num_episodes and num_envs must be at least 1, got {self}")


@dataclass(frozen=True)
class EvalConfig:
    """Episodes `first_seed`, ..., `first_seed + num_episodes - 1` of `split`, of each of `tasks` (none: the recipe's).

    `num_envs` changes the speed and nothing else. `num_videos` of the episodes are filmed, and shown at
    `video_speed` times real time.
    """

    num_episodes: int = 256
    split: str = "test"
    tasks: tuple[str, ...] = ()
    first_seed: int = 0
    num_envs: int = 64
    policy_batch_size: int = 64
    noise_seed: int = 0
    num_videos: int = 6
    video_speed: float = 0.5

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split!r} is unknown; use one of {', '.join(SPLITS)}")
        for name in ("num_episodes", "num_envs", "policy_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"EvalConfig.{name} is {getattr(self, name)}, expected at least 1")

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.num_episodes)


@dataclass(frozen=True)
class Recipe:
    """`train`: on-policy, or from replay. `rollout`: who collects. `policy`: sizes left at 0 are
    the environment's. `adaptation`: what of the policy is trained, in fine-tuning and on-policy learning; of the latter
    with `train.freeze_encoder`, what concerns the expert. `state_normalization`, `action_normalization`: from the
    statistics of the demonstrations.
    `device`: where policies live; "auto" is a GPU where there is one. `torch_threads`: one is fastest for small
    networks, many times so on busy cores."""

    env: AnyEnvConfig = field(default_factory=EnvConfig)
    demos: DemosConfig = field(default_factory=DemosConfig)
    policy: PolicyConfig = field(default_factory=TinyVLAConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    train: TrainConfig | OffPolicyConfig = field(default_factory=TrainConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    state_normalization: Normalization = "mean_std"
    action_normalization: Normalization = "min_max"
    device: str = "auto"
    torch_threads: int = 1

    @property
    def fine_tunes(self) -> bool:
        """Whether reinforcement learning starts from a fine-tuned policy (else: from an agent of its own)."""
        return not isinstance(self.train, OffPolicyConfig) or self.train.improves_policy

    def with_seed(self, seed: int) -> Recipe:
        """The same with another seed in every stage; the evaluation's episodes stay."""
        return replace(
            self,
            demos=replace(self.demos, seed=seed),
            sft=replace(self.sft, seed=seed),
            train=self.train.with_seed(seed),
        )

    def control(self) -> Recipe:
        """The negative control: the same reinforcement learning on advantages that were shuffled.

        Raises ValueError for reinforcement learning from replay, which has no advantages.
        """
        if isinstance(self.train, OffPolicyConfig):
            raise ValueError("this recipe learns from replay: there are no advantages to shuffle, leave --control out")
        algorithm = replace(self.train.algorithm, shuffle_advantages=True)
        return replace(self, train=replace(self.train, algorithm=algorithm))
