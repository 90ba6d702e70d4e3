"""The commands of `vla-rl` that evaluate, and show what was found: eval, report, compare, forgetting, runs."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from vla_rl.cli import UsageError, take_option
from vla_rl.command_options import (
    UNSET,
    RecipeFields,
    parse,
    recipe_of_run,
    required_recipe,
    set_threads,
)
from vla_rl.configs import RECIPES, get_recipe
from vla_rl.configs.suites import SUITES, get_suite, list_suites
from vla_rl.core import EnvSpec
from vla_rl.data.lerobot_format import atomic_write_json
from vla_rl.evaluation.compare import Comparisons, compare_all
from vla_rl.evaluation.compare_report import write_comparison
from vla_rl.evaluation.eval_report import criterion_of, write_eval_report
from vla_rl.evaluation.forgetting import (
    VisitedStates,
    mean_divergence,
    measure_forgetting,
    policy_kl,
    usual_sampler,
    visited_states,
)
from vla_rl.evaluation.forgetting_report import write_forgetting_report
from vla_rl.evaluation.harness import describe_precision, run_suite
from vla_rl.evaluation.journal import JOURNAL_FILE
from vla_rl.evaluation.methods import MethodsComparison, compare_methods
from vla_rl.evaluation.methods_report import write_methods_report
from vla_rl.evaluation.page import Curve
from vla_rl.evaluation.policies import Actor, Expert, ServedPolicy, StoredPolicy, actor_of, weights_digest
from vla_rl.evaluation.result import SUMMARY_FILE, EvalResult
from vla_rl.evaluation.runs_index import write_runs_index
from vla_rl.evaluation.stopping import StopRule
from vla_rl.evaluation.suite import Suite, SuiteCase, with_fields, with_known_fields
from vla_rl.evaluation.tables import evaluation_table, latex, markdown, methods_table, pairs_table, rates_table
from vla_rl.evaluation.workers import HarnessConfig
from vla_rl.real_robot.deploy_config import DeployConfig, TabletopScene
from vla_rl.serving.config import RemoteConfig, require_serving
from vla_rl.train.check import device_named, device_of
from vla_rl.train.pipeline import write_run_report
from vla_rl.train.recipe import Recipe
from vla_rl.train.run_folder import write_provenance
from vla_rl.train.stages import RECIPE_SUITE, best_of, harness_config, recipe_of, suite_of


@dataclass(frozen=True)
class StopOptions:
    """End a case early, by an interval that holds at every number of episodes. half_width: it is no wider than plus or
    minus this. above, below: the rate is surely above or below this. None of them: all episodes are run."""

    half_width: float | None = None
    above: float | None = None
    below: float | None = None
    confidence: float = 0.95

    def rule(self) -> StopRule | None:
        if self.half_width is None and self.above is None and self.below is None:
            return None
        return StopRule(self.half_width, self.above, self.below, self.confidence)


@dataclass(frozen=True)
class EvalOptions:
    """out: folder of episodes, rates, videos and report. resume: go on with what was interrupted there. workers:
    processes; they change the speed alone. remote: of a policy behind a server."""

    recipe: RecipeFields
    out: Path = UNSET
    resume: bool = False
    workers: int = 1
    stop: StopOptions = field(default_factory=StopOptions)
    remote: RemoteConfig = field(default_factory=RemoteConfig)


@dataclass(frozen=True)
class EvalSuiteOptions:
    """out: folder of episodes, rates, videos and report. resume: go on with what was interrupted there. episodes: of
    each case, instead of the suite's number; then it is another suite, of another hash. cameras, image_size,
    privileged_state: what the policy sees; default is what a policy of ours was made for, else the suite's.
    execution_horizon: control steps of each chunk that are executed; default is that of the run that the policy lies
    in, else all. num_envs, workers (processes), sim_workers (of simulators in processes of their own): change the speed
    alone. policy_batch_size, noise_seed: part of the protocol. remote: of a policy behind a server. twin: of a suite on
    the twin, as in `deploy`."""

    out: Path = UNSET
    resume: bool = False
    episodes: int | None = None
    cameras: tuple[str, ...] | None = None
    image_size: int | None = None
    privileged_state: bool | None = None
    execution_horizon: int | None = None
    num_envs: int = 16
    workers: int = 1
    sim_workers: int | None = None
    policy_batch_size: int = 32
    noise_seed: int = 0
    num_videos: int = 2
    video_speed: float = 0.5
    device: str = "auto"
    torch_threads: int = 1
    stop: StopOptions = field(default_factory=StopOptions)
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    twin: DeployConfig = field(default_factory=DeployConfig)

    def config(self, execution_horizon: int | None) -> HarnessConfig:
        return HarnessConfig(
            num_envs=self.num_envs,
            workers=self.workers,
            execution_horizon=execution_horizon if self.execution_horizon is None else self.execution_horizon,
            policy_batch_size=self.policy_batch_size,
            noise_seed=self.noise_seed,
            num_videos=self.num_videos,
            video_speed=self.video_speed,
            stop=self.stop.rule(),
        )


def eval_command(argv: list[str]) -> int:
    """Success of any policy: a folder, `ws://host:port`, `expert`, or `module:function`. The episodes are those of a
    suite, or of a recipe; without either, of the recipe of the run that the policy lies in."""
    policy, rest = take_option(argv, "--policy")
    suite, rest = take_option(rest, "--suite")
    name, rest = take_option(rest, "--recipe")
    if suite == "list":
        print(list_suites())
        return 0
    if policy is None:
        raise UsageError(
            "eval: name a policy with --policy: a folder, ws://host:port of a server, expert, or module:function"
        )
    if suite is not None and name is not None:
        raise UsageError("eval: the episodes are those of a suite or of a recipe; leave --suite or --recipe out")
    if suite is not None:
        result = _eval_suite(policy, suite, rest)
    else:
        if name is None and not Path(policy).is_dir():
            known = f"--suite ({', '.join(SUITES)}) or --recipe ({', '.join(RECIPES)})"
            raise UsageError(f"eval: {policy} lies in no run folder; say which episodes with {known}")
        result = _eval_recipe(policy, get_recipe(name) if name is not None else required_recipe(Path(policy)), rest)
    print(result.format_table())
    return 0


def _eval_recipe(policy: str, recipe: Recipe, argv: list[str]) -> EvalResult:
    o = parse(EvalOptions(recipe), argv, f"eval --policy {policy}")
    set_threads(o.recipe)
    actor = _actor(policy, str(device_of(o.recipe)), o.remote)
    if isinstance(actor, Expert):
        actor = Expert(best_of(o.recipe.demos.expert))
    suite, evaluation = suite_of(o.recipe, o.recipe.evaluation), o.recipe.evaluation
    config = harness_config(o.recipe, evaluation, workers=o.workers, stop=o.stop.rule())
    return _evaluate(suite, actor, o.out, config, o.resume)


def _eval_suite(policy: str, name: str, argv: list[str]) -> EvalResult:
    o = parse(EvalSuiteOptions(), argv, f"eval --policy {policy} --suite {name}")
    torch.set_num_threads(o.torch_threads)
    suite = get_suite(name)
    if o.episodes is not None:
        suite = replace(suite, cases=tuple(replace(case, num_episodes=o.episodes) for case in suite.cases))
    recipe = recipe_of_run(Path(policy)) if Path(policy).is_dir() else None
    actor = _actor(policy, str(device_named(o.device)), o.remote)
    seen = actor.seen() if isinstance(actor, StoredPolicy) else {}
    fields = {n: v for n in ("cameras", "image_size", "privileged_state") if (v := getattr(o, n)) is not None}
    fields |= {"num_workers": o.sim_workers} if o.sim_workers is not None else {}
    suite = with_fields(with_known_fields(suite, seen), fields)
    config = o.config(None if recipe is None else recipe.train.execution_horizon)
    if suite.robot != "twin" and o.twin != DeployConfig():
        raise UsageError(f"eval: --twin.* is for suites on the twin, and {name} is none")
    if suite.robot == "twin":
        return _evaluate_on_twin(suite, actor, o, config)
    return _evaluate(suite, actor, o.out, config, o.resume)


def _evaluate_on_twin(suite: Suite, actor: Actor, o: EvalSuiteOptions, config: HarnessConfig) -> EvalResult:
    """In real time, through the safety filter; so there is one episode after the other, and none is run again."""
    require_serving()
    from vla_rl.real_robot.deploy import deploy

    if o.resume or o.workers > 1 or config.stop is not None:
        raise UsageError("eval: the twin runs in real time; leave --resume, --workers and --stop.* out")
    own = DeployConfig()
    if (o.twin.episodes, o.twin.server, o.twin.num_videos) != (own.episodes, own.server, own.num_videos):
        raise UsageError("eval: --episodes, --policy ws://... and --num-videos say what --twin.* would")
    if not isinstance(actor, StoredPolicy | ServedPolicy) or o.remote != RemoteConfig():
        raise UsageError("eval: on the twin a policy is asked through a server: name a folder, or ws://host:port")
    torch.set_num_threads(1)  # of the control loop, which shares the machine with the policy
    scene = TabletopScene.of(recipe_of(suite, config.execution_horizon), actor.label)
    scene = replace(scene, protocol={**scene.protocol, "suite": suite.describe()})
    url = actor.url if isinstance(actor, ServedPolicy) else ""
    options = replace(o.twin, episodes=suite.num_episodes, server=url, num_videos=o.num_videos)
    result = deploy(scene, actor.folder if isinstance(actor, StoredPolicy) else None, o.out, options)
    print(f"report: {write_eval_report(o.out, suite.criterion)}", file=sys.stderr)
    return result


def _actor(policy: str, device: str, remote: RemoteConfig) -> Actor:
    try:
        return actor_of(policy, device=device, remote=remote)
    except ValueError as error:
        raise UsageError(f"eval: {error}") from error


def _evaluate(suite: Suite, actor: Actor, out: Path, config: HarnessConfig, resume: bool) -> EvalResult:
    print(describe_precision(suite), file=sys.stderr)
    if not (out / JOURNAL_FILE).exists():
        write_provenance(out)
    result = run_suite(suite, actor, out, config, resume=resume)
    print(f"report: {write_eval_report(out)}", file=sys.stderr)
    return result


@dataclass(frozen=True)
class ReportOptions:
    """folder: that `run` or `eval` wrote, or a JSON file of what was forgotten, for a page beside it. markdown, latex:
    print the table of an evaluation instead."""

    folder: tyro.conf.Positional[Path]
    markdown: bool = False
    latex: bool = False


def report_command(argv: list[str]) -> int:
    """Write the report of a run or of an evaluation once more."""
    o: ReportOptions = parse(ReportOptions, argv, "report")
    is_evaluation = (o.folder / SUMMARY_FILE).is_file()
    if o.markdown or o.latex:
        if not is_evaluation:
            raise UsageError(f"report: {o.folder} is not the folder of an evaluation, which has a table")
        result = EvalResult.load(o.folder)
        print((markdown if o.markdown else latex)(evaluation_table(result, criterion_of(result))))
    elif o.folder.is_file():
        print(write_forgetting_report(o.folder))
    else:
        print(write_eval_report(o.folder) if is_evaluation else write_run_report(o.folder))
    return 0


@dataclass(frozen=True)
class CompareOptions:
    """folders: two or more that `eval` wrote; each is compared with the first. names: one for each of them; folders of
    one name are training runs (seeds) of one method, and methods are compared instead of policies. criterion: which
    success counts; default is that of the first one's suite. out: an HTML page, with the videos side by side. curves:
    run folders with the metrics of the last one's training; several are its seeds. new_tasks: those trained on after
    the first policy, drawn on the page against all others. json, markdown, latex: instead of the text. across_suites:
    pair what different suites share, and label it. fail_under: the rate to reach; exit code 3 where one after the first
    has the lower end of its interval (fail_on low) or the rate itself (fail_on rate) below it."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    names: tuple[str, ...] = ()
    criterion: Literal["success_once", "success_at_end"] | None = None
    out: Path | None = None
    curves: tuple[Path, ...] = ()
    new_tasks: tuple[str, ...] = ()
    json: bool = False
    markdown: bool = False
    latex: bool = False
    across_suites: bool = False
    fail_under: float | None = None
    fail_on: Literal["low", "rate"] = "low"


