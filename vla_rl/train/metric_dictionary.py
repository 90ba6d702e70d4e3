"""The dictionary of metrics: what every number that a run logs means, and what it looks like when all is well.

`docs/metrics.md` is made of it (`tools/make_reference.py`); tests compare it with what runs log.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """`names`: of metrics that one line explains; capitals stand for any name. `meaning`, `healthy`: Markdown; the
    latter is "" where no value is better than another."""

    names: tuple[str, ...]
    meaning: str
    healthy: str = ""


@dataclass(frozen=True)
class MetricGroup:
    """A section of the dictionary. `title`: "" of the first, which has the page's."""

    title: str
    text: str
    metrics: tuple[Metric, ...]


ON_POLICY: tuple[Metric, ...] = (
    Metric(
        ("sft/loss",),
        "flow-matching loss, mean since the last line",
        "falls, then flattens",
    ),
    Metric(
        ("sft/grad_norm",),
        "norm of the gradient before clipping",
        "below 10; rising means a learning rate too high",
    ),
    Metric(
        ("sft/learning_rate",),
        "of this update",
        "warm-up, then a cosine",
    ),
    Metric(
        ("sft/samples_per_s",),
        "samples a second",
    ),
    Metric(
        ("rollout/success_rate",),
        "successes among episodes that ended while collecting, with exploration noise and training starts; the "
        "first windows are biased towards short episodes",
        "rises",
    ),
    Metric(
        ("rollout/success_at_end_rate",),
        "the same, at the last step",
    ),
    Metric(
        ("rollout/episodes_finished",),
        "a count",
    ),
    Metric(
        ("rollout/episodes_lost",),
        "episodes whose simulator died; in none of the other numbers",
        "absent",
    ),
    Metric(
        ("rollout/episode_length",),
        "control steps of those that ended",
    ),
    Metric(
        ("rollout/episode_return",),
        "undiscounted sum of rewards",
        "rises",
    ),
    Metric(
        ("rollout/task_success/NAME", "rollout/task_share/NAME"),
        "with a curriculum: success of the task's last episodes, and its share of the next ones",
        "shares move on as tasks are mastered",
    ),
    Metric(
        ("rollout/prefix_cache_gib",),
        "GiB that the prefixes of a window take, or the inputs where those would take more than `prefix_cache_gib`",
        "below the bound",
    ),
    Metric(
        ("rollout/groups_used", "rollout/groups_sampled"),
        "GRPO: groups whose episodes did not all return the same",
        "used is more than a third",
    ),
    Metric(
        ("update/ratio_error_first",),
        "largest |ratio - 1| of the first minibatch, where nothing has changed yet",
        "0, or below 1e-5; else the likelihood is wrong",
    ),
    Metric(
        ("update/ratio_error",),
        "the same, mean over minibatches",
    ),
    Metric(
        ("update/joint_kl",),
        "k3 estimate of the KL from the behaviour policy, of whole chunks",
        ".005 to .05",
    ),
    Metric(
        ("update/joint_kl_first", "update/joint_kl_max"),
        "of the first minibatch, and the largest",
        "0, and below `target_kl` but for the last",
    ),
    Metric(
        ("update/kl_stopped",),
        "1 where `target_kl` ended the update early",
        "now and then",
    ),
    Metric(
        ("update/learning_rate",),
        "of the policy in this update",
        "as configured",
    ),
    Metric(
        ("update/actor_steps",),
        "gradient steps of the policy",
        "`num_epochs` times minibatches, fewer if stopped",
    ),
    Metric(
        ("update/clip_fraction",),
        "share of ratios outside the clip",
        ".05 to .3",
    ),
    Metric(
        ("update/joint_clip",),
        "what the clip amounts to on the joint log-ratio, under the chosen reduction",
    ),
    Metric(
        ("update/policy_loss",),
        "clipped objective, negative",
        "near 0",
    ),
    Metric(
        ("update/actor_grad_norm", "update/critic_grad_norm"),
        "before clipping",
        "stable",
    ),
    Metric(
        ("update/entropy", "update/reference_kl", "update/bc_loss"),
        "where these terms are on",
    ),
    Metric(
        ("update/progress_loss",),
        "with a process reward: cross-entropy of progress",
        "falls; never to 0, since labels lie between 0 and 1",
    ),
    Metric(
        ("update/num_progress_labels",),
        "decisions of finished episodes that it learns from",
        "grows to `buffer_size`",
    ),
    Metric(
        ("update/explained_variance",),
        "of the value targets by the critic",
        "rises towards 1; below 0 is worse than a constant",
    ),
    Metric(
        ("update/value_loss", "update/value_mean"),
        "of the critic",
    ),
    Metric(
        ("update/advantage_std",),
        "before normalisation",
        "not 0: then nothing is learned",
    ),
    Metric(
        ("update/num_samples",),
        "decisions in the update",
    ),
    Metric(
        ("update/iteration_s",),
        "seconds of this iteration",
    ),
    Metric(
        ("eval/success_rate", "eval/success_rate_low", "eval/success_rate_high"),
        "the deployed policy on held-out episodes, Wilson interval",
        "rises",
    ),
)

