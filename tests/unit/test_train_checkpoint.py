"""A state file belongs to the run that wrote it, also when options have come or gone since."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vla_rl.policies.checkpoints.config_json import config_to_dict
from vla_rl.train.checkpoint import CheckpointError, changed_options, require_same_config
from vla_rl.train.loop import TrainConfig


def test_an_option_that_came_later_counts_with_its_default() -> None:
    config = TrainConfig()
    stored = config_to_dict(config)
    del stored["execution_horizon"], stored["algorithm"]["critic_warmup_iterations"]
    assert changed_options(stored, config) == {}
    assert changed_options(stored, replace(config, num_envs=3)) == {"num_envs": (config.num_envs, 3)}


def test_changes_and_options_that_went_are_told() -> None:
    config = TrainConfig()
    stored = config_to_dict(config) | {"num_envs": config.num_envs + 1}
    require_same_config(stored, config, {"num_envs"}, Path("state.pt"))
    with pytest.raises(CheckpointError, match=rf"num_envs: {config.num_envs + 1} -> {config.num_envs}\)"):
        require_same_config(stored, config, (), Path("state.pt"))
    gone = config_to_dict(config) | {"warp_speed": 9}
    assert changed_options(gone, config) == {}
