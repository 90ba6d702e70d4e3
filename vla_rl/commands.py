"""The commands of `vla-rl`: options, and the call that does the work. Dispatch and errors are in `cli.py`."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from vla_rl.cli import UsageError
from vla_rl.configs import RECIPES, get_recipe
from vla_rl.configs.suites import SUITES, get_suite, list_suites
from vla_rl.doctor import run_doctor
from vla_rl.evaluation.compare import Comparisons, compare_all
from vla_rl.evaluation.compare_report import write_comparison
from vla_rl.evaluation.eval_report import criterion_of, write_eval_report
from vla_rl.evaluation.harness import describe_precision, run_suite
from vla_rl.evaluation.journal import JOURNAL_FILE
from vla_rl.evaluation.page import Curve
from vla_rl.evaluation.policies import Actor, Expert, ServedPolicy, StoredPolicy, actor_of
from vla_rl.evaluation.result import SUMMARY_FILE, EvalResult
from vla_rl.evaluation.runs_index import write_runs_index
from vla_rl.evaluation.stopping import StopRule
from vla_rl.evaluation.suite import Suite, with_fields, with_known_fields
from vla_rl.evaluation.tables import evaluation_table, latex, markdown, pairs_table, rates_table
from vla_rl.evaluation.workers import HarnessConfig
from vla_rl.policies.checkpoints.openvla import OpenVLAOptions
from vla_rl.real_robot.deploy_config import CAMERA_HZ, DeployConfig, TabletopScene
from vla_rl.serving.config import RemoteConfig, ServerConfig, read_api_key, require_serving
from vla_rl.train.check import check_recipe, device_named, device_of
from vla_rl.train.distributed import join_learners, learner, leave_learners, wait_for_all
from vla_rl.train.offpolicy import OffPolicyConfig
from vla_rl.train.pipeline import run_pipeline, write_run_report
from vla_rl.train.ray_learners import LearnersConfig, run_learners
from vla_rl.train.recipe import Recipe
from vla_rl.train.run_folder import CONFIG_FILE, open_run_folder, read_config, write_provenance
from vla_rl.train.stages import best_of, fine_tune, harness_config, recipe_of, record_demos, reinforce, suite_of

RecipeFields = Annotated[Recipe, tyro.conf.arg(name="")]
_UNSET: Any = tyro.MISSING


# ------------------------------------------------------------------------------------------------------- small ones
@dataclass(frozen=True)
class DoctorOptions:
    """json: one JSON object for machines."""

    json: bool = False


def doctor_command(argv: list[str]) -> int:
    """What this machine can run."""
    return run_doctor(_parse(DoctorOptions(), argv, "doctor").json)


def recipes_command(argv: list[str]) -> int:
    """Names of the recipes, and the first line of their descriptions."""
    import importlib

    if argv:
        raise UsageError("recipes takes no options")
    for name, entry in RECIPES.items():
        module, _, function = entry.partition(":")
        text = getattr(importlib.import_module(module), function).__doc__ or ""
        print(f"{name:22} {text.strip().splitlines()[0]}")
    return 0


@dataclass(frozen=True)
class EnvOptions:
    """action: install makes the environments of simulators, list says which there are and where. names: which."""

    action: tyro.conf.Positional[Literal["install", "list"]]
    names: tyro.conf.Positional[tuple[str, ...]] = ()


def env_command(argv: list[str]) -> int:
    """Virtual environments of simulators whose pins cannot live here."""
    from vla_rl.envs import install

    o = _parse(EnvOptions, argv, "env")
    if o.action == "install" and not o.names:
        raise UsageError(f"which? vla-rl env install NAME..., of {', '.join(install.SIMULATORS)}")
    for name in o.names if o.action == "install" else ():
        print(f"{name}: {install.install(name)}")
    for name in install.SIMULATORS if o.action == "list" else ():
        state = install.environments_folder() / name if install.is_installed(name) else "not installed"
        print(f"{name:12} {state}")
    return 0


# ------------------------------------------------------------------------------------------------------------ stages
@dataclass(frozen=True)
class RunOptions:
    """run_dir: folder of the run. resume: go on with an interrupted run. control: also train on shuffled advantages,
    which must not learn. seed: of every stage."""

    recipe: RecipeFields
    run_dir: Path = _UNSET
    resume: bool = False
    control: bool = False
    seed: int | None = None


def run_command(argv: list[str]) -> int:
    """All stages of a recipe, and the report."""
    o = _parse_with_recipe(RunOptions, argv, "run")
    result = run_pipeline(o.recipe, o.run_dir, resume=o.resume, control=o.control)
    for who in ("start", "sft", "cloned", "offline", "rl", "control", "expert"):
        if who in result.summary:
            rate = result.summary[who]
            print(f"{who:8} {rate['success_rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] n={rate['n']}")
    print(f"{result.summary['total_s']:.0f} s; report: {result.run_dir / 'report.html'}")
    return 0


@dataclass(frozen=True)
class DemosOptions:
    """out: folder of the dataset. A recording that was interrupted goes on."""

    recipe: RecipeFields
    out: Path = _UNSET
    seed: int | None = None


def demos_command(argv: list[str]) -> int:
    """Record demonstrations."""
    o = _parse_with_recipe(DemosOptions, argv, "demos")
    summary = record_demos(o.recipe, o.out)
    print(f"{summary.num_episodes} episodes, {summary.num_frames} frames in {summary.path}")
    return 0


@dataclass(frozen=True)
class SftOptions:
    """dataset: folder of a LeRobot dataset. policy: folder of the one to begin with (else a new one), ours or a
    public checkpoint. run_dir: folder of the run. learners: several processes that share the run, started through Ray.
    resume: go on with an interrupted run."""

    recipe: RecipeFields
    policy_dir: Annotated[Path | None, tyro.conf.arg(name="policy")] = None
    dataset: Path = _UNSET
    run_dir: Path = _UNSET
    learners: LearnersConfig = field(default_factory=LearnersConfig)
    resume: bool = False
    seed: int | None = None


def sft_command(argv: list[str]) -> int:
    """Fit a policy to demonstrations; with several learners through Ray, or started by `torchrun`."""
    o = _parse_with_recipe(SftOptions, argv, "sft")
    check_recipe(o.recipe, stored_policy=o.policy_dir is not None)
    if _starts_learners(o.learners, "sft"):
        return run_learners(["sft", *argv], o.learners)
    join_learners()
    inputs = {"dataset": o.dataset, "policy": o.policy_dir}
    wait_for_all(lambda: open_run_folder(o.run_dir, o.recipe, resume=o.resume, kind="sft", inputs=inputs))
    shard = o.learners.shard
    result = fine_tune(o.recipe, o.dataset, o.run_dir, resume=o.resume, initial=o.policy_dir, shard=shard)
    if learner() == 0:
        print(f"loss {result.final_loss:.4g} after {result.num_updates} updates; policy: {result.policy_folder}")
    leave_learners()
    return 0 if result.finished else 130


def _starts_learners(config: LearnersConfig, command: str) -> bool:
    """Whether this process is to start learners through Ray, instead of being the only one or one of torchrun's."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and config.num not in (1, size):
        raise UsageError(
            f"{command}: learners.num is {config.num} and torchrun has started {size}; leave one of them out"
        )
    if config.shard and max(size, config.num) == 1:
        raise UsageError(f"{command}: learners.shard divides a policy among learners; set learners.num to 2 or more")
    return config.num > 1 and size == 1


