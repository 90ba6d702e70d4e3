"""Learning experiment: CO-RFT of the tiny VLA from pictures and sentences, from 30 and 60 noisy demonstrations.

    make experiment NAME=co_rft_vla [ARGS="--demos 60 --seeds 0 1 2"]

Offline only, on the tabletop's reach. A VLA comes pre-trained: here on 450 demonstrations that nothing else sees. Then
fine-tuning (SFT) on the few, the offline stage of the recipe `vla_offline_to_online` on the same few, and its control,
which has everything but the reward: a critic that never learns, and every episode drawn alike. The control goes on
imitating, so what the reward gives is the difference. Success and cycle time on the splits "test" and "ood"; nothing is
required but that every run ends.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tests.experiments.co_rft import SPLITS, rates_row
from tests.experiments.offline_to_online_vla import RECIPE, make_env, without_reward
from tests.experiments.runner import run_jobs
from vla_rl.data.lerobot_format import atomic_write_json
from vla_rl.evaluation.result import EvalResult
from vla_rl.policies.checkpoints.native import load_policy
from vla_rl.train.loop import POLICY_FOLDER
from vla_rl.train.offpolicy import OffPolicyConfig
from vla_rl.train.offpolicy_stages import reinforce_from_replay
from vla_rl.train.recipe import EvalConfig, Recipe
from vla_rl.train.run_folder import describe_machine, hold_run_folder
from vla_rl.train.stages import evaluate_policy, fine_tune, record_demos

assert isinstance(RECIPE.train, OffPolicyConfig)
OFFLINE = replace(RECIPE.train, online=None, online_agent=None)
STAGES = {"pretrained": None, "sft": None, "co_rft": OFFLINE, "no_reward": without_reward(OFFLINE)}
NUM_EPISODES = 256
NUM_PRETRAINING = 450  # with 200 the encoder does not find the block: 3 to 5% of the episodes
PRETRAINING_SEED = 100  # away from the seeds of the few demonstrations


def pretrain(seed: int, folder: Path) -> Path:
    """The policy that all of a seed's runs start from."""
    demos = replace(RECIPE.demos, num_episodes=NUM_PRETRAINING, seed=PRETRAINING_SEED + seed)
    made = replace(RECIPE, demos=demos, sft=replace(RECIPE.sft, seed=seed))
    record_demos(made, folder / "demos")
    return fine_tune(made, folder / "demos", folder, resume=True).policy_folder


def recipe(num_demos: int, seed: int) -> Recipe:
    """Noisy demonstrations, failures included, and a short fine-tuning of what is pre-trained."""
    demos = replace(RECIPE.demos, num_episodes=num_demos, keep="all")
    sft = replace(RECIPE.sft, num_updates=150, warmup_updates=10, learning_rate=5e-4, batch_size=64)
    return replace(RECIPE, demos=demos, sft=sft).with_seed(seed)


def run_job(seed: int, demos: Sequence[int], out: Path) -> str:
    """All of one seed."""
    torch.set_num_threads(1)
    hold_run_folder(out / f"seed_{seed}")
    start = pretrain(seed, out / f"seed_{seed}" / "pretrained")
    return "\n".join(
        run_arms(num_demos, seed, start, out / f"seed_{seed}" / f"demos_{num_demos}") for num_demos in demos
    )


def run_arms(num_demos: int, seed: int, start: Path, folder: Path) -> str:
    """The stages from so many demonstrations, each evaluated on both splits, and the start itself."""
    made = recipe(num_demos, seed)
    record_demos(made, folder / "demos")
    fine_tune(made, folder / "demos", folder / "sft", resume=True, initial=start)
    for name, config in STAGES.items():
        if config is not None:
            reinforce_from_replay(
                config.with_seed(seed),
                lambda n: make_env(n, "train", True),
                folder / name,
                policy=lambda _spec: load_policy(folder / "sft" / POLICY_FOLDER),
                dataset_path=folder / "demos",
                resume=True,
            )
        for split in SPLITS:
            goal = folder / "evaluation" / name / split
            if not (goal / "eval.json").exists():
                policy = load_policy(start if name == "pretrained" else folder / name / POLICY_FOLDER)
                config_of = EvalConfig(num_episodes=NUM_EPISODES, split=split, num_videos=0)
                result = evaluate_policy(made, policy, config_of, progress=False, label=f"training seed {seed}")
                result.save(goal)
    rates = {name: EvalResult.load(folder / "evaluation" / name / "test").success_once.rate for name in STAGES}
    return f"{num_demos} demonstrations, seed {seed}: {rates}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every run has ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demos", type=int, nargs="+", default=[30, 60])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/co_rft_vla"))
    o = parser.parse_args(argv)
    run_jobs(run_job, [(seed, o.demos, o.out) for seed in o.seeds], o.processes)
    rows = []
    for n in o.demos:
        for name in STAGES:
            results = {
                split: [EvalResult.load(o.out / f"seed_{s}/demos_{n}/evaluation/{name}/{split}") for s in o.seeds]
                for split in SPLITS
            }
            rows.append({"demos": n, "stage": name, **rates_row(results)})
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
    summary = {"name": "co_rft_vla", "rows": rows, "machine": describe_machine()}
    atomic_write_json(o.out / "summary.json", summary)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
