"""What fine-tuning on a new task costs on the old ones, and how far it moved the policy on the new one.

How much a policy forgets goes with KL(base || policy) on the new task's states, however it was trained (Shenfeld, Pari
and Agrawal 2025, RL's Razor, arXiv 2509.04259); `forgetting_report.py` draws the one against the other.

The divergence is exact for every likelihood that the project trains with. Gaussian and Laplace chunks have a closed
form. For chunks that are made step by step, tokens or the denoising chain of a flow policy, it is the sum over steps of
the closed-form KL of the step's distribution, on chains drawn from the base (the chain rule); only which chains those
are is sampled. A flow policy's is of its stochastic sampler with every step stochastic, so it depends on the sampler's
noise and must be read with it (at half of Flow-SDE's default level a shift of the velocity counts 3.4 times as much);
the deployed ODE has no likelihood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vla_rl.core import Observation
from vla_rl.evaluation.aggregate import hierarchical_bootstrap
from vla_rl.evaluation.compare import PairedRates, compare
from vla_rl.evaluation.evaluate import policy_noise
from vla_rl.evaluation.result import EvalResult
from vla_rl.evaluation.statistics import Rate, wilson
from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.flow.likelihood import chain_kl
from vla_rl.onpolicy.build import GaussianSamplerConfig, SamplerConfig, build_sampler
from vla_rl.onpolicy.tokens import TokenSamplerConfig
from vla_rl.protocols import ChunkedVectorEnv, FlowPolicy, GaussianPolicy, HasFeatures, TokenPolicy, chunk_shape

Role = Literal["base", "sft", "rl", "other"]


# ------------------------------------------------------------------------------------------------------- divergence
@dataclass(frozen=True)
class Divergence:
    """Mean KL in nats a decision, with a bootstrap interval over episodes."""

    value: float
    low: float
    high: float
    num_states: int
    num_episodes: int
    confidence: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class VisitedStates:
    """Observations at decisions of a policy's episodes; `episode`: int64 [N], which one each of them is from."""

    observations: Observation
    episode: Tensor

    def __len__(self) -> int:
        return len(self.episode)

    @staticmethod
    def concatenate(parts: Sequence[VisitedStates]) -> VisitedStates:
        """All of them; episodes of different parts are different ones."""
        first = 0
        episodes = []
        for part in parts:
            episodes.append(part.episode + first)
            first = int(episodes[-1].max()) + 1
        return VisitedStates(Observation.concatenate([part.observations for part in parts]), torch.cat(episodes))


@torch.no_grad()
def visited_states(
    policy: Any,
    make_env: Callable[[int], ChunkedVectorEnv],
    episode_seeds: Sequence[int],
    *,
    execution_horizon: int,
    noise_seed: int = 0,
) -> VisitedStates:
    """What the deployed `policy` sees at each decision of one episode a seed, all side by side.

    `make_env(n)` builds environments that do not reset themselves and have a time limit; it is closed afterwards.
    """
    env = make_env(len(episode_seeds))
    try:
        obs = env.reset(list(episode_seeds))
        running = torch.arange(len(episode_seeds))
        seen, episodes, decision = [], [], 0
        while len(running):
            seen.append(obs.select(running))
            episodes.append(running)
            noise = [policy_noise(noise_seed, s, decision, *chunk_shape(policy)) for s in episode_seeds]
            step = env.step(policy.act(obs, torch.stack(noise)).actions[:, :execution_horizon])
            running = running[~step.ended.cpu()[running]]
            obs, decision = step.obs, decision + 1
    finally:
        env.close()
    return VisitedStates(Observation.concatenate(seen), torch.cat(episodes))


