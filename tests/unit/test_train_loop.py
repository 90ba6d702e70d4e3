"""The on-policy loop with every algorithm: resume, errors, divergence; and the files that a run writes."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from vla_rl.configs import get_recipe
from vla_rl.core import ActionSpec, CameraSpec, EnvSpec
from vla_rl.envs.two_way_reach import TwoWayReachEnv, make_two_way_reach, scripted_demos
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.flow import FlowSamplerConfig
from vla_rl.onpolicy import ActorConfig, CriticConfig, DenoisingDiscount, FPOConfig, GRPOConfig, PPOConfig
from vla_rl.onpolicy.build import GaussianSamplerConfig
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints.config_json import config_from_dict, config_to_dict
from vla_rl.policies.checkpoints.native import load_policy
from vla_rl.policies.flow_mlp import FlowMLPConfig
from vla_rl.policies.gaussian import GaussianMLPConfig
from vla_rl.policies.tiny import TinyVLAConfig
from vla_rl.train.check import check_recipe
from vla_rl.train.checkpoint import CheckpointError, load_state, save_state
from vla_rl.train.divergence import DivergenceError
from vla_rl.train.loop import DIVERGED_FILE, POLICY_FOLDER, STATE_FILE, TrainConfig, run_training
from vla_rl.train.metric_dictionary import metric_names
from vla_rl.train.metrics import read_metrics
from vla_rl.train.recipe import DemosConfig, EvalConfig
from vla_rl.train.run_folder import RunFolderError, describe_source, open_run_folder, read_config

ACTOR = ActorConfig(minibatch_size=32, num_epochs=2)
PPO_CONFIG = PPOConfig(num_decisions=4, critic_warmup_iterations=1, actor=ACTOR)
CONFIGS = {
    "ppo_sde": TrainConfig(algorithm=PPO_CONFIG),
    "ppo_noise": TrainConfig(algorithm=PPO_CONFIG, sampler=FlowSamplerConfig(kernel="flow_noise", mode="full")),
    "dppo": TrainConfig(
        algorithm=PPO_CONFIG,
        sampler=FlowSamplerConfig(mode="full", reduction="per_step"),
        step_weighting=DenoisingDiscount(num_steps=4, gamma_denoise=0.9),
    ),
    "fpo": TrainConfig(algorithm=PPO_CONFIG, sampler=FPOConfig(num_draws=2)),
    "grpo": TrainConfig(algorithm=GRPOConfig(group_size=4, groups_per_update=2, actor=ACTOR)),
    "gaussian": TrainConfig(algorithm=PPO_CONFIG, sampler=GaussianSamplerConfig()),
}


def make_policy(name, seed=0):
    spec = make_two_way_reach(1).spec
    config = GaussianMLPConfig(action_horizon=4) if name == "gaussian" else FlowMLPConfig(width=16, num_layers=2)
    policy = build_policy(config, spec, seed=seed)
    if name == "grpo":  # a group needs a success: a policy that has seen demonstrations
        state, actions, mask = scripted_demos(20, 0)
        optimizer, generator = torch.optim.Adam(policy.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
        from vla_rl.protocols import PolicyInputs

        inputs = PolicyInputs({}, torch.zeros(len(state), 0, dtype=torch.int64), state)
        for _ in range(200):
            optimizer.zero_grad()
            policy.supervised_loss(inputs, actions, mask, generator).mean().backward()  # pyright: ignore[reportCallIssue]
            optimizer.step()
    return policy


def train(name, folder, num_iterations=4, *, policy=None, env=None, **options):
    config = replace(CONFIGS[name], num_envs=8, num_iterations=num_iterations, checkpoint_interval=2, eval_interval=0)
    policy = policy or make_policy(name)
    result = run_training(policy, env or make_two_way_reach(8), config, folder, tensorboard=False, **options)
    return policy, result


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_algorithm_runs_and_resumes_bit_for_bit(name, tmp_path):
    policy, result = train(name, tmp_path / "whole")
    assert result.finished
    train(name, tmp_path / "parts", num_iterations=2)
    other, again = train(name, tmp_path / "parts", policy=make_policy(name, seed=9), resume=True)
    assert again.num_iterations == 4
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))
    whole, parts = (read_metrics(tmp_path / folder) for folder in ("whole", "parts"))
    timed = ("time_s", "update/iteration_s")
    assert [{k: v for k, v in row.items() if k not in timed} for row in whole] == [
        {k: v for k, v in row.items() if k not in timed} for row in parts
    ]
    initial = make_policy(name)
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), initial.parameters(), strict=True))
    stored = load_policy(tmp_path / "parts" / POLICY_FOLDER, spec=make_two_way_reach(1).spec)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), stored.parameters(), strict=True))


def recipe_with(**changes):
    recipe = get_recipe("demo")
    parts = {name.split("__")[0]: {} for name in changes}
    for name, value in changes.items():
        part, _, field = name.partition("__")
        parts[part][field] = value
    return replace(recipe, **{part: replace(getattr(recipe, part), **fields) for part, fields in parts.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__execution_horizon": 99}, "execution_horizon is 99, the policy predicts 8"),
        ({"train__sampler": FlowSamplerConfig(scored_horizon=99)}, "scored_horizon 99"),
        ({"policy__num_steps": 10}, "another chain would be deployed"),
        ({"train__algorithm": PPOConfig(actor=ActorConfig(entropy_coef=0.1))}, "standard deviation is fixed"),
        ({"train__step_weighting": DenoisingDiscount(num_steps=40)}, "num_steps is 40, the sampler has 4"),
        ({"train__sampler": FPOConfig()}, "reference_kl_coef has no effect with FPOSampler"),
        ({"policy__cameras": ("wrist",)}, r"cameras are \('wrist',\)"),
        ({"evaluation__tasks": ("nonsense",)}, "nonsense"),
    ],
)
def test_parts_of_a_recipe_that_do_not_fit(changes, message):
    check_recipe(get_recipe("demo"))
    with pytest.raises(ValueError, match=message):
        check_recipe(recipe_with(**changes))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ActorConfig(target_kl=0.0),
        lambda: ActorConfig(max_grad_norm=0.0),
        lambda: ActorConfig(learning_rate_decay=1.5),
        lambda: CriticConfig(minibatch_size=0),
        lambda: TrainConfig(eval_interval=-5),
        lambda: EvalConfig(num_envs=0),
        lambda: DemosConfig(num_envs=0),
    ],
)
def test_values_without_a_meaning_are_errors(make):
    with pytest.raises(ValueError, match=r"expected|must be|unknown"):
        make()


def test_evaluation_is_logged_when_due_and_changes_nothing(tmp_path):
    calls = []

    def evaluate():
        calls.append(torch.rand(3))  # the global generator is nobody's business
        return {"eval/success_rate": 0.5}

    config = replace(CONFIGS["ppo_sde"], num_envs=8, num_iterations=5, eval_interval=2)
    policy = make_policy("ppo_sde")
    run_training(policy, make_two_way_reach(8), config, tmp_path / "a", evaluate=evaluate, tensorboard=False)
    assert [r["iteration"] for r in read_metrics(tmp_path / "a") if "eval/success_rate" in r] == [2, 4, 5]
    plain, _ = train("ppo_sde", tmp_path / "b", num_iterations=5)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), plain.parameters(), strict=True))


def test_a_run_is_not_overwritten_and_not_resumed_with_another_configuration(tmp_path):
    train("ppo_sde", tmp_path, num_iterations=2)
    with pytest.raises(FileExistsError, match="resume it"):
        train("ppo_sde", tmp_path)
    other = replace(CONFIGS["ppo_sde"], num_envs=8, execution_horizon=2)
    with pytest.raises(CheckpointError, match="execution_horizon: 4 -> 2"):
        run_training(make_policy("ppo_sde"), make_two_way_reach(8), other, tmp_path, resume=True, tensorboard=False)


class PoisonedEnv(TwoWayReachEnv):
    """Its reward becomes NaN at some control step, as a broken sensor's would."""

    def __init__(self, num_envs, good_steps):
        super().__init__(num_envs)
        self.left = good_steps

    def step(self, actions, active):
        outcome = super().step(actions, active)
        self.left -= 1
        return replace(outcome, reward=outcome.reward * math.nan) if self.left < 0 else outcome


