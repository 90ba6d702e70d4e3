"""Runs of learning from replay as users start them: killed in either stage, interrupted, resumed, wrongly called."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from tests.unit.killable import Killable
from vla_rl.cli import main
from vla_rl.configs import RECIPES, get_recipe
from vla_rl.evaluation.result import EvalResult
from vla_rl.policies.checkpoints.native import load_policy
from vla_rl.train.metric_dictionary import metric_names
from vla_rl.train.pipeline import run_pipeline
from vla_rl.train.recipe import Recipe

STAGES = ("offline", "online")


def small_recipe() -> Recipe:
    """The smoke recipe, saved after every iteration, with a point on the curve of each stage."""
    recipe = get_recipe("maze_smoke")
    often = {"checkpoint_interval": 1}
    train = recipe.train
    return replace(
        recipe,
        train=replace(train, offline=replace(train.offline, **often), online=replace(train.online, **often)),
        evaluation=replace(recipe.evaluation, num_episodes=4, num_videos=1),
    )


def run_all(run_dir):
    """What the killed process does."""
    torch.set_num_threads(1)
    run_pipeline(small_recipe(), run_dir, resume=True)


@pytest.fixture(scope="module")
def killable(tmp_path_factory):
    with Killable(__file__, tmp_path_factory.mktemp("killable")) as processes:
        yield processes


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, killable):
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    killable.start("run_all", str(run_dir))
    assert killable.wait() == 0, killable.output()
    return run_dir


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(RECIPES, "small", f"{__name__}:small_recipe")


def metrics_of(folder):
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{k: v for k, v in row.items() if k != "time_s"} for row in rows]


def assert_same_run(run_dir, uninterrupted):
    for stage in (*STAGES, "."):
        file = f"{stage}/policy/policy.safetensors"
        assert (run_dir / file).read_bytes() == (uninterrupted / file).read_bytes(), stage
    for stage in STAGES:
        assert metrics_of(run_dir / stage) == metrics_of(uninterrupted / stage)


def test_a_run_killed_in_either_stage_ends_as_an_uninterrupted_one(tmp_path, killable, uninterrupted):
    """kill -9 after the second iteration of each stage; in the end parameters, metrics and episodes are the same."""
    run_dir = tmp_path / "killed"
    for stage in STAGES:
        killable.start("run_all", str(run_dir))
        deadline = time.monotonic() + 200.0
        while len(metrics_of(run_dir / "rl" / stage)) < 2:
            assert time.monotonic() < deadline, killable.output()
            time.sleep(0.005)
        killable.kill()
        assert killable.wait() == -signal.SIGKILL
        assert not (run_dir / "rl" / "policy").exists()
    killable.start("run_all", str(run_dir))
    assert killable.wait() == 0, killable.output()
    assert_same_run(run_dir / "rl", uninterrupted / "rl")
    for who in ("start", "offline", "rl", "expert"):
        folder = f"evaluation/{who}"
        assert EvalResult.load(run_dir / folder).episodes == EvalResult.load(uninterrupted / folder).episodes


def test_a_run_leaves_what_is_needed_to_judge_it(uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert {who: summary[who]["n"] for who in ("start", "offline", "rl", "expert")} == dict.fromkeys(
        ("start", "offline", "rl", "expert"), 4
    )
    assert summary["expert"]["success_rate"] == 1.0
    page = (uninterrupted / "report.html").read_text()
    assert "the agent before any training" in page
    assert "without interaction" in page
    offline, online = (metrics_of(uninterrupted / "rl" / stage) for stage in STAGES)
    assert {name for row in (*offline, *online) for name in row} <= metric_names()
    assert [row["update/num_updates"] for row in offline] == [10.0, 20.0, 30.0, 40.0]
    assert [row["rollout/env_steps"] for row in online] == [40.0, 80.0, 120.0, 160.0]
    assert ["update/td_loss" in row for row in online] == [False, False, True, True]  # the warm-up of 80 steps
    parts = [load_policy(uninterrupted / f) for f in ("start/policy", "rl/offline/policy", "rl/policy")]
    weights = [torch.cat([v.flatten() for k, v in p.state_dict().items() if k.startswith("actor")]) for p in parts]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_in_a_stage_saves_and_resume_goes_on(stage, tmp_path, uninterrupted, capsys, monkeypatch):
    """`vla-rl train`, SIGINT to this very process: in the offline stage's last iteration, in the online's second."""
    from vla_rl.train import offpolicy

    trainer = {"offline": offpolicy.OfflineTrainer, "online": offpolicy.OnlineTrainer}[stage]
    at = {"offline": 4, "online": 2}[stage]
    iterate, count = trainer.iterate, []

    def interrupted(self):
        count.append(1)
        if len(count) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return iterate(self)

    monkeypatch.setattr(trainer, "iterate", interrupted)
    demos, run_dir = str(uninterrupted / "demos"), tmp_path / "run"
    command = ["train", "small", "--dataset", demos, "--run-dir", str(run_dir)]
    assert main(command) == 130
    assert len(metrics_of(run_dir / stage)) == at
    assert (run_dir / "online").exists() == (stage == "online")
    assert main(command) == 1
    assert "add --resume to go on" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert_same_run(run_dir, uninterrupted / "rl")
    if stage == "online":
        longer = [*command, "--resume", "--train.offline.num-updates", "80"]
        assert main(longer) == 1
        assert "stage online in" in capsys.readouterr().err
        assert main([*command, "--resume", "--train.online.num-env-steps", "200"]) == 0
        assert len(metrics_of(run_dir / "online")) == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["maze_wsrl"], "this recipe learns from demonstrations; give them with --dataset"),
        (["maze_rlpd"], "this recipe learns from demonstrations; give them with --dataset"),
        (["maze_wsrl", "--dataset", "nowhere"], "nowhere"),
        (["maze_wsrl", "--dataset", "x", "--policy", "policy"], "leave --policy out"),
        (["maze_pa_rl", "--dataset", "x"], "give it with --policy"),
        (["maze_dsrl", "--dataset", "x"], "give it with --policy"),
        (["maze_wsrl", "--train.online-agent.critic.num-members", "3"], "another network offline"),
        (["maze_wsrl", "--env.layout", "spiral"], "no layout 'spiral'; choose one of wall_gap"),
    ],
)
def test_wrong_calls_say_how_to_do_it(argv, message, tmp_path, capsys):
    assert main(["train", *argv, "--run-dir", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--train.online.num-env-step", "3", "--train.online.num-env-steps"),
        ("--train.online.execution-horizon", "3", "execution_horizon is 3"),
    ],
)
def test_options_that_cannot_be_are_named(option, value, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "maze_wsrl", "--run-dir", "x", option, value])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_there_is_no_control_on_shuffled_advantages(tmp_path, capsys):
    assert main(["run", "maze_wsrl", "--run-dir", str(tmp_path / "run"), "--control"]) == 1
    assert "no advantages to shuffle" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_maze_needs_its_own_expert(tmp_path):
    from vla_rl.sim.experts import ExpertConfig
    from vla_rl.train.check import check_recipe

    recipe = small_recipe()
    with pytest.raises(TypeError, match="a maze has a WaypointConfig, a table an ExpertConfig"):
        check_recipe(replace(recipe, demos=replace(recipe.demos, expert=ExpertConfig())))


def test_demonstrations_begin_anywhere_and_episodes_of_learning_far_away(tmp_path):
    from vla_rl.data.lerobot_reader import LeRobotDataset
    from vla_rl.train.stages import record_demos

    recipe = small_recipe()
    recipe = replace(recipe, demos=replace(recipe.demos, num_episodes=30, num_envs=7))
    summary = record_demos(recipe, tmp_path / "a")
    assert summary.num_attempts == summary.num_episodes == 30  # failures are kept
    assert 10 <= summary.num_successes <= 28
    record_demos(replace(recipe, demos=replace(recipe.demos, num_envs=30)), tmp_path / "b")
    one, two = (LeRobotDataset(tmp_path / name) for name in "ab")
    for i in range(30):  # whatever the number of environments
        assert (one.episode(i).action == two.episode(i).action).all()
    starts = torch.stack([one.episode(i).state[0] for i in range(30)])
    assert starts[:, 0].max() > 0.3
    assert starts[:, 0].min() < -0.3
    env = recipe.env.make(50, split="train")
    begins = env.reset(list(range(50))).state
    assert begins[:, 0].max() < -0.4
    other = recipe.env.make(50, split="test").reset(list(range(50))).state
    assert not torch.equal(begins, other)


FROM_REPLAY = [name for name, entry in RECIPES.items() if "configs.maze" in entry or "configs.offpolicy" in entry]


@pytest.mark.parametrize("name", FROM_REPLAY)
def test_the_parts_of_every_recipe_fit(name):
    from vla_rl.train.check import check_recipe

    check_recipe(get_recipe(name))
