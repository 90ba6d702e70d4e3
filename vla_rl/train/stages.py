"""The stages of a recipe, each a function from folders to folders; every one goes on where a killed one stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vla_rl.core import EnvSpec
from vla_rl.data.chunks import ChunkDataset
from vla_rl.data.demos import DemoSummary, collect_demos
from vla_rl.data.lerobot_format import DatasetError, atomic_write_json, read_json
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.data.normalization import Normalizer
from vla_rl.envs.config import AnyEnvConfig, EnvConfig, demo_env
from vla_rl.envs.experts import AnyExpertConfig, make_expert
from vla_rl.envs.gym import FunctionExpertConfig
from vla_rl.envs.task_mix import make_task_mix
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.evaluation.harness import HarnessConfig, run_suite
from vla_rl.evaluation.policies import Expert, ReadyPolicy, StoredPolicy
from vla_rl.evaluation.result import EvalResult
from vla_rl.evaluation.stopping import StopRule
from vla_rl.evaluation.suite import Suite, SuiteCase, protocol_of
from vla_rl.onpolicy.ppo import PPOConfig
from vla_rl.policies.adaptation import apply_adaptation
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints.adapt import adapt
from vla_rl.policies.checkpoints.config_json import config_to_dict
from vla_rl.policies.checkpoints.load_any import layout_of, load_any
from vla_rl.policies.checkpoints.native import read_description, save_policy
from vla_rl.train.check import check_policy, device_of
from vla_rl.train.checkpoint import changed_options
from vla_rl.train.demo_source import DatasetDemos
from vla_rl.train.loop import TrainConfig, TrainResult, run_training
from vla_rl.train.offpolicy import OffPolicyConfig
from vla_rl.train.offpolicy_stages import build_learner, reinforce_from_replay
from vla_rl.train.progress_demos import label_demos
from vla_rl.train.recipe import EvalConfig, Recipe
from vla_rl.train.sft import DatasetSampler, SFTResult, run_sft

RECIPE_SUITE = "recipe"  # what results call the episodes of a recipe's evaluation
_CURVE_EPISODES = 64
_CURVE_FIRST_SEED = 10**9  # the curve's episodes are none of the final evaluation's


def record_demos(recipe: Recipe, path: Path) -> DemoSummary:
    """Demonstrations of the scripted expert as a LeRobot dataset; `meta/recipe.json` says of what kind.

    Raises DatasetError where `path` holds demonstrations of another kind: they would mix.
    """
    config = recipe.demos
    _check_same_demos(recipe, path)
    env = demo_env(recipe.env).make(config.num_envs, split="train")
    first = config.seed * 10**6
    seeds = range(first, first + (config.num_episodes if config.keep == "all" else 10 * config.num_episodes))
    try:
        expert = make_expert(env, config.expert)
        return collect_demos(env, expert, path, config.num_episodes, seeds, keep=config.keep)
    finally:
        env.close()


def _check_same_demos(recipe: Recipe, path: Path) -> None:
    kind = {"env": demo_env(recipe.env), "demos": recipe.demos}
    may_change = {"num_threads", "num_workers", "engine", "device", "num_episodes", "num_envs"}
    file = path / "meta" / "recipe.json"
    if file.exists():
        stored = read_json(file)
        changed = [
            f"{part}.{name}"
            for part, config in kind.items()
            for name in changed_options(stored.get(part, {}), config)
            if name not in may_change
        ]
        if changed:
            raise DatasetError(f"{path} holds demonstrations with another {', '.join(changed)}; choose another folder")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(file, {part: config_to_dict(config) for part, config in kind.items()})


def fine_tune(
    recipe: Recipe,
    dataset_path: Path,
    run_dir: Path,
    *,
    resume: bool,
    initial: Path | None = None,
    shard: bool = False,
) -> SFTResult:
    """A new policy, or the one of the folder `initial`, fitted to the dataset.

    A policy that was trained here keeps its normalisation. A public checkpoint, or one that was converted from it, is
    moved to this environment and takes the dataset's. `shard`: several learners divide its layers.
    """
    env = recipe.env.make(1, split="train")
    spec = env.spec
    env.close()
    dataset = LeRobotDataset(dataset_path)
    if not dataset.num_episodes:
        raise DatasetError(f"{dataset_path}: no episode to learn from; record demonstrations first")
    policy: Any
    ours = initial is not None and layout_of(initial) == "native" and read_description(initial)["spec"] is not None
    if initial is None:
        policy = build_policy(recipe.policy, spec, seed=recipe.sft.seed, device=device_of(recipe))
    elif ours:
        policy = load_for(recipe, initial, spec)
    else:
        policy = adapt(load_any(initial, device=device_of(recipe), cameras=tuple(spec.cameras)), spec)
    if not ours:
        policy.set_normalization(
            Normalizer.from_stats(dataset.stats["observation.state"], recipe.state_normalization),
            Normalizer.from_stats(dataset.stats["action"], recipe.action_normalization),
        )
    apply_adaptation(policy, recipe.adaptation, seed=recipe.sft.seed)
    cameras = tuple(getattr(policy.config, "cameras", ()))
    chunks = ChunkDataset(dataset, policy.action_horizon, cameras=cameras)
    sampler = DatasetSampler(chunks, recipe.sft.batch_size, recipe.sft.seed)
    return run_sft(policy, sampler, recipe.sft, run_dir, resume=resume, spec=spec, shard=shard)


def load_for(recipe: Recipe, folder: Path, spec: EnvSpec, *, check: bool = False) -> Any:
    """The policy of `folder`, of ours or of a public layout, for the environment of `spec`, whose cameras fill a public
    checkpoint's picture slots in order. `check`: that it can do what the recipe's training asks of it."""
    policy = load_any(folder, device=device_of(recipe), spec=spec, cameras=tuple(spec.cameras))
    if check:
        check_policy(recipe, policy, spec)
    return policy


def save_untrained(recipe: Recipe, dataset_path: Path, folder: Path) -> None:
    """The agent that a recipe without fine-tuning starts from, as a policy: the baseline of its report."""
    assert isinstance(recipe.train, OffPolicyConfig)
    env = recipe.env.make(1, split="train")
    env.close()
    dataset = LeRobotDataset(dataset_path)
    learner = build_learner(recipe.train.agent, env.spec, recipe.train.horizon, policy=None, dataset=dataset, seed=0)
    save_policy(learner.policy, folder, spec=env.spec)


def reinforce(
    recipe: Recipe,
    policy_folder: Path | None,
    run_dir: Path,
    *,
    resume: bool,
    dataset_path: Path | None = None,
    shard: bool = False,
) -> TrainResult:
    """Reinforcement learning of a stored policy, or of an agent of its own (`policy_folder` None).

    `dataset_path`: for learning from replay, and for a behaviour-cloning term. `shard`: several learners divide the
    policy's layers. Raises ValueError where something is missing.
    """
    if recipe.fine_tunes and policy_folder is None:
        raise ValueError("this recipe improves a fine-tuned policy; give it with --policy")
    if policy_folder is not None and not recipe.fine_tunes:
        raise ValueError("this recipe trains an agent of its own; leave --policy out")
    if not isinstance(recipe.train, OffPolicyConfig):
        assert policy_folder is not None
        return _reinforce_on_policy(recipe, recipe.train, policy_folder, run_dir, resume, dataset_path, shard)

    env_config = _env_of_worker(recipe)

    def make_env(num_envs: int) -> ChunkedEnv:
        return env_config.make(num_envs, split="train", auto_reset=True, final_images=True)

    return reinforce_from_replay(
        recipe.train,
        make_env,
        run_dir,
        rollout=recipe.rollout,
        policy=None if policy_folder is None else lambda spec: load_for(recipe, policy_folder, spec, check=True),
        dataset_path=dataset_path,
        resume=resume,
        evaluate=lambda policy: _curve_metrics(recipe, policy),
    )


def _env_of_worker(recipe: Recipe) -> AnyEnvConfig:
    """The environment, with no more threads than a worker has cores."""
    rollout, config = recipe.rollout, recipe.env
    if rollout.workers and isinstance(config, EnvConfig) and config.num_threads is None:
        return replace(config, num_threads=max(1, int(rollout.cpus_per_worker)))
    return config


def _reinforce_on_policy(
    recipe: Recipe,
    config: TrainConfig,
    policy_folder: Path,
    run_dir: Path,
    resume: bool,
    dataset_path: Path | None,
    shard: bool,
) -> TrainResult:
    env_config = _env_of_worker(recipe)

    def make_env(num_envs: int) -> ChunkedEnv:
        def make_task(task: str | None = None) -> ChunkedEnv:
            return env_config.make(num_envs, split="train", auto_reset=True, final_images=True, task=task)

        return make_task() if config.curriculum is None else make_task_mix(make_task, config.curriculum)

    one = recipe.env.make(1, split="train")
    one.close()
    policy = load_for(recipe, policy_folder, one.spec, check=True)
    _adapt(policy, recipe, config)
    demos = None
    if config.algorithm.actor.bc_coef > 0.0:
        if dataset_path is None:
            raise ValueError("bc_coef > 0 needs demonstrations; give --dataset")
        cameras = tuple(getattr(policy.config, "cameras", ()))
        chunks = ChunkDataset(LeRobotDataset(dataset_path), policy.action_horizon, cameras=cameras)
        demos = DatasetDemos(chunks, policy, config.algorithm.seed)
    progress_demos = None
    if isinstance(config.algorithm, PPOConfig) and config.algorithm.process_reward and dataset_path is not None:
        progress_demos = label_demos(LeRobotDataset(dataset_path), policy, stride=config.execution_horizon)
    return run_training(
        policy,
        make_env,
        config,
        run_dir,
        resume=resume,
        evaluate=lambda: _curve_metrics(recipe, policy),
        demos=demos,
        rollout=recipe.rollout,
        progress_demos=progress_demos,
        shard=shard,
    )


def _adapt(policy: Any, recipe: Recipe, config: TrainConfig) -> None:
    if recipe.adaptation.is_off:
        return
    adaptation = recipe.adaptation
    if config.freeze_encoder:
        policy.freeze_encoder()  # before, so that all of it may be of lower precision
        adaptation = adaptation.of_frozen_encoder()
    apply_adaptation(policy, adaptation, seed=config.algorithm.seed)


def _curve_metrics(recipe: Recipe, policy: Any) -> dict[str, float]:
    """The deployed policy's success on a few held-out episodes, for the learning curve."""
    config = replace(recipe.evaluation, num_episodes=_CURVE_EPISODES, first_seed=_CURVE_FIRST_SEED, num_videos=0)
    rate = evaluate_policy(recipe, policy, config, progress=False).success_once
    return {"eval/success_rate": rate.rate, "eval/success_rate_low": rate.low, "eval/success_rate_high": rate.high}