def compare_command(argv: list[str]) -> int:
    """Evaluations of the same episodes: each against the first, and every pair with Holm's correction. With several
    training runs of a method: methods against the first one."""
    o: CompareOptions = parse(CompareOptions, argv, "compare")
    names = o.names or _short_names(o.folders)
    if len(set(names)) < 2 or len(names) != len(o.folders) or len({f.resolve() for f in o.folders}) != len(o.folders):
        raise UsageError(
            "compare: name two folders or more, each with a name (--names A B ...); one name for several folders says "
            "that they are training runs of one method"
        )
    if o.json + o.markdown + o.latex > 1:
        raise UsageError("compare: choose one of --json, --markdown and --latex")
    if o.fail_under is not None and not 0 <= o.fail_under <= 1:
        raise UsageError(f"compare: --fail-under must lie between 0 and 1, got {o.fail_under}; 80% is 0.8")
    runs: dict[str, list[tuple[Path, EvalResult]]] = {}
    for name, folder in zip(names, o.folders, strict=True):
        runs.setdefault(name, []).append((folder, EvalResult.load(folder)))
    several = len(runs) < len(names)
    if o.new_tasks and (several or o.out is None):
        raise UsageError("compare: --new-tasks is drawn on the page (--out) of policies, each with a name of its own")
    criterion = o.criterion or criterion_of(runs[names[0]][0][1])
    command = shlex.join(["vla-rl", "compare", *argv])
    comparison, page = (_compare_methods if several else _compare_policies)(runs, criterion, command, o)
    print(_printed(comparison, o))
    if page is not None:
        print(f"report: {page}", file=sys.stderr)
    missed = () if o.fail_under is None else comparison.under(o.fail_under, o.fail_on)
    for name in missed:
        what = "the lower end of its interval" if o.fail_on == "low" else "its success rate"
        print(f"{name}: {what} is under {o.fail_under:g}", file=sys.stderr)
    return 3 if missed else 0


