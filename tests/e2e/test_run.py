"""A whole run as users start it: all stages, killed at any moment, interrupted, resumed, repeated, wrongly called."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.killable import Killable
from vla_rl.cli import COMMANDS, main
from vla_rl.configs import RECIPES, get_recipe
from vla_rl.data.lerobot_format import DatasetSpec
from vla_rl.data.lerobot_writer import LeRobotWriter
from vla_rl.evaluation.result import EvalResult
from vla_rl.policies.checkpoints.config_json import config_from_dict, config_to_dict
from vla_rl.policies.checkpoints.native import load_policy
from vla_rl.train.offpolicy import OffPolicyConfig
from vla_rl.train.pipeline import run_pipeline
from vla_rl.train.recipe import Recipe


def small_recipe() -> Recipe:
    recipe = get_recipe("demo_smoke")
    return replace(
        recipe,
        env=replace(recipe.env, image_size=32),
        policy=replace(recipe.policy, image_size=32),
        demos=replace(recipe.demos, num_episodes=6),
        sft=replace(recipe.sft, num_updates=8, batch_size=8, checkpoint_interval=3, log_interval=2),
        train=replace(recipe.train, num_iterations=6, num_envs=4, checkpoint_interval=2, eval_interval=0),
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


def metrics_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.endswith(("time_s", "iteration_s", "samples_per_s"))} for row in rows
    ]


def test_a_run_killed_at_any_moment_ends_as_an_uninterrupted_one(tmp_path, killable, uninterrupted):
    """kill -9 after random delays; in the end parameters, metrics and episodes are the same bit for bit."""
    run_dir, rng, kills = tmp_path / "killed", random.Random(0), 0
    for delay_s in [rng.uniform(0.3, 2.5) for _ in range(5)] + [600.0]:
        killable.start("run_all", str(run_dir))
        deadline = time.monotonic() + delay_s
        while time.monotonic() < deadline and not (run_dir / "summary.json").exists():
            time.sleep(0.01)
        if (run_dir / "summary.json").exists():
            assert killable.wait() == 0, killable.output()
            break
        killable.kill()
        assert killable.wait() == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    for stage in ("sft", "rl"):
        file = f"{stage}/policy/policy.safetensors"
        assert (run_dir / file).read_bytes() == (uninterrupted / file).read_bytes(), stage
        assert metrics_of(run_dir / stage) == metrics_of(uninterrupted / stage)
    assert metrics_of(run_dir / "rl")[-1]["update/actor_steps"] > 0
    for who in ("sft", "rl", "expert"):
        folder = f"evaluation/{who}"
        assert EvalResult.load(run_dir / folder).episodes == EvalResult.load(uninterrupted / folder).episodes


def test_a_run_leaves_what_is_needed_to_repeat_and_to_judge_it(uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    for who in ("sft", "rl", "expert"):
        assert summary[who]["n"] == 4
        assert summary[who]["low"] <= summary[who]["success_rate"] <= summary[who]["high"]
    assert set(summary["wall_s"]) == {"demonstrations", "sft", "rl", "evaluation", "report"}
    assert summary["peak_rss_mb"] > 100
    assert config_from_dict(Recipe, json.loads((uninterrupted / "config.json").read_text())) == small_recipe()
    provenance = json.loads((uninterrupted / "provenance.json").read_text())
    assert provenance["versions"]["torch"] == torch.__version__
    page = (uninterrupted / "report.html").read_text()
    assert page.count("data:video/mp4") == 2
    assert "Success on evaluation episodes" not in page  # the recipe asked for no curve
    before, after = (load_policy(uninterrupted / stage / "policy").state_dict() for stage in ("sft", "rl"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"expert"}  # the encoder was frozen


def test_ctrl_c_saves_and_resume_goes_on(tmp_path, uninterrupted, capsys, monkeypatch):
    """SIGINT to this very process, at the third iteration."""
    from vla_rl.train import loop

    iterate, count = loop.Trainer.iterate, []

    def interrupted(trainer):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return iterate(trainer)

    monkeypatch.setattr(loop.Trainer, "iterate", interrupted)
    monkeypatch.setitem(RECIPES, "small", f"{__name__}:small_recipe")
    command = ["run", "small", "--run-dir", str(tmp_path / "run"), "--resume"]
    assert main(command) == 130
    assert "add --resume" in capsys.readouterr().err
    assert len(metrics_of(tmp_path / "run" / "rl")) == 3
    assert main(command[:-1]) == 1
    assert "add --resume to go on" in capsys.readouterr().err
    assert main(command) == 0
    file = "rl/policy/policy.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (uninterrupted / file).read_bytes()


def test_a_finished_run_is_moved_aside_and_never_lost(tmp_path, uninterrupted, monkeypatch):
    from vla_rl.train.pipeline import _set_aside_if_finished

    run_dir = tmp_path / "run"
    run_dir.symlink_to(uninterrupted)
    _set_aside_if_finished(run_dir, control=True)  # the control is still to be done
    assert run_dir.exists()
    (tmp_path / "run.1").mkdir()
    _set_aside_if_finished(run_dir, control=False)
    assert not run_dir.exists()
    assert (tmp_path / "run.2" / "report.html").exists()


def test_another_configuration_is_not_resumed(tmp_path, uninterrupted, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "demos").mkdir()
    for name in ("config.json", "provenance.json"):
        shutil.copy(uninterrupted / name, tmp_path / "run" / name)
    monkeypatch.setitem(RECIPES, "small", f"{__name__}:small_recipe")
    command = ["run", "small", "--run-dir", str(tmp_path / "run"), "--resume", "--sft.learning-rate", "0.5"]
    assert main(command) == 1
    assert "sft.learning_rate was 0.002 and is 0.5" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run")]) == 1
    assert "has no evaluation yet" in capsys.readouterr().err
    page = (uninterrupted / "report.html").read_text()
    assert main(["report", str(uninterrupted)]) == 0
    assert (uninterrupted / "report.html").read_text() == page


def test_stages_by_hand_and_evaluation_of_a_run(tmp_path, uninterrupted, monkeypatch, capsys):
    """The commands of the single stages give what the whole run gives; evaluation finds the run's own recipe."""
    monkeypatch.setitem(RECIPES, "small", f"{__name__}:small_recipe")
    demos, sft, rl = (str(tmp_path / name) for name in ("demos", "sft", "rl"))
    assert main(["demos", "small", "--out", demos]) == 0
    assert main(["sft", "small", "--dataset", demos, "--run-dir", sft]) == 0
    assert main(["train", "small", "--policy", f"{sft}/policy", "--run-dir", rl]) == 0
    for name, folder in (("sft", sft), ("rl", rl)):
        ours = (tmp_path / name / "policy" / "policy.safetensors").read_bytes()
        assert ours == (uninterrupted / name / "policy" / "policy.safetensors").read_bytes(), folder
    assert (
        main(["eval", "--policy", f"{rl}/policy", "--out", str(tmp_path / "eval"), "--evaluation.num-envs", "3"]) == 0
    )
    theirs = EvalResult.load(uninterrupted / "evaluation" / "rl").episodes
    assert EvalResult.load(tmp_path / "eval").episodes == theirs  # whatever the number of environments
    capsys.readouterr()
    assert main(["compare", str(uninterrupted / "evaluation" / "sft"), str(tmp_path / "eval"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["against_first"][0]["overall"]["first"]["n"] == 4


def test_demonstrations_of_two_kinds_do_not_mix(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "small", f"{__name__}:small_recipe")
    command = ["demos", "small", "--out", str(tmp_path / "demos"), "--demos.num-episodes"]
    assert main([*command, "2"]) == 0
    assert main([*command, "3", "--demos.expert.max-action", "0.5", "--env.randomization", "test"]) == 1
    assert "another env.randomization, demos.expert" in capsys.readouterr().err
    recorded = tmp_path / "demos" / "meta" / "recipe.json"
    stored = json.loads(recorded.read_text())
    del stored["env"]["shift"]  # as a version without that option wrote it
    recorded.write_text(json.dumps(stored))
    assert main([*command, "3"]) == 0  # more of the same
    assert "3 episodes" in capsys.readouterr().out


def test_evaluations_in_other_worlds_are_told_apart(uninterrupted, tmp_path, capsys):
    policy = str(uninterrupted / "sft" / "policy")
    assert main(["eval", "--policy", policy, "--out", str(tmp_path / "e"), "--env.randomization", "test"]) == 0
    capsys.readouterr()
    command = ["compare", str(uninterrupted / "evaluation" / "sft"), str(tmp_path / "e")]
    assert main(command) == 1
    assert "was evaluated on suite recipe v1" in capsys.readouterr().err
    assert main([*command, "--across-suites"]) == 0
    assert "randomization is 'off' in" in capsys.readouterr().out


def test_an_empty_dataset_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "small", f"{__name__}:small_recipe")
    env = small_recipe().env.make(1, split="train")
    with LeRobotWriter.open(tmp_path / "demos", DatasetSpec.from_env(env.spec)):
        pass
    assert main(["sft", "small", "--dataset", str(tmp_path / "demos"), "--run-dir", str(tmp_path / "run")]) == 1
    assert "no episode to learn from" in capsys.readouterr().err


def test_a_run_that_died_in_its_report_only_writes_the_report(tmp_path, uninterrupted, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    (run_dir / "summary.json").unlink()
    run_pipeline(small_recipe(), run_dir, resume=True)
    assert (run_dir / "summary.json").exists()
    assert not (tmp_path / "run.1").exists()
    assert metrics_of(run_dir / "rl") == metrics_of(uninterrupted / "rl")


def test_options_reach_the_stages(tmp_path, uninterrupted, monkeypatch, capsys):
    """A behaviour-cloning term on the demonstrations, in randomised worlds; and what it lacks without a dataset."""
    monkeypatch.setitem(RECIPES, "small", f"{__name__}:small_recipe")
    command = ["train", "small", "--policy", str(uninterrupted / "sft" / "policy"), "--env.randomization", "train"]
    command += ["--train.algorithm.actor.bc-coef", "0.1", "--train.num-iterations", "3"]
    assert main([*command, "--run-dir", str(tmp_path / "without")]) == 1
    assert "give --dataset" in capsys.readouterr().err
    assert main([*command, "--run-dir", str(tmp_path / "with"), "--dataset", str(uninterrupted / "demos")]) == 0
    metrics = metrics_of(tmp_path / "with")
    assert metrics[-1]["update/bc_loss"] > 0
    plain = metrics_of(uninterrupted / "rl")
    assert metrics[0]["update/value_mean"] != plain[0]["update/value_mean"]  # the worlds look and move differently


def test_a_recipe_of_ones_own(tmp_path, monkeypatch, capsys):
    """`module:function` from the working folder, as docs/add_a_task.md has it."""
    page = (Path(__file__).parents[2] / "docs" / "add_a_task.md").read_text()
    (tmp_path / "move_aside.py").write_text(page.split("```python\n")[1].split("```")[0])
    recipe = next(block for block in page.split("```py\n") if block.startswith("from dataclasses")).split("```")[0]
    (tmp_path / "my_recipes.py").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    assert main(["demos", "my_recipes:aside", "--out", "demos", "--demos.num-episodes", "2", "--seed", "3"]) == 0
    assert "2 episodes" in capsys.readouterr().out
    assert main(["demos", "my_recipes:other", "--out", "x"]) == 1
    assert "has no attribute 'other'" in capsys.readouterr().err


def test_the_readme_is_right(uninterrupted, capsys):
    """Its Python runs (on a small policy, for one iteration), and its commands and options exist."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    for said, here in (
        ("runs/demo/sft/policy", str(uninterrupted / "sft" / "policy")),
        ("num_envs=64", "num_envs=2"),
        ("range(100)", "range(1)"),
    ):
        assert said in code
        code = code.replace(said, here)
    exec(compile(code, "README.md", "exec"), {})
    assert "rollout/success_rate" in capsys.readouterr().out
    lines = [line.split("#")[0].split() for line in readme.splitlines() if line.startswith("vla-rl ")]
    assert {line[1] for line in lines} >= set(COMMANDS)
    for _, command, *arguments in lines:
        if command == "recipes":
            continue
        without = ("doctor", "compare", "serve", "twin", "deploy")
        first = arguments[: command not in without]
        if command == "eval":
            first = ["--policy", "x", *(["--suite", "reach"] if "--suite" in arguments else ["--recipe", "demo"])]
        with pytest.raises(SystemExit):
            main([command, *first, "--help"])
        shown = capsys.readouterr().out
        assert [a for a in arguments if a.startswith("--") and a not in shown] == [], command


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 2, ""),
        (["trian", "demo"], 2, "did you mean 'train'"),
        (["run"], 2, "name a recipe first"),
        (["run", "dmeo", "--run-dir", "x"], 1, "did you mean 'demo'"),
        (["eval", "--policy", "nowhere/policy", "--out", "x"], 2, "lies in no run folder"),
        (
            ["eval", "--policy", "nowhere/policy", "--recipe", "demo", "--out", "x"],
            2,
            "there is no policy 'nowhere/policy'",
        ),
        (["train", "demo", "--policy", "nowhere", "--run-dir", "RUN"], 1, "nowhere is no folder"),
        (["sft", "demo", "--dataset", "nowhere", "--run-dir", "RUN"], 1, "nowhere"),
        (["compare", "nowhere", "x"], 1, "holds no eval.json"),
        (["run", "demo", "--run-dir", "RUN", "--evaluation.split", "tset"], 2, ""),
        (["run", "demo", "--run-dir", "RUN", "--env.task", "fly"], 1, "task 'fly' is unknown"),
    ],
)
def test_wrong_calls_say_how_to_do_it(argv, code, message, tmp_path, capsys):
    argv = [str(tmp_path / "run") if a == "RUN" else a for a in argv]
    try:
        result = main(argv)
    except SystemExit as stop:  # tyro's own way for a wrong option
        result = stop.code
    assert result == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "demos", "sft", "train", "eval"])
def test_help_names_a_call_that_shows_the_options(command, capsys):
    assert main([command, "--help"]) == 0
    hint = capsys.readouterr().out.splitlines()[-1]
    called = hint[hint.index("vla-rl") :].split(",")[0].split()[1:]
    assert called[0] == command
    with pytest.raises(SystemExit) as stop:
        main(called)
    assert stop.value.code == 0
    assert {"eval": "--episodes", "demos": "--out"}.get(command, "--run-dir") in capsys.readouterr().out


def test_an_unknown_option_is_named_with_a_suggestion(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "demo", "--run-dir", "x", "--train.num-iteration", "3"])
    assert stop.value.code == 2
    assert "--train.num-iterations" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_survives_its_file_and_has_a_description(name):
    recipe = get_recipe(name)
    assert config_from_dict(Recipe, json.loads(json.dumps(config_to_dict(recipe)))) == recipe
    seeded = recipe.with_seed(7)
    assert (seeded.demos.seed, seeded.sft.seed) == (7, 7)
    assert seeded.evaluation == recipe.evaluation
    if isinstance(recipe.train, OffPolicyConfig):
        with pytest.raises(ValueError, match="no advantages to shuffle"):
            recipe.control()
        stages = [s for s in (seeded.train.cloning, seeded.train.offline, seeded.train.online) if s is not None]
        assert {stage.seed for stage in stages} == {7}
        return
    assert seeded.train.algorithm.seed == 7
    control = recipe.control()
    assert control.train.algorithm.shuffle_advantages
    assert replace(control.train.algorithm, shuffle_advantages=False) == recipe.train.algorithm
