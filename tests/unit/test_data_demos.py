"""Recording with a closed-loop expert: the dataset follows from the seeds alone, also through kills."""

import io
import random
import signal
import time
from collections.abc import Sequence

import pytest
import torch

from tests.unit.killable import Killable
from vla_rl.core import ActionSpec, CameraSpec, EnvSpec, Observation
from vla_rl.data.demos import collect_demos
from vla_rl.data.lerobot_format import DatasetError
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.protocols import StepOutcome

torch.set_num_threads(1)


class CartEnv:
    """A cart on a line is driven to 0; a seed decides where it starts. Starts beyond 2 cannot make it in time.

    Success ends an episode at |x| < 0.05; the picture's grey level is the position.
    """

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        action = ActionSpec((-0.1,), (0.1,), ("dx",))
        self.spec = EnvSpec("cart", {"top": CameraSpec(8, 8)}, ("x", "steps"), action, 20, 20.0)
        self.x = torch.zeros(num_envs)
        self.steps = torch.zeros(num_envs)

    def reset(self, env_ids, seeds):
        for i, seed in zip(env_ids.tolist(), seeds.tolist(), strict=True):
            self.x[i] = 0.3 + 2.5 * torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()
            self.steps[i] = 0

    def step(self, actions, active):
        move = self.spec.action.clamp(actions)[:, 0]
        self.x = torch.where(active, self.x + move, self.x)
        self.steps = self.steps + active
        done = self.x.abs() < 0.05
        return StepOutcome(-self.x.abs(), done, torch.zeros_like(done), done)

    def observe(self, env_ids, images):
        x = self.x[env_ids]
        grey = (x.clamp(0, 2.5) * 100).to(torch.uint8)[:, None, None, None]
        pictures = {"top": grey.expand(-1, 8, 8, 3).clone()} if images else {}
        sentences = tuple("left" if v > 1.5 else "go left" for v in x.tolist())
        return Observation(pictures, torch.stack([x, self.steps[env_ids]], 1), sentences)

    def render(self, env_ids):
        return self.observe(env_ids, True).images["top"]

    def state_dict(self):
        return {"x": self.x.clone(), "steps": self.steps.clone()}

    def load_state_dict(self, state):
        self.x, self.steps = state["x"].clone(), state["steps"].clone()

    def close(self):
        pass


def record(
    path,
    num_envs=4,
    num_episodes=12,
    seeds: Sequence[int] = range(100, 200),
    auto_reset=False,
    make_env=CartEnv,
    **options,
):
    cart = make_env(num_envs)
    env = ChunkedEnv(cart, final_images=False, auto_reset=auto_reset)
    options = {"progress": None, **options}
    return collect_demos(env, lambda: (-cart.x)[:, None, None], path, num_episodes, seeds, **options)


def same_datasets(a, b) -> bool:
    one, two = LeRobotDataset(a), LeRobotDataset(b)
    assert one.num_episodes == two.num_episodes
    for i in range(one.num_episodes):
        x, y = one.episode(i), two.episode(i)
        assert x.extra == y.extra
        assert x.instruction == y.instruction
        for name in ("state", "action", "reward", "success", "truncated"):
            assert torch.equal(getattr(x, name), getattr(y, name)), (i, name)
        assert torch.equal(x.images["top"], y.images["top"])
    return True


def reachable(seed: int) -> bool:
    cart = CartEnv(1)
    cart.reset(torch.tensor([0]), torch.tensor([seed]))
    return float(cart.x[0]) - 20 * 0.1 < 0.05


def test_rows_are_what_was_seen_done_and_came_of_it(tmp_path):
    summary = record(tmp_path / "set")
    dataset = LeRobotDataset(tmp_path / "set")
    assert (summary.num_episodes, summary.num_attempts, summary.num_frames) == (12, 12, dataset.num_frames)
    assert [e.extra["seed"] for e in dataset.episodes] == list(range(100, 112))
    successes = 0
    for i in range(12):
        e = dataset.episode(i)
        x = e.state[:, 0]
        assert e.state[:, 1].tolist() == list(range(len(e)))
        torch.testing.assert_close(x[1:], x[:-1] + e.action[:-1, 0], rtol=0, atol=1e-6)
        assert float(e.action.abs().max()) <= 0.1 + 1e-7  # as executed: the expert asks for more
        torch.testing.assert_close(e.reward, -(x + e.action[:, 0]).abs(), rtol=0, atol=1e-6)
        assert torch.equal(e.images["top"][:, 0, 0, 0], (x.clamp(0, 2.5) * 100).to(torch.uint8))
        won = reachable(100 + i)
        successes += won
        assert e.success is not None
        assert e.truncated is not None
        assert e.success.tolist() == [False] * (len(e) - 1) + [won]
        assert bool(e.truncated[-1]) == (not won)
        assert e.instruction == ("left" if x[0] > 1.5 else "go left")
    assert summary.num_successes == successes
    assert 0 < successes < 12