Runs = dict[str, list[tuple[Path, EvalResult]]]


def _compare_policies(runs: Runs, criterion: str, command: str, o: CompareOptions) -> tuple[Comparisons, Path | None]:
    results = {name: only for name, (only,) in runs.items()}
    comparisons = compare_all(
        {name: result for name, (_, result) in results.items()}, criterion=criterion, across_suites=o.across_suites
    )
    if o.out is None:
        return comparisons, None
    page = write_comparison(
        o.out, comparisons, results, command=command, curves=_curves(runs, o), new_tasks=o.new_tasks
    )
    return comparisons, page


def _compare_methods(
    runs: Runs, criterion: str, command: str, o: CompareOptions
) -> tuple[MethodsComparison, Path | None]:
    comparison = compare_methods(
        {name: [result for _, result in group] for name, group in runs.items()},
        criterion=criterion,
        across_suites=o.across_suites,
    )
    if o.out is None:
        return comparison, None
    return comparison, write_methods_report(o.out, comparison, runs, command=command, curves=_curves(runs, o))


def _curves(runs: Runs, o: CompareOptions) -> tuple[Curve, ...]:
    return (Curve([*runs][-1], "trained", o.curves),) if o.curves else ()


def _short_names(folders: tuple[Path, ...]) -> tuple[str, ...]:
    """The ends of the paths, as long as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = tuple("/".join(part[-length:]) for part in parts)
        if len(set(names)) == len(names):
            return names
    return tuple(str(folder) for folder in folders)


def _printed(comparison: Comparisons | MethodsComparison, o: CompareOptions) -> str:
    if o.json:
        return json.dumps(comparison.as_dict(), indent=2)
    if o.markdown or o.latex:
        write = markdown if o.markdown else latex
        if isinstance(comparison, MethodsComparison):
            return write(methods_table(comparison))
        return write(rates_table(comparison)) + "\n" + write(pairs_table(comparison))
    return comparison.format_table()


@dataclass(frozen=True)
class ForgettingOptions:
    """folders: two or more that `eval` wrote of several tasks, the first one of the policy that the others were trained
    from. new_tasks: those that they were trained on, as the suite or the recipe calls them. out: a JSON file; its page
    is put beside it. suite: `module:function`, where theirs is one of yours. names: one for each folder. roles: how
    each after the first was trained. criterion: which success counts; default is that of the first one's suite.
    episodes: of the first policy on each new task, on whose states the KL is measured. noise_level: of Flow-SDE, for
    flow policies."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    new_tasks: tuple[str, ...] = UNSET
    out: Path = UNSET
    suite: str | None = None
    names: tuple[str, ...] = ()
    roles: tuple[Literal["sft", "rl", "other"], ...] = ()
    criterion: Literal["success_once", "success_at_end"] | None = None
    episodes: int = 32
    noise_level: float | None = None
    device: str = "auto"


