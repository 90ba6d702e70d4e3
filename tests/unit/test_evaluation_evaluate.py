"""Evaluation with a real environment and a real torch policy: what it counts, what it must not depend on."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from vla_rl.core import ActionChunk, ActionSpec, CameraSpec, EnvSpec, Observation
from vla_rl.envs.tabletop import make_tabletop
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.evaluation.action_curves import read_plan
from vla_rl.evaluation.evaluate import Finished, Labels, evaluate, evaluate_controller, play, policy_noise
from vla_rl.evaluation.result import EPISODES_FILE, SCHEMA_VERSION, SUMMARY_FILE, Episode, EvalResult
from vla_rl.evaluation.video import read_video
from vla_rl.policies.tiny import TinyVLA, TinyVLAConfig
from vla_rl.protocols import StepOutcome
from vla_rl.rollout.recorder import EpisodeRecorder

HORIZON, DIM = 4, 2


class PointEnv:
    """A point in the plane that should touch a goal disc. The seed decides start, goal and a drift of every step.

    `end_on_success=False` lets it go on, so that it may leave the goal again. State: position, goal, previous action.
    """

    def __init__(self, num_envs: int, *, max_steps: int | None = 19, end_on_success: bool = True) -> None:
        self.num_envs = num_envs
        self.end_on_success = end_on_success
        self.spec = EnvSpec(
            name="point",
            cameras={"top": CameraSpec(12, 12)},
            state_names=("x", "y", "goal_x", "goal_y", "last_x", "last_y"),
            action=ActionSpec((-0.3, -0.3), (0.3, 0.3), ("dx", "dy")),
            max_episode_steps=max_steps,
            control_hz=10.0,
        )
        self.position = torch.zeros(num_envs, 2)
        self.goal = torch.zeros(num_envs, 2)
        self.last = torch.zeros(num_envs, 2)
        self.seeds = torch.zeros(num_envs, dtype=torch.int64)
        self.clock = torch.zeros(num_envs, dtype=torch.int64)
        self.num_rendered = 0

    def reset(self, env_ids, seeds):
        assert env_ids.tolist() == sorted(env_ids.tolist())  # batched engines insist on it
        for i, seed in zip(env_ids.tolist(), seeds.tolist(), strict=True):
            rng = np.random.default_rng(seed)
            self.position[i] = torch.from_numpy(rng.uniform(-1, 1, 2)).float()
            self.goal[i] = torch.from_numpy(rng.uniform(-1, 1, 2)).float()
        self.last[env_ids] = 0
        self.seeds[env_ids] = seeds
        self.clock[env_ids] = 0

    def step(self, actions, active):
        drift = 0.05 * torch.sin(self.seeds[:, None] + torch.stack([self.clock, self.clock + 1], 1).float())
        moved = self.position + self.spec.action.clamp(actions) + drift
        self.position = torch.where(active[:, None], moved, self.position)
        self.last = torch.where(active[:, None], actions, self.last)
        self.clock += active
        distance = (self.position - self.goal).norm(dim=1)
        success, lost = distance < 0.12, self.position.abs().amax(dim=1) > 3
        return StepOutcome(-distance, (success & self.end_on_success) | lost, torch.zeros_like(success), success)

    def observe(self, env_ids, images):
        state = torch.cat([self.position, self.goal, self.last], dim=1)[env_ids]
        sentences = tuple(f"go to the {'left' if self.goal[i, 0] < 0 else 'right'}" for i in env_ids.tolist())
        return Observation({"top": self.render(env_ids)} if images else {}, state, sentences)

    def render(self, env_ids):
        self.num_rendered += len(env_ids)
        pictures = torch.full((len(env_ids), 12, 12, 3), 255, dtype=torch.uint8)
        for j, i in enumerate(env_ids.tolist()):
            row, column = ((self.position[i] + 1.5) * 4).long().clamp(0, 11).tolist()
            pictures[j, row, column] = torch.tensor([200, 0, 0], dtype=torch.uint8)
        return pictures

    def state_dict(self):
        return {"position": self.position.clone()}

    def load_state_dict(self, state):
        self.position = state["position"].clone()

    def close(self):
        pass


class MLPPolicy(nn.Module):
    """A random network around a proportional controller: chaotic enough that one wrong bit shows in an episode."""

    action_horizon, action_dim = HORIZON, DIM

    def __init__(self, seed: int = 0, gain: float = 0.2) -> None:
        super().__init__()
        self.gain = gain
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(6 + HORIZON * DIM, 96), nn.Tanh(), nn.Linear(96, HORIZON * DIM))
        self.dropout = nn.Dropout(0.5)
        self.batch_sizes: list[int] = []

    def act(self, obs, noise):
        self.batch_sizes.append(len(obs))
        out = self.net(torch.cat([self.dropout(obs.state), noise.flatten(1)], dim=1)).view(-1, HORIZON, DIM)
        towards = self.gain * (obs.state[:, 2:4] - obs.state[:, :2])
        return ActionChunk(towards[:, None] + 0.5 * out + 0.1 * noise)


def make_env(n: int) -> ChunkedEnv:
    return ChunkedEnv(PointEnv(n), auto_reset=False)


def run(seeds=range(100, 140), policy=None, env=make_env, **options) -> EvalResult:
    defaults = {"execution_horizon": 3, "policy_batch_size": 8, "num_envs": 8, "progress": False}
    return evaluate(policy or MLPPolicy(), env, list(seeds), **{**defaults, **options})


def one_episode_at_a_time(seed: int, noise_seed: int = 0, batch: int = 8, row: int = 0) -> Episode:
    """A plain loop over one environment, written independently of the evaluation."""
    env, policy = make_env(1), MLPPolicy().eval()
    obs = env.reset([seed])
    instruction, length, total, once, decision = obs.instruction[0], 0, 0.0, False, 0
    while True:
        noise = torch.zeros(batch, HORIZON, DIM)
        noise[row] = policy_noise(noise_seed, seed, decision, HORIZON, DIM)
        with torch.no_grad():
            actions = policy.act(obs.select(torch.zeros(batch, dtype=torch.int64)), noise).actions
        step = env.step(actions[row : row + 1, :3])
        length += int(step.executed.sum())
        total += float(step.rewards.double().sum())
        once |= bool(step.success[0])
        decision += 1
        if bool(step.ended[0]):
            at_end, terminated = bool(step.success_at_end[0]), bool(step.terminated[0])
            return Episode("point", seed, instruction, once, at_end, length, total, terminated, initial_state=str(seed))
        obs = step.obs


# --------------------------------------------------------------------------------------------------- independence
def test_episodes_do_not_depend_on_the_number_of_environments():
    reference = run(num_envs=1)
    lengths = {episode.length for episode in reference.episodes}
    assert 0.2 < reference.success_once.rate < 0.95
    assert len(lengths) > 5  # ends at many places of a chunk, so the slots really mix
    for num_envs in (3, 16, 40, 64):
        assert run(num_envs=num_envs) == reference


def test_an_episode_does_not_depend_on_its_company():
    everything = run(seeds=range(100, 140))
    part = run(seeds=range(116, 124))  # the same rows of the policy's batch: 116 is episode 16 there and 0 here
    assert part.episodes == everything.episodes[16:24]


@pytest.mark.parametrize("seed", [100, 105, 117])
def test_an_episode_equals_a_plain_loop(seed):
    result = run()
    episode = next(e for e in result.episodes if e.seed == seed)
    assert episode == one_episode_at_a_time(seed, row=(seed - 100) % 8)


def test_the_policy_always_sees_one_batch_size():
    for num_envs in (1, 5, 20):
        policy = MLPPolicy()
        run(policy=policy, num_envs=num_envs)
        assert set(policy.batch_sizes) == {8}


def test_rows_seldom_meet_in_a_long_evaluation():
    policy = MLPPolicy()
    result = run(seeds=range(200), policy=policy, num_envs=8)
    decisions = sum(math.ceil(e.length / 3) for e in result.episodes)
    assert len(policy.batch_sizes) < 1.25 * decisions / 8  # full batches but for the tail: 1.15 measured


def test_the_noise_seed_matters_and_is_recorded():
    assert run(noise_seed=1).episodes != run(noise_seed=0).episodes
    assert run(noise_seed=1).config["noise_seed"] == 1


def test_policy_noise_is_standard_normal_and_never_repeats():
    draws = torch.stack([policy_noise(0, seed, d, 50, 4) for seed in range(20) for d in range(10)])
    assert draws.dtype == torch.float32
    assert abs(float(draws.mean())) < 0.02
    assert abs(float(draws.std()) - 1) < 0.02
    assert len({tuple(x.flatten().tolist()) for x in draws}) == len(draws)
    assert torch.equal(policy_noise(3, 5, 7, 8, 2), policy_noise(3, 5, 7, 8, 2))
    assert not torch.equal(policy_noise(3, 5, 7, 8, 2), policy_noise(5, 3, 7, 8, 2))
    correlation = torch.corrcoef(draws.flatten(1))
    assert float((correlation - torch.eye(len(draws))).abs().max()) < 0.4  # 200 numbers each: 5.5 sigma


def test_dropout_is_off_and_the_mode_comes_back():
    policy = MLPPolicy()
    policy.train()
    policy.net.eval()  # a frozen part keeps its own mode
    assert run(policy=policy) == run(policy=MLPPolicy().eval())
    assert policy.training
    assert policy.dropout.training
    assert not policy.net.training


# ----------------------------------------------------------------------------------------------------- accounting
def test_success_once_and_at_end_differ_where_the_episode_goes_on():
    def env(n):
        return ChunkedEnv(PointEnv(n, end_on_success=False), auto_reset=False)

    result = run(env=env, policy=MLPPolicy(gain=0.3))
    once = [e.success_once for e in result.episodes]
    at_end = [e.success_at_end for e in result.episodes]
    assert sum(at_end) < sum(once)
    assert all(o for o, a in zip(once, at_end, strict=True) if a)
    assert result.success_at_end.successes == sum(at_end)
    stays = [e for e in result.episodes if not e.terminated]
    assert {e.length for e in stays} == {19}


def test_an_environment_without_a_limit_needs_one():
    def env(n):
        return ChunkedEnv(PointEnv(n, max_steps=None), auto_reset=False)

    with pytest.raises(ValueError, match="max_episode_steps"):
        run(env=env)
    result = run(env=env, policy=MLPPolicy(gain=0.0), max_episode_steps=9)
    assert max(e.length for e in result.episodes) == 9  # three chunks of three
    assert run(env=env, policy=MLPPolicy(gain=0.0), max_episode_steps=9, num_envs=3) == result
    with pytest.raises(ValueError, match="own limit"):
        run(max_episode_steps=9)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"execution_horizon": 5}, "predicts 4 steps"),
        ({"execution_horizon": 0}, "choose from 1 to 4"),
        ({"seeds": []}, "no episode seeds"),
        ({"seeds": [1, 2, 1]}, r"\[1\] are there twice"),
        ({"seeds": [-1]}, "must be >= 0"),
        ({"num_envs": 0}, "num_envs"),
        ({"env": lambda n: ChunkedEnv(PointEnv(n))}, "auto_reset=False"),
    ],
)
def test_bad_requests_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        run(**options)


def test_a_policy_of_another_action_dimension_is_refused():
    policy = MLPPolicy()
    policy.action_dim = 7
    with pytest.raises(ValueError, match=r"7 action dimensions, point expects 2 \(dx, dy\)"):
        run(policy=policy)


# ----------------------------------------------------------------------------------------------------- controllers
def straight_to_the_goal(env: ChunkedEnv):
    """Acts from the environment's own state, one step at a time, as a scripted expert does."""
    inner = env.step_env
    return lambda: 0.5 * (inner.goal - inner.position)[:, None]