def test_nan_stops_the_run_dumps_the_batch_and_keeps_the_last_good_checkpoint(tmp_path):
    steps_per_iteration = PPO_CONFIG.num_decisions * 4
    env = ChunkedEnv(PoisonedEnv(8, good_steps=3 * steps_per_iteration))
    with pytest.raises(DivergenceError, match="not finite") as error:
        train("ppo_sde", tmp_path, num_iterations=8, env=env)
    assert "last good checkpoint" in error.value.__notes__[0]
    assert (tmp_path / DIVERGED_FILE).stat().st_size > 0
    assert load_state(tmp_path / STATE_FILE)["num_iterations"] == 2
    assert all(bool(p.isfinite().all()) for p in load_policy(tmp_path / POLICY_FOLDER).parameters())
    _, result = train("ppo_sde", tmp_path, num_iterations=4, resume=True)  # the sensor was repaired
    assert result.finished


def test_mismatches_are_errors_before_anything_runs(tmp_path):
    with pytest.raises(TypeError, match="FlowPolicy"):
        train("ppo_sde", tmp_path, policy=make_policy("gaussian"))
    with pytest.raises(TypeError, match="GaussianPolicy"):
        train("gaussian", tmp_path, policy=make_policy("ppo_sde"))
    with pytest.raises(ValueError, match="num_iterations must be at least 1"):
        TrainConfig(num_iterations=0)
    with pytest.raises(ValueError, match="split 'tset' is unknown"):
        EvalConfig(split="tset")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- files