def forgetting_command(argv: list[str]) -> int:
    """What training on some tasks cost on the others, and how far it moved the policy: KL(base || policy) in nats a
    decision, exact for its likelihood, on states of the new tasks that the base visits."""
    o: ForgettingOptions = parse(ForgettingOptions, argv, "forgetting")
    names = o.names or _short_names(o.folders)
    roles = o.roles or ("other",) * (len(o.folders) - 1)
    if not 1 < len(set(names)) == len(names) == len(o.folders) == len(roles) + 1:
        raise UsageError(
            "forgetting: name two evaluations or more, the base's first, each with a name of its own (--names A B), "
            "and in --roles one for each after the first"
        )
    if o.episodes < 1:
        raise UsageError(f"forgetting: --episodes must be at least 1, got {o.episodes}")
    torch.set_num_threads(1)
    results = {name: EvalResult.load(folder) for name, folder in zip(names, o.folders, strict=True)}
    stored = {name: _evaluated_policy(result, str(device_named(o.device))) for name, result in results.items()}
    base, horizon = results[names[0]], results[names[0]].config["execution_horizon"]
    cases = _cases_of(o.suite or base.config["suite"]["name"], stored[names[0]], o.new_tasks)
    specs = [_spec_of(case) for case in cases]
    policies: dict[str, Any] = {name: policy.open(specs[0]) for name, policy in stored.items()}
    sampler, in_words = usual_sampler(policies[names[0]], horizon, o.noise_level)
    states = VisitedStates.concatenate(
        [
            visited_states(
                policies[names[0]],
                lambda n, case=case: case.env.make(n, split=case.split, task=case.task),
                range(case.first_seed, case.first_seed + o.episodes),
                execution_horizon=horizon,
            )
            for case in cases
        ]
    )
    divergences = {
        name: mean_divergence(policy_kl(policies[names[0]], other, states.observations, sampler), states.episode)
        for name, other in policies.items()
        if name != names[0]
    }
    found = measure_forgetting(
        {name: _without_conditions(result) for name, result in results.items()},
        divergences,
        dict(zip(names, ("base", *roles), strict=True)),
        new_tasks=[spec.name for spec in specs],
        sampler=in_words,
        criterion=o.criterion or criterion_of(base),
    )
    o.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(o.out, found.as_dict())
    print(found.format_table())
    print(f"report: {write_forgetting_report(o.out)}", file=sys.stderr)
    return 0