@dataclass(frozen=True)
class TrainOptions:
    """policy: folder of the one to improve; recipes with an agent of its own have none. run_dir: folder of the run.
    dataset: demonstrations, for learning from replay and for bc_coef > 0. learners: several processes that share the
    run, started through Ray. resume: go on with an interrupted run."""

    recipe: RecipeFields
    policy_dir: Annotated[Path | None, tyro.conf.arg(name="policy")] = None
    run_dir: Path = _UNSET
    dataset: Path | None = None
    learners: LearnersConfig = field(default_factory=LearnersConfig)
    resume: bool = False
    seed: int | None = None


def train_command(argv: list[str]) -> int:
    """Improve a policy by reinforcement learning; with several learners through Ray, or started by `torchrun`."""
    o = _parse_with_recipe(TrainOptions, argv, "train")
    check_recipe(o.recipe, stored_policy=o.policy_dir is not None)
    starts = _starts_learners(o.learners, "train")
    if isinstance(o.recipe.train, OffPolicyConfig) and (starts or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UsageError("train: several learners are for on-policy recipes; start this one with one learner")
    if starts:
        return run_learners(["train", *argv], o.learners)
    join_learners()
    inputs = {"policy": o.policy_dir, "dataset": o.dataset}
    wait_for_all(lambda: open_run_folder(o.run_dir, o.recipe, resume=o.resume, kind="train", inputs=inputs))
    shard = o.learners.shard
    result = reinforce(o.recipe, o.policy_dir, o.run_dir, resume=o.resume, dataset_path=o.dataset, shard=shard)
    if learner() == 0:
        print(f"{result.num_iterations} iterations in {result.wall_s:.0f} s; policy: {result.policy_folder}")
    leave_learners()
    return 0 if result.finished else 130


# -------------------------------------------------------------------------------------------------------- evaluation
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
    out: Path = _UNSET
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

    out: Path = _UNSET
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
    policy, rest = _take(argv, "--policy")
    suite, rest = _take(rest, "--suite")
    name, rest = _take(rest, "--recipe")
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
        result = _eval_recipe(policy, get_recipe(name) if name is not None else _recipe_of(Path(policy)), rest)
    print(result.format_table())
    return 0


def _eval_recipe(policy: str, recipe: Recipe, argv: list[str]) -> EvalResult:
    o = _parse(EvalOptions(recipe), argv, f"eval --policy {policy}")
    _set_threads(o.recipe)
    actor = _actor(policy, str(device_of(o.recipe)), o.remote)
    if isinstance(actor, Expert):
        actor = Expert(best_of(o.recipe.demos.expert))
    suite, evaluation = suite_of(o.recipe, o.recipe.evaluation), o.recipe.evaluation
    config = harness_config(o.recipe, evaluation, workers=o.workers, stop=o.stop.rule())
    return _evaluate(suite, actor, o.out, config, o.resume)


def _eval_suite(policy: str, name: str, argv: list[str]) -> EvalResult:
    o = _parse(EvalSuiteOptions(), argv, f"eval --policy {policy} --suite {name}")
    torch.set_num_threads(o.torch_threads)
    suite = get_suite(name)
    if o.episodes is not None:
        suite = replace(suite, cases=tuple(replace(case, num_episodes=o.episodes) for case in suite.cases))
    recipe = _run_recipe(Path(policy)) if Path(policy).is_dir() else None
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
    write_provenance(o.out)
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


# ----------------------------------------------------------------------------------------------------------- serving
@dataclass(frozen=True)
class ServeOptions:
    """policy: folder of the policy, ours or a public checkpoint. api_key_file: whose one line clients must send."""

    server: Annotated[ServerConfig, tyro.conf.arg(name="")]
    policy_dir: Annotated[Path, tyro.conf.arg(name="policy")] = _UNSET
    api_key_file: Path | None = None


def serve_command(argv: list[str]) -> int:
    """A policy over a websocket, in openpi's protocol."""
    require_serving()
    from vla_rl.serving.server import PolicyServer

    o = _parse(ServeOptions(ServerConfig()), argv, "serve")
    key = None if o.api_key_file is None else read_api_key(o.api_key_file)
    if key is None and o.server.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"anyone who reaches {o.server.host} can ask this policy; --api-key-file wants a key", flush=True)
    PolicyServer(o.policy_dir, o.server, api_key=key).run()
    return 0