def test_a_state_file_is_whole_or_the_former_one(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    state = {"x": torch.arange(3), "nested": {"list": [1, 2.5, "three", None]}}
    save_state(path, state)
    torch.testing.assert_close(load_state(path)["x"], state["x"])
    assert load_state(path)["nested"] == state["nested"]

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vla_rl.train.checkpoint.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_state(path, {"x": torch.zeros(9)})
    assert len(load_state(path)["x"]) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_state_files_that_cannot_be_trusted_or_read(tmp_path):
    with pytest.raises(CheckpointError, match="no such state file"):
        load_state(tmp_path / "none.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(tmp_path / "cut.pt")
    torch.save({"call": print}, tmp_path / "foreign.pt")  # a pickle that names a function
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(tmp_path / "foreign.pt")


def test_run_folder(tmp_path):
    config = EvalConfig(num_episodes=3)
    folder = open_run_folder(tmp_path / "run", config, resume=False, kind="sft")
    assert read_config(folder, EvalConfig) == config
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["python"].startswith("3.")
    open_run_folder(folder, config, resume=False, kind="sft")  # nothing was done there yet
    (folder / "rl").mkdir()
    with pytest.raises(RunFolderError, match="--resume"):
        open_run_folder(folder, config, resume=False, kind="sft")
    with pytest.raises(RunFolderError, match="num_episodes was 3 and is 4"):
        open_run_folder(folder, EvalConfig(num_episodes=4), resume=True, kind="sft")
    assert open_run_folder(folder, config, resume=True, kind="sft") == folder
    with pytest.raises(RunFolderError, match="a run of `vla-rl sft`"):  # it would overwrite the policy it starts from
        open_run_folder(folder, config, resume=True, kind="train")
    with pytest.raises(RunFolderError, match=r"inputs\.from was None"):
        open_run_folder(folder, config, resume=True, kind="sft", inputs={"from": tmp_path})
    locked = "from vla_rl.train.run_folder import *; open_run_folder(sys.argv[1], None, resume=True, kind='sft')"
    other = [sys.executable, "-c", "import sys\n" + locked, str(folder)]
    done = subprocess.run(other, capture_output=True, text=True, timeout=120)
    assert "another process works in" in done.stderr
    with pytest.raises(RunFolderError, match=r"holds no config\.json"):
        read_config(tmp_path, EvalConfig)
    (folder / "config.json").write_text('{"num_episode": 3}')
    with pytest.raises(RunFolderError, match="did you mean 'num_episodes'"):
        read_config(folder, EvalConfig)


def test_source_is_described_with_its_changes():
    source = describe_source()
    assert set(source) == {"revision", "diff"}
    assert source["revision"].endswith("+changes") == bool(source["diff"])


# ----------------------------------------------------------------------------------------------------------- policies
SPEC = EnvSpec(
    name="bench",
    cameras={"left": CameraSpec(32, 32), "wrist": CameraSpec(32, 32)},
    state_names=("a", "b", "c"),
    action=ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0), names=("dx", "dy")),
    max_episode_steps=5,
    control_hz=20.0,
)


def test_build_policy_takes_sizes_and_cameras_from_the_environment():
    before = torch.random.get_rng_state()
    policy = build_policy(TinyVLAConfig(image_size=32), SPEC, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert policy.config.cameras == ("left", "wrist")
    assert (policy.config.state_dim, policy.config.action_dim) == (3, 2)
    same, other = (build_policy(TinyVLAConfig(image_size=32), SPEC, seed=s) for s in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), same.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="state_dim is 4, bench has 3"):
        build_policy(FlowMLPConfig(state_dim=4), SPEC, seed=0)
    with pytest.raises(ValueError, match="action_dim is 0"):
        type(policy)(TinyVLAConfig(state_dim=3))
    with pytest.raises(TypeError, match="not the config of a registered policy"):
        build_policy(TrainConfigWithSizes(), SPEC, seed=0)


class TrainConfigWithSizes(TrainConfig):
    state_dim = action_dim = 0


def test_configs_of_several_kinds_come_back_as_the_same_kind():
    for config in CONFIGS.values():
        assert config_from_dict(TrainConfig, json.loads(json.dumps(config_to_dict(config)))) == config
    broken = config_to_dict(CONFIGS["grpo"])
    broken["algorithm"]["group_sise"] = 4
    with pytest.raises(ValueError, match="are of none of these: PPOConfig"):
        config_from_dict(TrainConfig, broken)


def test_every_metric_is_explained(tmp_path):
    """The dictionary of metrics names what the loop logs, with any algorithm."""
    logged = set()
    for name in CONFIGS:
        train(name, tmp_path / name, num_iterations=2)
        logged |= {key for row in read_metrics(tmp_path / name) for key in row}
    assert len(logged) > 20
    assert sorted(logged - metric_names()) == []
