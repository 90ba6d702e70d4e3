"""Chunk targets by walking an episode step by step, rightly and with each mistake that replay buffers are known for."""

from dataclasses import dataclass

import numpy as np

from vla_rl.data.replay import ReplayBuffer, ReplayConfig

MISTAKES = (
    "timeout_is_terminal",  # no bootstrap at a time limit
    "success_at_time_limit_is_truncated",  # bootstrap after a success on the last allowed step
    "bootstrap_from_before_the_end",  # the observation before the last step for the one after it
    "bootstrap_after_reset",  # the next episode's first observation
    "successor_one_too_far",  # observations shifted
    "full_horizon_discount",  # gamma^h for k < h executed steps
    "discount_once_a_chunk",  # gamma instead of gamma^k
    "discounted_twice",  # a sum that was discounted already
    "rewards_past_the_end",  # of the next episode
    "scaled_twice",
    "bias_forgotten",
    "zero_padding",  # instead of the last action
)


@dataclass
class Recorded:
    """T steps: `state` [T+1, S], `actions` [T, A], `rewards` [T]."""

    state: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    truncated: bool

    def __len__(self):
        return len(self.rewards)


def record(index, length, terminated, truncated, rng):
    """Every number of `state` tells its episode and step."""
    steps = np.arange(length + 1)
    return Recorded(
        state=np.stack([np.full(length + 1, index), steps], 1).astype(np.float32),
        actions=rng.uniform(-1, 1, (length, 2)).astype(np.float32),
        rewards=rng.uniform(-1, 1, length).astype(np.float32),
        terminated=terminated,
        truncated=truncated,
    )


def store(buffer: ReplayBuffer, episode: Recorded, **more):
    return buffer.add_episode(
        state=episode.state,
        actions=episode.actions,
        rewards=episode.rewards,
        terminated=episode.terminated,
        truncated=episode.truncated,
        **more,
    )


def reference(episode: Recorded, following: Recorded, t: int, horizon: int, config: ReplayConfig, mistake: str = ""):
    """What a sample that starts at step t must be: a dict of `obs, actions, mask, reward, discount, next_obs`."""
    reward, power, k = 0.0, 1.0, 0
    actions, mask = [], []
    for i in range(horizon):
        if t + i < len(episode):
            raw = float(episode.rewards[t + i])
            r = config.reward_scale * raw + (0 if mistake == "bias_forgotten" else config.reward_bias)
            if mistake == "scaled_twice":
                r = config.reward_scale * r + config.reward_bias
            reward += power * power * r if mistake == "discounted_twice" else power * r
            power *= config.gamma
            k += 1
            actions.append(episode.actions[t + i])
            mask.append(True)
        else:
            if mistake == "rewards_past_the_end":
                raw = float(following.rewards[(t + i - len(episode)) % len(following)])
                reward += config.gamma**i * (config.reward_scale * raw + config.reward_bias)
            actions.append(np.zeros(2) if mistake == "zero_padding" else episode.actions[-1])
            mask.append(False)
    at_end = t + k == len(episode)
    successor = episode.state[t + k]
    if at_end and mistake == "bootstrap_from_before_the_end":
        successor = episode.state[t + k - 1]
    if at_end and mistake == "bootstrap_after_reset":
        successor = following.state[0]
    if mistake == "successor_one_too_far":
        successor = episode.state[min(t + k + 1, len(episode))]
    discount = config.gamma**horizon if mistake == "full_horizon_discount" else power
    discount = config.gamma if mistake == "discount_once_a_chunk" else discount
    stops = episode.terminated
    if mistake == "timeout_is_terminal":
        stops = episode.terminated or episode.truncated
    if mistake == "success_at_time_limit_is_truncated":
        stops = episode.terminated and not episode.truncated
    return {
        "obs": episode.state[t],
        "actions": np.array(actions),
        "mask": np.array(mask),
        "reward": reward,
        "discount": 0.0 if at_end and stops else discount,
        "next_obs": successor,
    }


def differs(batch, row: int, wanted) -> list[str]:
    """Which fields of sample `row` are not as wanted."""
    return [
        name
        for name, value in wanted.items()
        if not np.allclose(np.asarray(getattr(batch, name)[row], np.float64), value, rtol=1e-5, atol=1e-5)
    ]