def _evaluated_policy(result: EvalResult, device: str) -> StoredPolicy:
    """Raises UsageError where the policy is not there any more, or was trained on since."""
    folder = Path(str(result.config.get("policy", "")))
    if not folder.is_dir() or weights_digest(folder) != result.config.get("policy_digest"):
        raise UsageError(
            f"forgetting: {folder} was evaluated, and there is no folder with those weights; evaluate it once more, "
            "and call this from the same place"
        )
    return StoredPolicy(folder, device)


def _cases_of(name: str, policy: StoredPolicy, tasks: tuple[str, ...]) -> list[SuiteCase]:
    """Those of `tasks`, in the suite `name`, or in the recipe of the run that `policy` lies in."""
    if name == RECIPE_SUITE:
        recipe = required_recipe(policy.folder, "forgetting")
        suite = suite_of(recipe, replace(recipe.evaluation, tasks=tasks))
    else:
        suite = with_known_fields(get_suite(name), policy.seen())
    found = []
    for task in tasks:
        case = next((c for c in suite.cases if not c.condition and task in (c.task, f"tabletop/{c.task}")), None)
        if case is None:
            raise UsageError(
                f"forgetting: {task} is not in {name}: {', '.join(dict.fromkeys(c.task for c in suite.cases))}"
            )
        found.append(case)
    return found


def _spec_of(case: SuiteCase) -> EnvSpec:
    env = case.env.make(1, split=case.split, task=case.task)
    env.close()
    return env.spec


def _without_conditions(result: EvalResult) -> EvalResult:
    """Nominal episodes alone, where there are any."""
    nominal = tuple(e for e in result.episodes if not e.condition)
    return replace(result, episodes=nominal or result.episodes)


@dataclass(frozen=True)
class RunsOptions:
    """folder: with runs and evaluations somewhere in it."""

    folder: tyro.conf.Positional[Path]


def runs_command(argv: list[str]) -> int:
    """One page of all runs and evaluations in a folder."""
    print(write_runs_index(parse(RunsOptions, argv, "runs").folder))
    return 0