REPLAY: tuple[Metric, ...] = (
    Metric(
        ("rollout/env_steps",),
        "control steps so far, over all environments",
    ),
    Metric(
        ("rollout/stored_steps",),
        "control steps in the buffer",
        "grows to the capacity",
    ),
    Metric(
        ("rollout/return", "rollout/episode_length", "rollout/success_rate", "rollout/num_episodes"),
        "undiscounted raw return, control steps, success and number of the episodes that ended in this iteration",
        "return and success rise",
    ),
    Metric(
        ("rollout/intervention_rate",),
        "share of executed control steps that a person did, where one can take over",
        "falls as the policy learns",
    ),
    Metric(
        ("update/num_updates",),
        "critic updates so far, offline",
    ),
    Metric(
        ("update/td_loss",),
        "mean loss of the critics against their targets",
        "falls, then stays; growing without end is divergence",
    ),
    Metric(
        ("update/q_data", "update/td_target"),
        "mean value of the data's chunks, mean target",
        "of the size of returns, and close to each other",
    ),
    Metric(
        ("update/q_policy",),
        "mean value of the policy's chunks",
        "a little above `q_data`; far above is overestimation",
    ),
    Metric(
        ("update/actor_loss",),
        "the actor's objective",
        "no size of its own",
    ),
    Metric(
        ("update/entropy", "update/temperature"),
        "of the exploring policy, and the weight of its entropy",
        "towards the target entropy; falls, then stays",
    ),
    Metric(
        ("update/conservative_gap",),
        "what the conservative term pushes down minus what it pushes up",
        "falls; may be negative",
    ),
    Metric(
        ("update/calibrated_share",),
        "share of the policy's values that the Monte-Carlo return bounds from below",
        "not 1: then the term does nothing",
    ),
    Metric(
        ("update/q_policy_data",),
        "mean value of the policy's chunks in the conservative term",
        "at or below `q_data`",
    ),
    Metric(
        ("update/cql_multiplier",),
        "of the conservative term, where it is learned",
        "stays finite",
    ),
    Metric(
        ("update/value", "update/value_loss"),
        "IQL: V and its expectile loss",
        "near `q_data`",
    ),
    Metric(
        ("update/advantage", "update/clipped_share"),
        "IQL: mean of Q - V, share of weights at `max_weight`",
        "near 0; below .1",
    ),
    Metric(
        ("update/bc_loss",),
        "distance to the data, of cloning or of the term beside Q",
        "falls",
    ),
    Metric(
        ("update/flow_loss", "update/distillation"),
        "Q-chunking: flow matching, distance of the one-step policy to the flow",
        "fall",
    ),
    Metric(
        ("update/distillation",),
        "DSRL: squared distance of the critic of noise to the critic of chunks",
        "falls",
    ),
    Metric(
        ("update/edit",),
        "EXPO and the residual: mean change of an action, in the critic's [-1, 1]",
        "below the scale of edits",
    ),
    Metric(
        ("update/distil_loss", "update/q_improved"),
        "a torch policy: supervised loss on improved chunks, their mean value",
        "falls; above `q_data`",
    ),
)

RAY: tuple[Metric, ...] = (
    Metric(
        ("rollout/wait_s",), "seconds that the learner waited for the last window", "small beside `update/iteration_s`"
    ),
    Metric(
        ("rollout/staleness",), "updates that the oldest decision of the window is behind", "at most `max_staleness`"
    ),
    Metric(
        ("rollout/staleness_mean",),
        "learning from replay: versions (iterations) that the policy which acted was behind when its steps came "
        "in, mean over the windows; `rollout/staleness` is the largest",
        "at most `max_staleness`",
    ),
    Metric(("rollout/worker_restarts",), "workers that died and were started again, so far", "0"),
    Metric(("rollout/worker_lost_episodes",), "running episodes that they took along, so far", "0"),
)

GROUPS: tuple[MetricGroup, ...] = (
    MetricGroup(
        "",
        "`metrics.jsonl` (one JSON object a line) and TensorBoard hold the same numbers. `iteration` counts updates of "
        "SFT or iterations of RL, `time_s` is the run's wall time so far.",
        ON_POLICY,
    ),
    MetricGroup(
        "Rollouts by Ray workers", "Besides the above, with `rollout.workers`; see [many machines](scaling.md).", RAY
    ),
    MetricGroup(
        "Learning from replay",
        "`iteration` counts `updates_per_iteration` offline and `env_steps_per_iteration` online; `rl/offline` and "
        "`rl/online` have a file each. `update/` are those of the last call before the iteration's end; they are "
        "absent during a warm-up.",
        REPLAY,
    ),
)


def metric_names() -> frozenset[str]:
    """All names of the dictionary, with the logger's own `iteration` and `time_s`."""
    return frozenset(["iteration", "time_s", *(n for group in GROUPS for m in group.metrics for n in m.names)])
