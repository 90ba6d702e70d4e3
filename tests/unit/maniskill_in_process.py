"""What `test_envs_maniskill.py` asks of ManiSkill itself, in the simulator's own Python; answers with one JSON object.

Usage: python maniskill_in_process.py TREE, with TREE a folder in which the package `vla_rl` lies as in the wheel.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, sys.argv[1])

import numpy as np
import torch

from vla_rl.envs.hosts import maniskill_host
from vla_rl.envs.maniskill import ManiSkillConfig, ManiSkillGpuStepEnv
from vla_rl.envs.vector import ChunkedEnv

ONE, NO = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
IDS = torch.zeros(1, dtype=torch.int64)


def batch(config: ManiSkillConfig, **options: Any) -> ManiSkillGpuStepEnv:
    return ManiSkillGpuStepEnv(config.options(), 1, sim="physx_cpu", **options)


def walk(env: ManiSkillGpuStepEnv, steps: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = []
    for _ in range(steps):
        env.step(2 * torch.rand(1, env.spec.action.dim, generator=generator) - 1, ONE)
        states.append(env.observe(IDS, False).state)
    return torch.cat(states)


def the_batch() -> dict[str, Any]:
    """The GPU batch's code on ManiSkill's CPU physics, with one environment."""
    config = ManiSkillConfig(task="StackCube-v1", cameras=(), control="pd_ee_target_delta_pos")
    env = batch(config, stream=(0,))
    env.reset(IDS, torch.tensor([3]))
    first = walk(env, 12, 0)
    kept, shown = env.state_dict(), env.observe(IDS, False).state
    for _ in range(3):
        env.step(torch.ones(1, 4), NO)
    now = env.state_dict()
    moved = max(
        float((x - now["sim"][kind][name]).abs().max()) for kind in kept["sim"] for name, x in kept["sim"][kind].items()
    )
    target = float((kept["controller"]["arm"]["target_pose"] - now["controller"]["arm"]["target_pose"]).abs().max())
    on = walk(env, 4, 1)
    env.load_state_dict(kept)
    loaded = env.observe(IDS, False).state
    resumed = walk(env, 4, 1)
    env.reset(IDS, torch.tensor([3]))
    again = walk(env, 12, 0)
    other = batch(config, stream=(1,))
    other.reset(IDS, torch.tensor([3]))
    together = batch(config, stream=(0,), batch_seeds=True)
    drawn = []
    for seed in (5, 6, 5):
        together.reset(IDS, torch.tensor([seed]))
        drawn.append(together.observe(IDS, False).state)
    chunked = ChunkedEnv(batch(config, stream=(0,)), auto_reset=False)
    chunked.reset([3])
    generator = torch.Generator().manual_seed(0)
    chunk = torch.cat([2 * torch.rand(1, 4, generator=generator) - 1 for _ in range(12)])[None]
    through = chunked.step(chunk).obs.state
    return {
        "same_seed": torch.equal(first, again),
        "shown_while_still": torch.equal(shown, loaded) and torch.equal(shown[0], first[-1]),
        "moved_while_still": moved,
        "target_while_still": target,
        "resumed_difference": float((on - resumed).abs().max()),
        "moved_afterwards": float((on[-1] - shown).abs().max()),
        "other_stream_differs": not torch.equal(first[:1], other.observe(IDS, False).state),
        "batch_seeds": [torch.equal(drawn[0], drawn[2]), torch.equal(drawn[0], drawn[1])],
        "through_chunks": torch.equal(through[0], first[-1]),
        "names": list(env.spec.action.names),
    }


def solved(task: str, control: str, seed: int, **options: Any) -> dict[str, Any]:
    """The expert's episode: its length, rewards and end."""
    config = ManiSkillConfig(task=task, cameras=(), control=control, **options).for_demos
    env = maniskill_host.build(config.options())
    env.reset(seed)
    rewards, terminated, success = [], False, False
    while not (terminated or success) and len(rewards) < env.spec()["max_episode_steps"]:
        action = env.expert_action()
        np.testing.assert_array_equal(action, env.expert_action())  # asking moves nothing
        reward, terminated, _, success = env.step(action)
        rewards.append(reward)
    more = env.step(action)[1] if options.get("reward") == "dense" else None
    env.close()
    return {"rewards": rewards, "terminated": terminated, "success": success, "goes_on_after": more}


def error_of(make: Callable[[], Any]) -> str:
    try:
        make()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors() -> dict[str, str]:
    def build(**options: Any) -> Callable[[], Any]:
        return lambda: maniskill_host.build(ManiSkillConfig(cameras=(), **options).options())

    joint_vel = maniskill_host.build(ManiSkillConfig(cameras=(), control="pd_joint_vel").options())
    joint_vel.reset(0)
    camera = ManiSkillConfig(cameras=("front",)).options()
    return {
        "task": error_of(build(task="PickCub-v1")),
        "control": error_of(build(control="telepathy")),
        "camera": error_of(lambda: maniskill_host.build(camera)),
        "expert": error_of(joint_vel.expert_action),
    }


def peg() -> dict[str, Any]:
    """A task that builds its scene anew for each episode."""
    env = maniskill_host.build(ManiSkillConfig(task="PegInsertionSide-v1", cameras=()).options())
    names = env.spec()["state_names"]
    sizes = [i for i, name in enumerate(names) if name.startswith("peg_half_size")]
    seen = []
    for seed in (1, 2, 1):
        env.reset(seed)
        states = [env.observe(False)[0]]
        for i in range(10):
            env.step(np.array([0.5, 0.1 * i, -1.0, 1.0]))
            states.append(env.observe(False)[0])
        seen.append(np.stack(states))
    plain = maniskill_host.build(ManiSkillConfig(task="PickCube-v1", cameras=(), privileged_state=False).options())
    return {
        "same_seed": bool((seen[0] == seen[2]).all()),
        "sizes": [s[0, sizes].tolist() for s in seen[:2]],
        "max_episode_steps": env.spec()["max_episode_steps"],
        "plain_names": plain.spec()["state_names"],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        answers = {
            "batch": the_batch(),
            "planned": solved("StackCube-v1", "pd_joint_pos", 2),
            "dense": solved("PushCube-v1", "pd_ee_delta_pos", 0, reward="dense"),
            "errors": errors(),
            "peg": peg(),
        }
    print(json.dumps(answers))
