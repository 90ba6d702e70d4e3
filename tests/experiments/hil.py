"""Learning experiment: reinforcement learning on the twin's arm in real time, with a person who takes over.

    make experiment NAME=hil

The demo's tiny VLA learns from replay on the digital twin (DDS, supervisor, safety filter, 20 Hz), rewarded by nothing
but a success classifier, which was trained from labelled frames of the demonstrations and of the policy's own episodes.
A scripted person with a tool-delta device takes the arm where the policy makes no headway, and what they do goes into
both buffers (HIL-SERL, arXiv 2410.21845). The controls are the same without a person, and with one but no reward, which
imitates alone. Evaluated in the simulator that the twin is of, on 256 held-out episodes. Required: ahead of the
fine-tuned policy and of learning without a person.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tests.experiments.offline_to_online_vla import without_reward
from tests.experiments.runner import POLICY_FOLDER, Experiment, Method, envs_of, main, start_of
from vla_rl.configs import get_recipe
from vla_rl.core import Observation
from vla_rl.data.lerobot_format import atomic_write_json
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.envs.config import EnvConfig
from vla_rl.envs.twin import TwinEnvConfig, TwinRobot
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.policies.checkpoints.native import load_policy
from vla_rl.real_robot.interfaces import TeleopSample
from vla_rl.train.offpolicy import OffPolicyConfig
from vla_rl.train.success_classifier import (
    LabelledFrames,
    SuccessClassifier,
    SuccessClassifierConfig,
    frames_of,
    train_success_classifier,
)

RECIPE = get_recipe("twin_hil")
CLASSIFIER_FOLDER, REPORT_FILE = "classifier", "classifier.json"
assert isinstance(RECIPE.env, TwinEnvConfig)
assert isinstance(RECIPE.train, OffPolicyConfig)
SIMULATED = replace(RECIPE, env=RECIPE.env.for_demos)


# ------------------------------------------------------------------------------------------------------------ reward
class LearnedSuccess:
    """The classifier on a policy's features, so that it knows the sentence; `success` of an environment.

    What it rewarded, and whether the twin's predicate had held in the episode until then, is counted in `counts`."""

    def __init__(self, start: Path, robot: TwinRobot, counts: Path) -> None:
        self._policy = load_policy(start / POLICY_FOLDER)
        self._classifier = SuccessClassifier.load(start / CLASSIFIER_FOLDER)
        self._robot, self._file = robot, counts
        self._counts = {"rewarded_rightly": 0, "rewarded_wrongly": 0}

    @torch.no_grad()
    def __call__(self, obs: Observation) -> bool:
        success = bool(self._classifier.is_success(obs, features(self._policy, obs))[0])
        if success:
            time.sleep(0.06)  # the twin says it at 20 Hz
            self._counts["rewarded_rightly" if self._robot.episodes.state().success_once else "rewarded_wrongly"] += 1
            atomic_write_json(self._file, self._counts)
        return success


@torch.no_grad()
def features(policy, obs: Observation) -> torch.Tensor:
    """[N, F] of a frozen policy: pictures, sentence and state."""
    return torch.cat([policy.encode(policy.preprocess(obs)).pooled, obs.state], dim=1)


def label_own_episodes(policy, num_episodes: int, seed: int, first: int) -> LabelledFrames:
    """Frames of the policy's episodes in the simulator, `first` and on, and whether the task was done in them."""
    env = SIMULATED.env.make(num_episodes, split="train", final_images=True)
    episodes = [first + i for i in range(num_episodes)]
    obs = env.reset([2**40 + seed * 10**5 + i for i in episodes])
    seen: list[Observation] = []
    done: list[torch.Tensor] = []
    who: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(seed * 10**5 + first)
    chunk, active = None, torch.arange(num_episodes)
    for t in range(env.spec.max_episode_steps or 0):
        if t % 4 == 0:
            noise = torch.randn(num_episodes, policy.action_horizon, env.spec.action.dim, generator=generator)
            chunk = policy.act(obs, noise).actions
        assert chunk is not None
        step = env.step(chunk[:, t % 4 : t % 4 + 1])
        obs = step.obs
        seen.append(step.next_obs.select(active))
        done.append(step.success[active])
        who.append(active)
        active = (~env.ended).nonzero().flatten()
        if not len(active):
            break
    env.close()
    frames = Observation.concatenate(seen)
    group = 10**6 + torch.tensor(episodes)[torch.cat(who)]  # no episode of the demonstrations
    return LabelledFrames({}, features(policy, frames), torch.cat(done), group)


def label_demonstrations(policy, dataset: LeRobotDataset) -> LabelledFrames:
    """Frames of the demonstrations."""
    cameras, found = tuple(dataset.cameras), []
    for i in range(dataset.num_episodes):
        episode = dataset.episode(i, cameras=cameras)
        obs = Observation(episode.images, episode.state, (episode.instruction,) * len(episode))
        found.append(features(policy, obs))
    return frames_of(dataset, ())._replace(features=torch.cat(found))