def test_a_controller_is_evaluated_on_the_same_episodes():
    expert = evaluate_controller(make_env, straight_to_the_goal, range(100, 140), num_envs=7, progress=False)
    learned = run()
    assert [e.key for e in expert.episodes] == [e.key for e in learned.episodes]
    assert expert.success_once.rate > max(0.9, learned.success_once.rate)
    for num_envs in (1, 40):
        assert (
            evaluate_controller(make_env, straight_to_the_goal, range(100, 140), num_envs=num_envs, progress=False)
            == expert
        )
    with pytest.raises(ValueError, match="num_envs"):
        evaluate_controller(make_env, straight_to_the_goal, [1], num_envs=0, progress=False)


# ------------------------------------------------------------------------------------------- the project's simulator
def test_a_vision_policy_on_the_tabletop_does_not_depend_on_the_number_of_environments():
    def env(n):
        return make_tabletop("reach", n, cameras={"agent": 64}, split="test", auto_reset=False)

    probe = env(1)
    spec = probe.spec
    probe.close()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = TinyVLA(TinyVLAConfig(spec.state_dim, spec.action.dim))
    results = [
        evaluate(policy, env, range(7), execution_horizon=8, num_envs=n, policy_batch_size=4, progress=False)
        for n in (1, 3, 7)
    ]
    assert results[0] == results[1] == results[2]
    assert len({episode.instruction for episode in results[0].episodes}) > 3