def suite_of(recipe: Recipe, config: EvalConfig) -> Suite:
    """The episodes of a recipe's evaluation, as a suite."""
    cases = tuple(
        SuiteCase(
            task=task,
            env=recipe.env,
            split=config.split,
            num_episodes=config.num_episodes,
            first_seed=config.first_seed,
        )
        for task in config.tasks or (recipe.env.task,)
    )
    return Suite(RECIPE_SUITE, version=1, cases=cases, protocol=protocol_of(recipe.env, config.split))


def recipe_of(suite: Suite, execution_horizon: int | None) -> Recipe:
    """A recipe whose evaluation has the episodes of a suite of one case, for who asks for a recipe."""
    (case,) = suite.cases
    evaluation = EvalConfig(num_episodes=case.num_episodes, split=case.split, first_seed=case.first_seed)
    recipe = Recipe(env=case.env, evaluation=evaluation)
    if execution_horizon is None:
        return recipe
    return replace(recipe, train=replace(recipe.train, execution_horizon=execution_horizon))


def harness_config(
    recipe: Recipe, config: EvalConfig, *, workers: int = 1, stop: StopRule | None = None
) -> HarnessConfig:
    """How a recipe's evaluation is run."""
    return HarnessConfig(
        num_envs=config.num_envs,
        workers=workers,
        execution_horizon=recipe.train.execution_horizon,
        policy_batch_size=config.policy_batch_size,
        noise_seed=config.noise_seed,
        num_videos=config.num_videos,
        video_speed=config.video_speed,
        stop=stop,
    )


