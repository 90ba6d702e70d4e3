"""The commands of `vla-rl`: options, and the call that does the work. Those that evaluate are in `commands_eval.py`,
dispatch and errors in `cli.py`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from vla_rl.cli import UsageError, take_option
from vla_rl.command_options import (
    UNSET,
    RecipeFields,
    parse,
    parse_with_recipe,
    required_recipe,
)
from vla_rl.configs import RECIPES, get_recipe
from vla_rl.doctor import run_doctor
from vla_rl.policies.checkpoints.openvla import OpenVLAOptions
from vla_rl.policies.checkpoints.outside import import_options
from vla_rl.real_robot.deploy_config import CAMERA_HZ, DeployConfig, TabletopScene
from vla_rl.serving.config import ServerConfig, read_api_key, require_serving
from vla_rl.train.check import check_recipe
from vla_rl.train.distributed import join_learners, learner, leave_learners, wait_for_all
from vla_rl.train.offpolicy import OffPolicyConfig
from vla_rl.train.pipeline import run_pipeline
from vla_rl.train.ray_learners import LearnersConfig, run_learners
from vla_rl.train.run_folder import open_run_folder
from vla_rl.train.stages import fine_tune, record_demos, reinforce


# ------------------------------------------------------------------------------------------------------- small ones
@dataclass(frozen=True)
class DoctorOptions:
    """json: one JSON object for machines."""

    json: bool = False


def doctor_command(argv: list[str]) -> int:
    """What this machine can run."""
    return run_doctor(parse(DoctorOptions(), argv, "doctor").json)


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

    o = parse(EnvOptions, argv, "env")
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
    run_dir: Path = UNSET
    resume: bool = False
    control: bool = False
    seed: int | None = None


def run_command(argv: list[str]) -> int:
    """All stages of a recipe, and the report."""
    o = parse_with_recipe(RunOptions, argv, "run")
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
    out: Path = UNSET
    seed: int | None = None


def demos_command(argv: list[str]) -> int:
    """Record demonstrations."""
    o = parse_with_recipe(DemosOptions, argv, "demos")
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
    dataset: Path = UNSET
    run_dir: Path = UNSET
    learners: LearnersConfig = field(default_factory=LearnersConfig)
    resume: bool = False
    seed: int | None = None


def sft_command(argv: list[str]) -> int:
    """Fit a policy to demonstrations; with several learners through Ray, or started by `torchrun`."""
    o = parse_with_recipe(SftOptions, argv, "sft")
    check_recipe(o.recipe, stored_policy=o.policy_dir is not None)
    if _starts_learners(o.learners, "sft"):
        return run_learners(["sft", *argv, *import_options()], o.learners)
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
    run_dir: Path = UNSET
    dataset: Path | None = None
    learners: LearnersConfig = field(default_factory=LearnersConfig)
    resume: bool = False
    seed: int | None = None


def train_command(argv: list[str]) -> int:
    """Improve a policy by reinforcement learning; with several learners through Ray, or started by `torchrun`."""
    o = parse_with_recipe(TrainOptions, argv, "train")
    check_recipe(o.recipe, stored_policy=o.policy_dir is not None)
    starts = _starts_learners(o.learners, "train")
    if isinstance(o.recipe.train, OffPolicyConfig) and (starts or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UsageError("train: several learners are for on-policy recipes; start this one with one learner")
    if starts:
        return run_learners(["train", *argv, *import_options()], o.learners)
    join_learners()
    inputs = {"policy": o.policy_dir, "dataset": o.dataset}
    wait_for_all(lambda: open_run_folder(o.run_dir, o.recipe, resume=o.resume, kind="train", inputs=inputs))
    shard = o.learners.shard
    result = reinforce(o.recipe, o.policy_dir, o.run_dir, resume=o.resume, dataset_path=o.dataset, shard=shard)
    if learner() == 0:
        print(f"{result.num_iterations} iterations in {result.wall_s:.0f} s; policy: {result.policy_folder}")
    leave_learners()
    return 0 if result.finished else 130


# ----------------------------------------------------------------------------------------------------------- serving
@dataclass(frozen=True)
class ServeOptions:
    """policy: folder of the policy, ours or a public checkpoint. api_key_file: whose one line clients must send."""

    server: Annotated[ServerConfig, tyro.conf.arg(name="")]
    policy_dir: Annotated[Path, tyro.conf.arg(name="policy")] = UNSET
    api_key_file: Path | None = None


def serve_command(argv: list[str]) -> int:
    """A policy over a websocket, in openpi's protocol."""
    require_serving()
    from vla_rl.serving.server import PolicyServer

    o = parse(ServeOptions(ServerConfig()), argv, "serve")
    key = None if o.api_key_file is None else read_api_key(o.api_key_file)
    if key is None and o.server.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"anyone who reaches {o.server.host} can ask this policy; --api-key-file wants a key", flush=True)
    PolicyServer(o.policy_dir, o.server, api_key=key).run()
    return 0


# -------------------------------------------------------------------------------------------------------------- robot
def twin_command(argv: list[str]) -> int:
    """The digital twin of the tabletop's arm, until Ctrl-C. Its episodes are held-out ones, as those of `eval`."""
    from vla_rl.real_robot.twin import TwinConfig, run_twin

    run_twin(parse(TwinConfig(split="test", camera_hz=CAMERA_HZ), argv, "twin"))
    return 0


@dataclass(frozen=True)
class DeployOptions:
    """out: where episodes, rates, latencies and videos go."""

    config: Annotated[DeployConfig, tyro.conf.arg(name="")]
    out: Path = UNSET


def deploy_command(argv: list[str]) -> int:
    """A tabletop policy on the arm; its recipe is found as that of `eval`."""
    require_serving()
    from vla_rl.real_robot.deploy import deploy, format_deployment

    folder, rest = take_option(argv, "--policy", "deploy")
    name, rest = take_option(rest, "--recipe", "deploy")
    o = parse(DeployOptions(DeployConfig()), rest, f"deploy --policy {folder or 'DIR'} --recipe {name or 'NAME'}")
    if name is not None:
        recipe = get_recipe(name)
    elif folder is not None:
        recipe = required_recipe(Path(folder), "deploy")
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

    o = parse(ReplayOptions, argv, "replay")
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
        o = parse(InspectOptions, rest, "checkpoint inspect")
        told = ReadOptions(tokenizer=o.tokenizer, asset=o.asset, action_horizon=o.action_horizon)
        lines = describe(o.folder, told)
        print(json.dumps(lines, indent=2) if o.json else "\n".join(f"{k:22} {v}" for k, v in lines.items()))
    elif action == "convert":
        o = parse(ConvertOptions, rest, "checkpoint convert")
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