# ---------------------------------------------------------------------------------------------------------- files
def test_a_result_survives_the_disk(tmp_path):
    result = run(config={"checkpoint": "sft"})
    result.save(tmp_path)
    loaded = EvalResult.load(tmp_path)
    assert loaded == result
    summary = json.loads((tmp_path / SUMMARY_FILE).read_text())
    assert summary["n"] == 40
    assert summary["config"]["checkpoint"] == "sft"
    assert summary["success_once"]["low"] < summary["success_once"]["success_rate"] < summary["success_once"]["high"]
    assert (summary["schema_version"], summary["suite"]) == (SCHEMA_VERSION, None)
    table = pq.read_table(tmp_path / EPISODES_FILE)
    assert table.column_names == [f.name for f in dataclasses.fields(Episode)]
    assert table["seed"].to_pylist() == list(range(100, 140))
    assert loaded.timing == result.timing


def test_the_clock_is_read_and_decides_nothing(tmp_path):
    class Slow(MLPPolicy):
        def act(self, obs, noise):
            time.sleep(0.004)
            return super().act(obs, noise)

    slow = run(policy=Slow())
    assert slow == run()
    timing = slow.timing
    assert timing.num_decisions == sum(math.ceil(e.length / 3) for e in slow.episodes)
    assert 4 < timing.policy_ms["p50"] <= timing.policy_ms["p95"] <= timing.policy_ms["p99"] <= timing.policy_ms["max"]
    assert timing.env_ms["p50"] > 0
    assert 0 < timing.decisions_per_s < 8 / 0.004
    assert all(e.latency_ms > 4 for e in slow.episodes)
    successes = [e.length / 10 for e in slow.episodes if e.success_once]
    assert timing.cycle_time_s["p50"] == pytest.approx(np.median(successes))
    assert timing.cycle_time_s["max"] == max(successes)
    slow.save(tmp_path)
    assert json.loads((tmp_path / SUMMARY_FILE).read_text())["timing"]["num_decisions"] == timing.num_decisions
    assert run(seeds=[101], policy=MLPPolicy(gain=0)).timing.cycle_time_s is None