@torch.no_grad()
def policy_kl(
    policy: Any,
    other: Any,
    observations: Observation,
    config: SamplerConfig,
    *,
    noise_seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """KL(policy || other) of the chunks that both sample, at each observation: float32 [N], nats.

    `config`: the sampler of both, such as `FlowSamplerConfig(mode="full")` or `GaussianSamplerConfig()`. With one seed,
    the chains are the same whatever `other` is. The policies normalise alike: they come from one base.

    Raises ValueError for a sampler whose divergence is not that of whole chunks: a hybrid chain (one step of several),
    a learned noise head (which a stored policy lacks), or FPO (whose ratio is of no density). TypeError where the
    policies are not of the sampler's kind.
    """
    if isinstance(config, FlowSamplerConfig) and (config.mode != "full" or config.kernel == "flow_noise"):
        raise ValueError(
            f"policy_kl: kernel {config.kernel}, mode {config.mode}: the KL of a chunk is that of a chain with noise "
            'that is known in every step; use FlowSamplerConfig(kernel="flow_sde", mode="full")'
        )
    _require_same_actions(policy, other)
    ours, theirs = build_sampler(policy, config, seed=0), build_sampler(other, config, seed=0)
    if not ours.has_transitions:
        raise ValueError(f"policy_kl: {type(config).__name__} has no likelihood whose KL could be computed")
    generator = torch.Generator(next(iter(policy.parameters())).device).manual_seed(noise_seed)
    parts = []
    for rows in torch.arange(len(observations)).split(batch_size):
        obs = observations.select(rows)
        prefix = _prefix(policy, obs)
        _, trace = ours.sample(prefix, generator)
        parts.append(chain_kl(ours.score(prefix, trace), theirs.score(_prefix(other, obs), trace)).cpu())
    return torch.cat(parts).float()


def usual_sampler(policy: Any, scored_horizon: int, noise_level: float | None = None) -> tuple[SamplerConfig, str]:
    """A sampler of `policy`'s kind whose divergence is that of the executed steps of whole chunks, and its description.

    `noise_level`: of Flow-SDE, None takes its default. Raises TypeError for a policy that samples nothing, ValueError
    for a noise level where there is none.
    """
    steps = f"the {scored_horizon} executed steps of a chunk"
    if isinstance(policy, FlowPolicy):
        config = FlowSamplerConfig(mode="full", noise_level=noise_level, scored_horizon=scored_horizon)
        return config, f"Flow-SDE, {config.num_steps} steps, noise level {config.level:g}, {steps}"
    if noise_level is not None:
        raise ValueError(f"a noise level is of a flow policy's sampler, and {type(policy).__name__} is none")
    if isinstance(policy, TokenPolicy):
        return TokenSamplerConfig(scored_horizon=scored_horizon), f"tokens at temperature 1, {steps}"
    if isinstance(policy, GaussianPolicy):
        return GaussianSamplerConfig(scored_horizon), f"the policy's own noise, {steps}"
    raise TypeError(f"{type(policy).__name__} has no likelihood: expected a flow, token or Gaussian policy")


def mean_divergence(kl: Tensor, episode: Tensor, *, confidence: float = 0.95) -> Divergence:
    """Mean over episodes of the mean `kl [N]` over their decisions; states of one episode are no independent samples.

    The interval resamples episodes, and decisions within them.
    """
    runs = [[kl[episode == e].double().numpy()] for e in episode.unique().tolist()]
    found = hierarchical_bootstrap(runs, confidence=confidence)
    return Divergence(found.value, found.low, found.high, len(kl), len(runs), confidence)


def _prefix(policy: HasFeatures, obs: Observation) -> Any:
    return policy.encode(policy.preprocess(obs))


def _require_same_actions(policy: Any, other: Any) -> None:
    """A density over normalised actions means nothing to a policy that normalises them otherwise."""
    if chunk_shape(policy) != chunk_shape(other):
        raise ValueError(f"policy_kl: chunks {chunk_shape(policy)} and {chunk_shape(other)} differ; use one base")
    probe = torch.linspace(-1.0, 1.0, 5)[:, None, None].expand(5, policy.action_horizon, policy.action_dim)
    device = next(iter(policy.parameters())).device
    first, second = (p.normalize_actions(probe.to(device)).cpu() for p in (policy, other))
    if not torch.allclose(first, second, atol=1e-6):
        raise ValueError("policy_kl: the policies normalise actions differently; fine-tune both from one base")


# -------------------------------------------------------------------------------------------------------- forgetting
@dataclass(frozen=True)
class PolicyForgetting:
    """One policy. `new`, `old`: its rates on the new tasks and on the old ones; `old_tasks`: on each of these.

    `change`: old tasks, the policy against the base on the same episodes; None for the base itself, whose `divergence`
    is 0.
    """

    name: str
    role: Role
    new: Rate
    old: Rate
    old_tasks: Mapping[str, Rate]
    divergence: Divergence | None
    change: PairedRates | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "role": self.role,
            "new": self.new.as_dict(),
            "old": self.old.as_dict(),
            "old_tasks": {task: rate.as_dict() for task, rate in self.old_tasks.items()},
            "divergence": None if self.divergence is None else vars(self.divergence),
            "change": None if self.change is None else self.change.as_dict(),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PolicyForgetting:
        """What `as_dict` made."""
        change, divergence = values["change"], values["divergence"]
        return PolicyForgetting(
            name=values["name"],
            role=values["role"],
            new=_stored_rate(values["new"]),
            old=_stored_rate(values["old"]),
            old_tasks={task: _stored_rate(rate) for task, rate in values["old_tasks"].items()},
            divergence=None if divergence is None else Divergence(**divergence),
            change=None if change is None else _stored_pairs(change),
        )


@dataclass(frozen=True)
class ForgettingResult:
    """Policies that were made from one base, which is the first. `sampler`: what the divergence is of, in words."""

    policies: tuple[PolicyForgetting, ...]
    new_tasks: tuple[str, ...]
    old_tasks: tuple[str, ...]
    criterion: str
    sampler: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "new_tasks": list(self.new_tasks),
            "old_tasks": list(self.old_tasks),
            "criterion": self.criterion,
            "sampler": self.sampler,
            "policies": [policy.as_dict() for policy in self.policies],
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ForgettingResult:
        """What `as_dict` made. Raises ValueError for something else."""
        try:
            policies = tuple(PolicyForgetting.from_dict(policy) for policy in values["policies"])
            tasks = tuple(values["new_tasks"]), tuple(values["old_tasks"])
            return ForgettingResult(policies, *tasks, values["criterion"], values["sampler"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected what ForgettingResult.as_dict() writes; {error!r} is wrong") from error

    def format_table(self) -> str:
        """Text for a terminal."""
        width = max(len(policy.name) for policy in self.policies)
        lines = [f"{'':{width}}  {'new task':>26}  {'old tasks':>26}  {'change of the old':>24}  KL(base || policy)"]
        for p in self.policies:
            new, old = (f"{r.rate:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in (p.new, p.old))
            kl = "0" if p.divergence is None else str(p.divergence)
            change = "" if p.change is None else str(p.change.difference)
            lines.append(f"{p.name:{width}}  {new:>26}  {old:>26}  {change:>24}  {kl}")
        return "\n".join(lines)


def _stored_rate(values: Mapping[str, Any]) -> Rate:
    return wilson(values["successes"], values["n"], values["confidence"])


def _stored_pairs(values: Mapping[str, Any]) -> PairedRates:
    kinds = (("both", (True, True)), ("only_first", (True, False)), ("only_second", (False, True)))
    pairs = [pair for name, pair in (*kinds, ("neither", (False, False))) for _ in range(values[name])]
    return PairedRates.of(pairs, values["confidence"])


def measure_forgetting(
    results: Mapping[str, EvalResult],
    divergences: Mapping[str, Divergence],
    roles: Mapping[str, Role],
    *,
    new_tasks: Sequence[str],
    sampler: str,
    criterion: str = "success_once",
) -> ForgettingResult:
    """Put together evaluations on new and old tasks and divergences, all by the policy's name.

    Exactly one role is "base"; every other policy is compared with it on the same episodes, and has a divergence. Old
    are all tasks that are not in `new_tasks`. Raises ValueError where one of these does not hold or a task is missing,
    `EpisodesDifferError` where the episodes are not the same.
    """
    bases = [name for name in results if roles.get(name) == "base"]
    if len(bases) != 1 or set(roles) != set(results) or set(divergences) != set(results) - set(bases):
        raise ValueError(
            "measure_forgetting: expected a result and a role for each policy, one of them base, and a divergence for "
            f"all others; got results {sorted(results)}, roles {dict(roles)}, divergences {sorted(divergences)}"
        )
    base = results[bases[0]]
    old_tasks = tuple(task for task in base.per_task if task not in new_tasks)
    if not old_tasks or not set(new_tasks) <= set(base.per_task) or not new_tasks:
        raise ValueError(f"new tasks {list(new_tasks)} of {list(base.per_task)}: expected some of them, and not all")
    rows = [
        _policy_row(name, roles[name], results[name], base, new_tasks, old_tasks, divergences.get(name), criterion)
        for name in (bases[0], *(name for name in results if name != bases[0]))
    ]
    return ForgettingResult(tuple(rows), tuple(new_tasks), old_tasks, criterion, sampler)


def _policy_row(
    name: str,
    role: Role,
    result: EvalResult,
    base: EvalResult,
    new_tasks: Sequence[str],
    old_tasks: Sequence[str],
    divergence: Divergence | None,
    criterion: str,
) -> PolicyForgetting:
    change = None
    if divergence is not None:
        paired = compare(_only(base, old_tasks), _only(result, old_tasks), criterion=criterion)
        change = paired.overall
    return PolicyForgetting(
        name=name,
        role=role,
        new=_rate(result, new_tasks, criterion),
        old=_rate(result, old_tasks, criterion),
        old_tasks={task: _rate(result, [task], criterion) for task in old_tasks},
        divergence=divergence,
        change=change,
    )


def _only(result: EvalResult, tasks: Sequence[str]) -> EvalResult:
    return EvalResult(tuple(e for e in result.episodes if e.task in tasks), result.config)


def _rate(result: EvalResult, tasks: Sequence[str], criterion: str) -> Rate:
    outcomes = [getattr(e, criterion) for e in result.episodes if e.task in tasks]
    return wilson(sum(outcomes), len(outcomes))