def prepare(seed: int, folder: Path) -> None:
    """The demo's demonstrations and policy, and a classifier."""
    start_of(SIMULATED)(seed, folder)
    policy = load_policy(folder / POLICY_FOLDER)
    parts = [label_demonstrations(policy, LeRobotDataset(folder / "demos"))]
    parts += [label_own_episodes(policy, 400, seed, first) for first in range(0, 1_600, 400)]
    seen, success, group = (torch.cat([getattr(p, name) for p in parts]) for name in ("features", "success", "group"))
    config = SuccessClassifierConfig(
        feature_dim=seen.shape[1], num_steps=4_000, batch_size=256, max_false_positives=0.005
    )
    generator = torch.Generator().manual_seed(seed)
    classifier, report = train_success_classifier(LabelledFrames({}, seen, success, group), config, generator)
    classifier.save(folder / CLASSIFIER_FOLDER)
    atomic_write_json(folder / REPORT_FILE, report._asdict())


# ------------------------------------------------------------------------------------------------------------ person
@dataclass
class Person:
    """A `Teleop` who looks at the scene, lets the policy try, and takes over where it comes no nearer for `patience`
    steps; then goes over the named block and down on it, until the episode is over."""

    robot: TwinRobot
    patience: int = 4
    reach: float = 0.018  # m a step

    def connect(self) -> None:
        config = self.robot.config.for_demos
        self._scene = replace(config, privileged_state=True, cameras=()).make(1, split="train")
        names = self._scene.spec.state_names
        self._goal_at = [names.index(f"target_{axis}") for axis in "xyz"]
        self._tip_at = [self.robot.arm.state_names.index(f"tip_{axis}") for axis in "xyz"]
        self._episode = -1

    def read(self) -> TeleopSample:
        state = self.robot.episodes.state()
        if state.episode != self._episode:
            self._episode, self._best, self._since, self._engaged = state.episode, np.inf, 0, False
            self._goal = self._scene.reset([state.seed]).state[0, self._goal_at].double().numpy()
        tip = self.robot.arm.observe(self.robot.arm.read()[0])[self._tip_at].astype(np.float64)
        away = self._goal - tip
        distance = float(np.linalg.norm(away))
        self._since = 0 if distance < self._best - 0.004 else self._since + 1
        self._best = min(self._best, distance)
        self._engaged = self._engaged or self._since >= self.patience
        aside = float(np.linalg.norm(away[:2]))
        if aside > 0.015 and tip[2] < self._goal[2] + 0.03:
            away[2] = max(away[2], 0.03)  # not along the table, where other blocks are
        elif aside > 0.03:
            away[2] = np.clip(self._goal[2] + 0.05 - tip[2], -1, 1)
        step = away * min(1.0, self.reach / max(1e-6, float(np.linalg.norm(away))))
        return TeleopSample(np.append(step, np.zeros(3)), 0.08, self._engaged, {}, time.monotonic())

    def close(self) -> None:
        self._scene.close()


def on_the_twin(start: Path, method: str, *, person: bool) -> ChunkedEnv:
    """The twin's arm, rewarded by the classifier, whose rewards are counted in a file of `method`."""
    assert isinstance(RECIPE.env, TwinEnvConfig)
    robot = TwinRobot(replace(RECIPE.env, max_state_age_s=0.5, silence_s=0.5), "train")  # patient: a busy machine
    try:
        teleop = Person(robot) if person else None
        success = LearnedSuccess(start, robot, start.parent / f"rewards_{method}.json")
        return robot.env(teleop=teleop, success=success, auto_reset=True, final_images=True)
    except BaseException:
        robot.close()
        raise


EXPERIMENT = Experiment(
    name="hil",
    title="On the twin's arm with a person who takes over",
    prepare=prepare,
    make_env=envs_of(SIMULATED),
    methods={
        "hil": Method("a person takes over", RECIPE.train, train_env=lambda s: on_the_twin(s, "hil", person=True)),
        "no_reward": Method(
            "a person, no reward",
            without_reward(RECIPE.train),
            "other",
            train_env=lambda s: on_the_twin(s, "no_reward", person=True),
        ),
        "alone": Method(
            "without a person", RECIPE.train, "other", train_env=lambda s: on_the_twin(s, "alone", person=False)
        ),
    },
    num_episodes=256,
    first_episode=0,
    required=0.0,
    start_range=(0.0, 1.0),
    ahead=(("hil", "sft"), ("hil", "alone")),
    processes=1,
)
assert isinstance(SIMULATED.env, EnvConfig)

if __name__ == "__main__":
    raise SystemExit(main("tests.experiments.hil"))