def test_part_of_the_episodes_is_the_same_part():
    def part(**options):
        return play(
            MLPPolicy(), make_env, range(100, 140), execution_horizon=3, num_envs=8, policy_batch_size=8, **options
        )

    heard: list[Finished] = []
    finished = part(todo=[3, 17, 30], on_finish=lambda one: bool(heard.append(one)))
    assert [one.episode for one in finished] == [run().episodes[i] for i in (3, 17, 30)]
    assert sorted(heard, key=lambda one: one.index) == list(finished)
    assert all(len(one.policy_ms) == len(one.env_ms) == math.ceil(one.episode.length / 3) for one in finished)
    with pytest.raises(ValueError, match="todo must name some of the 40"):
        part(todo=[40])
    ended: list[Finished] = []
    stopped = part(on_finish=lambda one: ended.append(one) or len(ended) >= 5)
    assert 5 <= len(ended) == len(stopped) < 40


def test_a_policy_of_independent_rows_gets_only_those_that_are_asked_for():
    class Alone(MLPPolicy):
        rows_are_independent = True

        def act(self, obs, noise):
            one_by_one = [
                super(Alone, self).act(obs.select(torch.tensor([i])), noise[i : i + 1]) for i in range(len(obs))
            ]
            self.batch_sizes.append(len(obs))
            return ActionChunk(torch.cat([chunk.actions for chunk in one_by_one]))

    policies = [Alone(), Alone()]
    results = [run(policy=policy, num_envs=n) for policy, n in zip(policies, (3, 40), strict=True)]
    assert results[0] == results[1]
    assert [max(policy.batch_sizes) for policy in policies] == [3, 40]
    decisions = sum(math.ceil(e.length / 3) for e in results[0].episodes)
    assert sum(size for size in policies[0].batch_sizes) == 2 * decisions  # one row, and the call it was in