# -------------------------------------------------------------------------------------------------------------- robot
def twin_command(argv: list[str]) -> int:
    """The digital twin of the tabletop's arm, until Ctrl-C. Its episodes are held-out ones, as those of `eval`."""
    from vla_rl.real_robot.twin import TwinConfig, run_twin

    run_twin(_parse(TwinConfig(split="test", camera_hz=CAMERA_HZ), argv, "twin"))
    return 0


@dataclass(frozen=True)
class DeployOptions:
    """out: where episodes, rates, latencies and videos go."""

    config: Annotated[DeployConfig, tyro.conf.arg(name="")]
    out: Path = _UNSET


def deploy_command(argv: list[str]) -> int:
    """A tabletop policy on the arm; its recipe is found as that of `eval`."""
    require_serving()
    from vla_rl.real_robot.deploy import deploy, format_deployment

    folder, rest = _take(argv, "--policy", "deploy")
    name, rest = _take(rest, "--recipe", "deploy")
    o = _parse(DeployOptions(DeployConfig()), rest, f"deploy --policy {folder or 'DIR'} --recipe {name or 'NAME'}")
    if name is not None:
        recipe = get_recipe(name)
    elif folder is not None:
        recipe = _recipe_of(Path(folder), "deploy")
    else:
        raise UsageError("deploy: name a policy's folder with --policy, or --server and --recipe")
    torch.set_num_threads(1)  # of the control loop, which shares the machine with the policy
    scene = TabletopScene.of(recipe, folder or o.config.server)
    result = deploy(scene, None if folder is None else Path(folder), o.out, o.config)
    print(f"{result.format_table()}\n{format_deployment(o.out)}")
    return 0