@pytest.mark.parametrize(
    "options", [{"num_envs": 1}, {"num_envs": 7}, {"num_envs": 30}, {"num_envs": 3, "auto_reset": True}]
)
@pytest.mark.parametrize("keep", ["all", "success"])
def test_result_does_not_depend_on_the_number_of_environments(tmp_path, options, keep):
    record(tmp_path / "four", keep=keep)
    record(tmp_path / "other", keep=keep, **options)
    assert same_datasets(tmp_path / "four", tmp_path / "other")


def test_keeping_successes_takes_the_first_in_the_order_of_seeds(tmp_path):
    summary = record(tmp_path / "set", keep="success")
    expected = [s for s in range(100, 200) if reachable(s)][:12]
    dataset = LeRobotDataset(tmp_path / "set")
    assert [e.extra["seed"] for e in dataset.episodes] == expected
    assert all(
        bool(x)
        for x in dataset.columns(["next.success"])["next.success"][
            [e.first_frame + e.length - 1 for e in dataset.episodes]
        ]
    )
    assert summary.num_attempts == expected[-1] - 100 + 1
    assert summary.num_successes == 12


@pytest.mark.parametrize("keep", ["all", "success"])
def test_more_episodes_continue_a_recording(tmp_path, keep):
    record(tmp_path / "whole", num_episodes=12, keep=keep)
    for n in (3, 4, 4, 12):
        summary = record(tmp_path / "parts", num_episodes=n, keep=keep)
    assert summary.num_episodes == 12
    assert same_datasets(tmp_path / "whole", tmp_path / "parts")


class SlowCartEnv(CartEnv):
    """One step takes 2 ms, so that kills fall into the recording."""

    def step(self, actions, active):
        time.sleep(0.002)
        return super().step(actions, active)


def record_slowly(path: str) -> None:
    record(path, num_episodes=30, seeds=range(100, 300), keep="success", episodes_per_commit=2, make_env=SlowCartEnv)
    print("complete", flush=True)


def commit_time(path) -> int:
    table = path / "meta/episodes/chunk-000/file-000.parquet"
    return table.stat().st_mtime_ns if table.exists() else 0


def test_a_killed_recording_goes_on_without_losing_or_repeating_an_episode(tmp_path):
    record(tmp_path / "whole", num_episodes=30, seeds=range(100, 300), keep="success")
    rng, sizes, path = random.Random(0), [], tmp_path / "killed"
    with Killable(__file__, tmp_path) as killable:
        for run in range(7):
            before = commit_time(path)
            killable.start("record_slowly", str(path))
            if run < 6:
                deadline = time.monotonic() + 30
                while commit_time(path) == before and time.monotonic() < deadline:
                    time.sleep(0.001)  # until it has committed once more
                time.sleep(rng.uniform(0.0, 0.05))
                killable.kill()
            code = killable.wait()
            assert code == -signal.SIGKILL or "complete" in killable.output(), killable.output()
            sizes.append(LeRobotDataset(path).num_episodes)
            if sizes[-1] == 30 and code == 0:
                break
    assert sizes == sorted(sizes)
    assert any(0 < size < 30 for size in sizes), f"no kill fell into the recording: {sizes}"
    assert sizes[-1] == 30
    assert same_datasets(tmp_path / "whole", path)


def test_progress_counts_episodes_and_says_when_it_is_done(tmp_path):
    stream = io.StringIO()
    record(tmp_path / "set", progress=stream)
    last = stream.getvalue().strip().splitlines()[-1]
    assert last.startswith("demos: 12/12 episodes  in ")
    assert last.endswith("succeeded 8/12")


def test_a_stochastic_expert_is_told_of_resets(tmp_path):
    told = []
    record(
        tmp_path / "set",
        num_envs=3,
        on_reset=lambda ids, seeds: told.extend(zip(ids.tolist(), seeds.tolist(), strict=True)),
    )
    assert [seed for _, seed in told] == list(range(100, 112))
    assert {i for i, _ in told} == {0, 1, 2}


def test_errors(tmp_path):
    record(tmp_path / "set", num_episodes=4)
    with pytest.raises(DatasetError, match="does not follow in the given seeds"):
        record(tmp_path / "set", num_episodes=8, seeds=range(500, 600))
    with pytest.raises(DatasetError, match="2 seeds are used up with 2 of 3 episodes"):
        record(tmp_path / "short", num_episodes=3, seeds=[100, 101])
    assert LeRobotDataset(tmp_path / "short").num_episodes == 2
    with pytest.raises(ValueError, match="repetitions"):
        record(tmp_path / "twice", seeds=[1, 1])
    with pytest.raises(ValueError, match='"all" or "success"'):
        record(tmp_path / "keep", keep="good")
    cart = CartEnv(2)
    with pytest.raises(ValueError, match=r"\[N=2, 1, A=1\], got \(2, 1\)"):
        collect_demos(ChunkedEnv(cart), lambda: torch.zeros(2, 1), tmp_path / "shape", 2, range(2), progress=None)