def test_labels_stages_and_clamps_are_columns():
    class Staged(PointEnv):
        stage_names = ("near", "touched")

        def furthest_stage(self):
            distance = (self.position - self.goal).norm(dim=1)
            return [1 if d < 0.12 else 0 if d < 0.5 else -1 for d in distance.tolist()]

        def clamped_steps(self):
            return self.clock.tolist()

    labels = Labels(condition="light@2", initial_state=lambda seed: str(seed % 7))
    result = run(env=lambda n: ChunkedEnv(Staged(n), auto_reset=False), labels=labels)
    assert list(result.per_condition) == ["light@2"]
    assert result.episodes[0].key == ("point", "light@2", 100)
    assert [e.initial_state for e in result.episodes] == [str(seed % 7) for seed in range(100, 140)]
    assert {e.stage for e in result.episodes} == {"", "near", "touched"}
    assert all((e.stage == "touched") == e.success_once for e in result.episodes)
    assert [e.num_clamped for e in result.episodes] == [e.length for e in result.episodes]


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=SUMMARY_FILE):
        EvalResult.load(tmp_path)
    result = run(seeds=range(6))
    result.save(tmp_path)
    whole = (tmp_path / EPISODES_FILE).read_bytes()
    table = pq.read_table(tmp_path / EPISODES_FILE)
    pq.write_table(table.slice(0, 5), tmp_path / EPISODES_FILE)
    with pytest.raises(ValueError, match="tells of 6 episodes"):
        EvalResult.load(tmp_path)
    (tmp_path / EPISODES_FILE).write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="damaged"):
        EvalResult.load(tmp_path)
    pq.write_table(table.drop_columns(["stage"]), tmp_path / EPISODES_FILE)
    with pytest.raises(ValueError, match="must have the columns task string, seed int64"):
        EvalResult.load(tmp_path)
    summary = json.loads((tmp_path / SUMMARY_FILE).read_text())
    (tmp_path / SUMMARY_FILE).write_text(json.dumps(summary | {"schema_version": 1}))
    with pytest.raises(ValueError, match="schema version 1, this program reads 2"):
        EvalResult.load(tmp_path)


def test_tasks_are_merged_with_a_row_each():
    one, two = run(seeds=range(10), task="left"), run(seeds=range(10), task="right", noise_seed=0)
    assert "stage_names" not in EvalResult.merge([one, two]).config
    one = dataclasses.replace(one, config={**one.config, "stage_names": ["reach", "grasp"]})
    two = dataclasses.replace(two, config={**two.config, "stage_names": ["reach", "push"]})
    merged = EvalResult.merge([one, two])
    assert merged.config["stage_names"] == ["reach", "grasp", "push"]
    assert list(merged.per_task) == ["left", "right"]
    assert merged.success_once.n == 20
    assert merged.success_once.successes == 2 * one.success_once.successes
    table = merged.format_table()
    assert [line.split()[0] for line in table.splitlines()] == ["task", "left", "right", "all"]
    with pytest.raises(ValueError, match="noise_seed"):
        EvalResult.merge([one, run(seeds=range(10), task="right", noise_seed=1)])
    with pytest.raises(ValueError, match="twice"):
        EvalResult.merge([one, one])


# ---------------------------------------------------------------------------------------------------------- videos
def test_chosen_episodes_are_filmed_and_only_they(tmp_path):
    envs: list[PointEnv] = []

    def env(n):
        envs.append(PointEnv(n))
        return ChunkedEnv(envs[-1], auto_reset=False, images=False)

    recorder = EpisodeRecorder(tmp_path / "videos", seeds=[103, 131], control_hz=10)
    filmed = run(env=env, record=recorder, labels=Labels(folder=tmp_path))
    videos = {e.seed: e.video for e in filmed.episodes if e.video}
    assert videos == {seed: f"videos/episode_{seed}.mp4" for seed in (103, 131)}
    assert [dataclasses.replace(e, video="") for e in filmed.episodes] == list(run().episodes)
    lengths = {e.seed: e.length for e in filmed.episodes}
    assert envs[0].num_rendered == lengths[103] + lengths[131]
    assert set(recorder.recordings) == {103, 131}
    for seed, recording in recorder.recordings.items():
        episode = next(e for e in filmed.episodes if e.seed == seed)
        assert recording.num_frames == episode.length
        assert (recording.success, recording.instruction) == (episode.success_once, episode.instruction)
        assert len(read_video(recording.path)) == episode.length
        plan = read_plan(recording.path)
        assert plan.chunks.shape[1:] == (MLPPolicy.action_horizon, MLPPolicy.action_dim)
        assert (plan.num_steps, plan.executed.max()) == (episode.length, filmed.config["execution_horizon"])
    assert not recorder.wants(103)


def test_an_interrupted_evaluation_leaves_no_half_video(tmp_path):
    class Breaks(MLPPolicy):
        def act(self, obs, noise):
            if len(self.batch_sizes) == 2:
                raise KeyboardInterrupt
            return super().act(obs, noise)

    recorder = EpisodeRecorder(tmp_path, seeds=range(100, 140), control_hz=10)
    with pytest.raises(KeyboardInterrupt):
        run(policy=Breaks(gain=0.05), record=recorder)
    assert {p.name for p in tmp_path.iterdir()} == {r.path.name for r in recorder.recordings.values()}


def test_progress_shows_episodes_and_the_rate(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    result = run(progress=True)
    last = stream.getvalue().splitlines()[-1]
    assert "evaluation: 40/40 ep" in last
    assert f"success {result.success_once.rate:.2f}" in last