@dataclass(frozen=True)
class ReplayOptions:
    """log: folder that a run on an arm wrote. policy: folder of a policy, or ws://host:port of a server. api_key_file:
    for that server. out: an HTML page with a chart for each dimension of the action."""

    log: tyro.conf.Positional[Path]
    policy: str
    api_key_file: Path | None = None
    out: Path | None = None


def replay_command(argv: list[str]) -> int:
    """The open-loop check of an arm's log."""
    require_serving()
    from vla_rl.real_robot.inference import ServedActions
    from vla_rl.real_robot.inference import ServerConfig as Server
    from vla_rl.real_robot.replay import replay, stored_policy

    o = _parse(ReplayOptions, argv, "replay")
    if o.policy.startswith(("ws://", "wss://")):
        key = None if o.api_key_file is None else read_api_key(o.api_key_file)
        infer = ServedActions(Server(o.policy, api_key=key, timeout_s=30.0, heartbeat_s=None))
    else:
        infer = stored_policy(Path(o.policy))
    found = replay(o.log, infer)
    print(found.format_table())
    if o.out is not None:
        found.write_html(o.out)
        print(f"charts: {o.out}")
    return 0


def _take(argv: list[str], option: str, command: str = "eval") -> tuple[str | None, list[str]]:
    """The value after `option`, which decides the defaults of all others, and the rest."""
    if option not in argv:
        return None, argv
    at = argv.index(option)
    if at + 1 == len(argv) or argv[at + 1].startswith("-"):
        raise UsageError(f"{command}: {option} needs a value")
    return argv[at + 1], argv[:at] + argv[at + 2 :]


@dataclass(frozen=True)
class ReportOptions:
    """folder: that `run` or `eval` wrote. markdown, latex: print the table of an evaluation instead."""

    folder: tyro.conf.Positional[Path]
    markdown: bool = False
    latex: bool = False


def report_command(argv: list[str]) -> int:
    """Write the report of a run or of an evaluation once more."""
    o: ReportOptions = _parse(ReportOptions, argv, "report")
    is_evaluation = (o.folder / SUMMARY_FILE).is_file()
    if o.markdown or o.latex:
        if not is_evaluation:
            raise UsageError(f"report: {o.folder} is not the folder of an evaluation, which has a table")
        result = EvalResult.load(o.folder)
        print((markdown if o.markdown else latex)(evaluation_table(result, criterion_of(result))))
    else:
        print(write_eval_report(o.folder) if is_evaluation else write_run_report(o.folder))
    return 0


