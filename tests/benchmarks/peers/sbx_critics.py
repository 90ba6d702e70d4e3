"""sbx's jitted updates of soft actor-critic; runs in sbx's own environment (see `harness.PeerGroup`).

Its own `_train`, what `train(gradient_steps)` calls after sampling: all updates in one jit, the actor's once an
environment step (`policy_delay`). Its target takes the least of all critics: it draws no subset. The sizes come as JSON
in CRITIC_SIZES.
"""

import json
import os
import sys
import time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the library prints goes to the log

import gymnasium as gym  # noqa: E402  # pyright: ignore[reportMissingImports]
import jax  # noqa: E402
import numpy as np  # noqa: E402
from sbx import SAC  # noqa: E402  # pyright: ignore[reportMissingImports]
from sbx.common.type_aliases import ReplayBufferSamplesNp  # noqa: E402  # pyright: ignore[reportMissingImports]


class Shapes(gym.Env):
    """SAC reads its sizes from an environment; this one is never stepped."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (obs_dim,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (action_dim,), np.float32)


def main() -> None:
    sizes = json.loads(os.environ["CRITIC_SIZES"])
    obs, actions, utd = sizes["obs_dim"], sizes["chunk_dim"], sizes["utd"]
    networks = {"n_critics": sizes["num_members"], "layer_norm": True, "net_arch": sizes["hidden_sizes"]}
    agent = SAC("MlpPolicy", Shapes(obs, actions), policy_kwargs=networks, buffer_size=1000)
    rng, rows = np.random.default_rng(0), utd * sizes["batch_size"]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    rest = np.zeros(rows, np.float32), normal(rows), np.full(rows, 0.99, np.float32)
    data = ReplayBufferSamplesNp(normal(rows, obs), np.tanh(normal(rows, actions)), normal(rows, obs), *rest)

    def update() -> None:
        policy = agent.policy
        states = policy.qf_state, policy.actor_state, agent.ent_coef_state, agent.key
        out = agent._train(agent.tau, agent.target_entropy, utd, data, utd, 1 % utd, *states)
        policy.qf_state, policy.actor_state, agent.ent_coef_state, agent.key, metrics = out
        jax.block_until_ready((policy.qf_state.params, policy.actor_state.params, metrics))

    for _ in range(2):
        update()
    answer({"ready": True})
    for line in sys.stdin:
        seconds = json.loads(line)["seconds"]
        count, begin, cpu = 0, time.perf_counter(), time.process_time()
        while (elapsed := time.perf_counter() - begin) < seconds:
            update()
            count += 1
        answer({"steps": count, "seconds": elapsed, "cpu_seconds": time.process_time() - cpu})


def answer(message: dict) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