def evaluate_policy(
    recipe: Recipe, policy: Any, config: EvalConfig, *, progress: bool = True, label: str = ""
) -> EvalResult:
    """A policy that is here already, on all tasks of `config`; nothing is written."""
    suite = suite_of(recipe, config)
    return run_suite(suite, ReadyPolicy(policy, label), None, harness_config(recipe, config), progress=progress)


def evaluate_expert(recipe: Recipe, config: EvalConfig, out: Path) -> EvalResult:
    """The scripted expert at its best on the same episodes: the upper end of a report."""
    actor, harness = Expert(best_of(recipe.demos.expert)), harness_config(recipe, replace(config, num_videos=0))
    return run_suite(suite_of(recipe, config), actor, out, harness, resume=True)


def best_of(expert: AnyExpertConfig) -> AnyExpertConfig:
    """The same expert without the clumsiness of demonstrations."""
    return replace(expert, action_noise=0.0) if isinstance(expert, FunctionExpertConfig) else type(expert)()


def evaluate_stage(recipe: Recipe, policy_folder: Path, out: Path, *, label: str) -> EvalResult:
    """Evaluate a stored policy; result and videos lie in `out`, and an evaluation that was killed there goes on."""
    actor = StoredPolicy(policy_folder, str(device_of(recipe)), label)
    config = recipe.evaluation
    return run_suite(suite_of(recipe, config), actor, out, harness_config(recipe, config), resume=True)


__all__ = [
    "best_of", "evaluate_expert", "evaluate_policy", "evaluate_stage", "fine_tune", "harness_config", "load_for",
    "recipe_of", "record_demos", "reinforce", "save_untrained", "suite_of",
]  # fmt: skip