@dataclass(frozen=True)
class CompareOptions:
    """folders: two or more that `eval` wrote; each is compared with the first. names: one for each of them. criterion:
    which success counts; default is that of the first one's suite. out: an HTML page, with the videos side by side.
    curves: run folders with the metrics of the last one's training; several are its seeds. json, markdown, latex:
    instead of the text. across_suites: pair what different suites share, and label it. fail_under: the rate to reach;
    exit code 3 where one after the first has the lower end of its interval (fail_on low) or the rate itself (fail_on
    rate) below it."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    names: tuple[str, ...] = ()
    criterion: Literal["success_once", "success_at_end"] | None = None
    out: Path | None = None
    curves: tuple[Path, ...] = ()
    json: bool = False
    markdown: bool = False
    latex: bool = False
    across_suites: bool = False
    fail_under: float | None = None
    fail_on: Literal["low", "rate"] = "low"


def compare_command(argv: list[str]) -> int:
    """Evaluations of the same episodes: each against the first, and every pair with Holm's correction."""
    o: CompareOptions = _parse(CompareOptions, argv, "compare")
    names = o.names or _short_names(o.folders)
    if len(o.folders) < 2 or len(names) != len(o.folders) or len(set(names)) != len(names):
        raise UsageError("compare: name two folders or more, each with a name of its own (--names A B ...)")
    if o.json + o.markdown + o.latex > 1:
        raise UsageError("compare: choose one of --json, --markdown and --latex")
    if o.fail_under is not None and not 0 <= o.fail_under <= 1:
        raise UsageError(f"compare: --fail-under must lie between 0 and 1, got {o.fail_under}; 80% is 0.8")
    results = {name: (folder, EvalResult.load(folder)) for name, folder in zip(names, o.folders, strict=True)}
    comparisons = compare_all(
        {name: result for name, (_, result) in results.items()},
        criterion=o.criterion or criterion_of(results[names[0]][1]),
        across_suites=o.across_suites,
    )
    print(_printed(comparisons, o))
    if o.out is not None:
        curves = (Curve(names[-1], "trained", o.curves),) if o.curves else ()
        page = write_comparison(
            o.out, comparisons, results, command=shlex.join(["vla-rl", "compare", *argv]), curves=curves
        )
        print(f"report: {page}", file=sys.stderr)
    missed = () if o.fail_under is None else comparisons.under(o.fail_under, o.fail_on)
    for name in missed:
        what = "the lower end of its interval" if o.fail_on == "low" else "its success rate"
        print(f"{name}: {what} is under {o.fail_under:g}", file=sys.stderr)
    return 3 if missed else 0


