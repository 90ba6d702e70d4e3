"""The curriculum's shares by hand, its choice of tasks by seed, and a run on several tasks that resumes bit for bit."""

from collections import Counter

import pytest
import torch

from vla_rl.envs.config import EnvConfig
from vla_rl.envs.point_maze import make_point_maze
from vla_rl.envs.task_mix import TaskMixEnv, make_task_mix
from vla_rl.envs.two_way_reach import make_two_way_reach
from vla_rl.onpolicy import ActorConfig, PPOConfig
from vla_rl.onpolicy.build import GaussianSamplerConfig
from vla_rl.policies.checkpoints.config_json import config_from_dict, config_to_dict
from vla_rl.policies.gaussian import GaussianMLP, GaussianMLPConfig
from vla_rl.train.curriculum import CurriculumConfig, TaskCurriculum
from vla_rl.train.loop import TrainConfig, run_training

MAZES = CurriculumConfig(("wall_gap", "umaze"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def maze_mix(num_envs, config=MAZES):
    return make_task_mix(lambda name: make_point_maze(num_envs, name, max_episode_steps=12), config)


def experienced(**options):
    """Tasks at 1/10, 5/10 and 9/10."""
    curriculum = TaskCurriculum(CurriculumConfig(("hard", "frontier", "easy"), **options))
    for task, successes in enumerate((1, 5, 9)):
        for i in range(10):
            curriculum.record(task, i < successes)
    return curriculum


def test_shares_by_hand():
    assert TaskCurriculum(CurriculumConfig(("a", "b"))).probabilities.tolist() == pytest.approx([0.5, 0.5])
    curriculum = experienced(temperature=0.25, uniform_share=0.3)
    assert curriculum.success_rates.tolist() == pytest.approx([2 / 12, 6 / 12, 10 / 12])
    weight = 2.718281828459045 ** (-(4 / 12) / 0.25)
    expected = [0.7 * w / (1 + 2 * weight) + 0.1 for w in (weight, 1.0, weight)]
    assert curriculum.probabilities.tolist() == pytest.approx(expected)
    metrics = curriculum.metrics()
    assert metrics["task_success/easy"] == pytest.approx(0.9)
    assert metrics["task_share/frontier"] == pytest.approx(expected[1])


def test_only_recent_episodes_count():
    curriculum = experienced(window=10)
    before = curriculum.probabilities[2]
    for i in range(10):
        curriculum.record(2, i < 5)
    assert curriculum.success_rates[2] == pytest.approx(0.5)
    assert curriculum.probabilities[2] > before + 0.2


def test_choices_follow_the_shares_and_the_seed_alone_decides():
    curriculum = experienced()
    n = 4000
    choices = [curriculum.choose(seed) for seed in range(n)]
    share = Counter(choices)
    for task, probability in enumerate(curriculum.probabilities):
        assert share[task] / n == pytest.approx(probability, abs=0.03)
    again = TaskCurriculum(curriculum.config)
    again.load_state_dict(curriculum.state_dict())
    assert [again.choose(seed) for seed in reversed(range(n))] == choices[::-1]
    with pytest.raises(ValueError, match="3 tasks, here are 2"):
        TaskCurriculum(MAZES).load_state_dict(curriculum.state_dict())


@pytest.mark.parametrize("bad", [{"tasks": ("a",)}, {"tasks": ("a", "a")}, {"temperature": 0.0}, {"window": 0}])
def test_bad_options(bad):
    with pytest.raises(ValueError, match="expected"):
        CurriculumConfig(**{"tasks": ("a", "b")} | bad)


def test_episodes_are_recorded_once_and_seeds_share_a_task():
    env = maze_mix(8)
    mix = env.step_env
    assert isinstance(mix, TaskMixEnv)
    env.reset([5, 5, 5, 5, 6, 6, 7, 7])
    tasks = mix._task.tolist()
    assert len(set(tasks[:4])) == len(set(tasks[4:6])) == len(set(tasks[6:])) == 1
    rng, ended = torch.Generator().manual_seed(0), 0
    for _ in range(9):
        ended += int(env.step(torch.rand(8, 5, 2, generator=rng) * 2 - 1).ended.sum())
    assert ended >= 24
    recent = mix.curriculum.state_dict()["recent"]
    assert sum(len(r) for r in recent) == ended
    assert all(len(r) > 0 for r in recent)


def test_tasks_keep_their_own_time_limit_and_must_look_alike():
    limits = {"wall_gap": 5, "umaze": 15}
    config = CurriculumConfig(tuple(limits), uniform_share=1.0)
    env = make_task_mix(lambda n: make_point_maze(16, n, max_episode_steps=limits[n], auto_reset=False), config)
    assert env.spec.max_episode_steps == 15
    env.reset(range(16))
    step = env.step(torch.zeros(16, 20, 2))
    task = env.step_env._task  # pyright: ignore[reportAttributeAccessIssue]
    assert step.executed.sum(dim=1).tolist() == [(5, 15)[t] for t in task.tolist()]
    assert step.truncated.all()
    with pytest.raises(ValueError, match="other state_names"):
        make_task_mix(lambda n: make_two_way_reach(2) if n == "a" else make_point_maze(2), CurriculumConfig(("a", "b")))


def test_tabletop_tasks_mix():
    config = EnvConfig(cameras=("agent",), image_size=16, num_threads=1)
    tasks = CurriculumConfig(("reach", "push"), uniform_share=1.0)
    env = make_task_mix(lambda task: config.make(4, split="train", auto_reset=True, task=task), tasks)
    try:
        obs = env.reset(range(4))
        mixed = {(int(t), s.split()[0]) for t, s in zip(env.step_env._task, obs.instruction, strict=True)}
        assert len({task for task, _ in mixed}) == 2
        lone = config.make(1, split="train", task="reach")
        row = env.step_env._task.tolist().index(0)
        alone = lone.reset([row])
        assert torch.equal(alone.state[0], obs.state[row])
        assert torch.equal(alone.images["agent"][0], obs.images["agent"][row])
        lone.close()
    finally:
        env.close()


def test_a_run_resumes_with_its_curriculum(tmp_path):
    config = TrainConfig(
        num_iterations=4,
        num_envs=4,
        algorithm=PPOConfig(num_decisions=4, critic_warmup_iterations=0, actor=ActorConfig(num_epochs=1)),
        sampler=GaussianSamplerConfig(),
        curriculum=MAZES,
    )
    assert config_from_dict(TrainConfig, config_to_dict(config)) == config

    def run(name, iterations, resume=False):
        torch.manual_seed(0)
        dims = maze_mix(1).spec.state_dim
        policy = GaussianMLP(GaussianMLPConfig(state_dim=dims, action_dim=2, action_horizon=4))
        part = TrainConfig(**{**vars(config), "num_iterations": iterations})
        run_training(policy, maze_mix, part, tmp_path / name, resume=resume, tensorboard=False)
        return policy.state_dict(), (tmp_path / name / "metrics.jsonl").read_text()

    whole, lines = run("whole", 4)
    run("parts", 2)
    parts, _ = run("parts", 4, resume=True)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert "rollout/task_share/umaze" in lines