def _short_names(folders: tuple[Path, ...]) -> tuple[str, ...]:
    """The ends of the paths, as long as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = tuple("/".join(part[-length:]) for part in parts)
        if len(set(names)) == len(names):
            return names
    return tuple(str(folder) for folder in folders)


def _printed(comparisons: Comparisons, o: CompareOptions) -> str:
    if o.json:
        return json.dumps(comparisons.as_dict(), indent=2)
    if o.markdown or o.latex:
        write = markdown if o.markdown else latex
        return write(rates_table(comparisons)) + "\n" + write(pairs_table(comparisons))
    return comparisons.format_table()


@dataclass(frozen=True)
class RunsOptions:
    """folder: with runs and evaluations somewhere in it."""

    folder: tyro.conf.Positional[Path]


def runs_command(argv: list[str]) -> int:
    """One page of all runs and evaluations in a folder."""
    print(write_runs_index(_parse(RunsOptions, argv, "runs").folder))
    return 0


# ------------------------------------------------------------------------------------------------------- checkpoints
@dataclass(frozen=True)
class InspectOptions:
    """folder: of a checkpoint in any layout. tokenizer: folder with the tokenizer's file. asset: whose statistics,
    where openpi's assets have several. action_horizon: of a JAX checkpoint, whose files do not say it. json: one JSON
    object for machines."""

    folder: tyro.conf.Positional[Path]
    tokenizer: Path | None = None
    asset: str = ""
    action_horizon: int = 0
    json: bool = False


@dataclass(frozen=True)
class ConvertOptions:
    """source: folder of a checkpoint in any layout. target: new folder. layout: of what is written. cameras: names in
    the observation that fill the model's picture slots, in order. discrete_state: False is for openpi's
    pi05_libero, which does not read the state. state_width: zeros follow the state up to it in the prompt. openvla:
    what folders of OpenVLA do not say. The others are as in `inspect`."""

    source: tyro.conf.Positional[Path]
    target: tyro.conf.Positional[Path]
    layout: Literal["native", "openpi", "openpi_jax", "lerobot", "openvla"]
    tokenizer: Path | None = None
    cameras: tuple[str, ...] = ()
    asset: str = ""
    action_horizon: int = 0
    discrete_state: bool | None = None
    state_width: int | None = None
    openvla: OpenVLAOptions = field(default_factory=OpenVLAOptions)


def checkpoint_command(argv: list[str]) -> int:
    """Look at a checkpoint, or write it in another layout."""
    from vla_rl.policies.checkpoints.load_any import convert, describe
    from vla_rl.policies.checkpoints.options import ReadOptions

    action, rest = (argv[0], argv[1:]) if argv else ("", [])
    if action == "inspect":
        o = _parse(InspectOptions, rest, "checkpoint inspect")
        told = ReadOptions(tokenizer=o.tokenizer, asset=o.asset, action_horizon=o.action_horizon)
        lines = describe(o.folder, told)
        print(json.dumps(lines, indent=2) if o.json else "\n".join(f"{k:22} {v}" for k, v in lines.items()))
    elif action == "convert":
        o = _parse(ConvertOptions, rest, "checkpoint convert")
        told = ReadOptions(
            dtype=None,
            tokenizer=o.tokenizer,
            cameras=o.cameras,
            asset=o.asset,
            action_horizon=o.action_horizon,
            discrete_state=o.discrete_state,
            state_width=o.state_width,
        )
        openvla = None if o.openvla == OpenVLAOptions() else o.openvla
        lost = convert(o.source, o.target, o.layout, told, openvla)
        print("\n  ".join([f"{o.target}: {o.layout}", *lost]))
    else:
        raise UsageError("checkpoint: say inspect DIR, or convert FROM TO --layout LAYOUT")
    return 0


# ----------------------------------------------------------------------------------------------------------- parsing
def _parse(options: Any, argv: list[str], command: str) -> Any:
    """`argv` over the defaults in `options`. For a wrong option tyro ends the process with code 2 and a suggestion."""
    kind: Callable[..., Any] = options if isinstance(options, type) else type(options)
    return tyro.cli(
        kind,
        args=argv,
        prog=f"vla-rl {command}",
        default=None if isinstance(options, type) else options,
        config=(tyro.conf.AvoidSubcommands,),
    )


def _parse_with_recipe(options: Any, argv: list[str], command: str) -> Any:
    """Options of a command whose first argument is a recipe's name; `--seed` is already in the recipe."""
    if not argv or argv[0].startswith("-"):
        raise UsageError(f"{command}: name a recipe first ({', '.join(RECIPES)}), then the options")
    parsed = _parse(options(get_recipe(argv[0])), argv[1:], f"{command} {argv[0]}")
    if parsed.seed is not None:
        parsed = replace(parsed, recipe=parsed.recipe.with_seed(parsed.seed))
    _set_threads(parsed.recipe)
    return parsed


def _recipe_of(policy: Path, command: str = "eval") -> Recipe:
    """The recipe of the run that a policy folder lies in."""
    recipe = _run_recipe(policy)
    if recipe is not None:
        return recipe
    raise UsageError(f"{command}: {policy} lies in no run folder; name the recipe with --recipe ({', '.join(RECIPES)})")


def _run_recipe(policy: Path) -> Recipe | None:
    for folder in policy.resolve().parents:
        file = folder / CONFIG_FILE
        if file.is_file() and (folder / "provenance.json").is_file():
            return read_config(folder, Recipe)
    return None


def _set_threads(recipe: Recipe) -> None:
    """Small networks on a busy CPU are many times slower with two threads than with one."""
    torch.set_num_threads(recipe.torch_threads)
