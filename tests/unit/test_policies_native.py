"""Policy folders: bit-equal round trips, and an error that helps for every way in which a folder can be wrong."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vla_rl.core import ActionSpec, CameraSpec, EnvSpec, Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.policies.blocks.expert import ActionExpertConfig
from vla_rl.policies.checkpoints import native
from vla_rl.policies.checkpoints.config_json import config_from_dict, config_to_dict
from vla_rl.policies.checkpoints.native import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    PolicyCheckpointError,
    load_policy,
    read_description,
    register_policy,
    save_policy,
)
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.policies.gaussian import GaussianMLP, GaussianMLPConfig
from vla_rl.policies.tiny import TinyVLA, TinyVLAConfig

torch.set_num_threads(1)

SPEC = EnvSpec(
    name="table",
    cameras={"agent": CameraSpec(32, 32)},
    state_names=("x", "y", "gripper"),
    action=ActionSpec((-1.0, -1.0), (1.0, 1.0), ("dx", "dy")),
    max_episode_steps=50,
    control_hz=20.0,
)
TINY = TinyVLAConfig(
    state_dim=3,
    action_dim=2,
    cameras=("agent",),
    image_size=32,
    prefix_width=16,
    vision_channels=8,
    text_width=16,
    expert=ActionExpertConfig(width=32, num_layers=1),
)


def policies():
    torch.manual_seed(0)
    tiny = TinyVLA(TINY)
    gaussian = GaussianMLP(GaussianMLPConfig(3, 2, hidden_widths=(16, 8)))
    for policy in (tiny, gaussian):
        policy.set_normalization(
            Normalizer("mean_std", torch.randn(3), torch.rand(3) + 0.1),
            Normalizer("quantiles", torch.randn(2), torch.rand(2) + 0.1),
        )
        for parameter in policy.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    flow = FlowMLP(FlowMLPConfig(3, 2))
    flow.state_normalizer.scale.fill_(0.3)
    return [tiny, gaussian, flow]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_round_trip_is_bit_equal(tmp_path, index):
    policy = policies()[index]
    save_policy(policy, tmp_path / "p", spec=SPEC, metadata={"updates": 7})
    loaded = load_policy(tmp_path / "p", spec=SPEC)
    assert type(loaded) is type(policy)
    assert loaded.config == policy.config
    assert not loaded.training
    for (name, a), (_, b) in zip(policy.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    images = {"agent": torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)}
    obs = Observation(images, torch.randn(2, 3), ("reach the red block",) * 2)
    noise = torch.randn(2, policy.action_horizon, 2)
    assert torch.equal(policy.act(obs, noise).actions, loaded.act(obs, noise).actions)  # pyright: ignore[reportCallIssue]
    if index < 2:
        assert loaded.state_normalizer.normalizer.kind == "mean_std"
        assert loaded.action_normalizer.normalizer.kind == "quantiles"
    assert sorted(os.listdir(tmp_path / "p")) == [CONFIG_FILE, WEIGHTS_FILE]


def test_description_is_readable_without_the_weights(tmp_path):
    save_policy(policies()[1], tmp_path, spec=SPEC, metadata={"updates": 7})
    description = read_description(tmp_path)
    assert description["class"] == "gaussian_mlp"
    assert description["metadata"] == {"updates": 7}
    assert description["spec"]["action"]["names"] == ["dx", "dy"]
    assert config_from_dict(EnvSpec, description["spec"]) == SPEC
    assert json.loads((tmp_path / CONFIG_FILE).read_text()) == description


def test_the_weights_file_is_complete_without_the_copy(tmp_path):
    save_policy(policies()[1], tmp_path)
    (tmp_path / CONFIG_FILE).unlink()
    assert isinstance(load_policy(tmp_path), GaussianMLP)


def test_an_edit_of_the_copy_is_refused(tmp_path):
    save_policy(policies()[0], tmp_path)
    description = json.loads((tmp_path / CONFIG_FILE).read_text())
    description["config"]["num_steps"] = 10
    (tmp_path / CONFIG_FILE).write_text(json.dumps(description))
    with pytest.raises(PolicyCheckpointError, match="no effect"):
        load_policy(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(PolicyCheckpointError, match="not JSON"):
        load_policy(tmp_path)


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(PolicyCheckpointError, match="no such file"):
        load_policy(tmp_path)
    save_policy(policies()[1], tmp_path)
    path = tmp_path / WEIGHTS_FILE
    whole = path.read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(PolicyCheckpointError, match="cut short"):
            load_policy(tmp_path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(PolicyCheckpointError, match="not written by save_policy"):
        load_policy(tmp_path)


def rewrite(folder, change_tensors=None, change_description=None):
    path = folder / WEIGHTS_FILE
    tensors, description = load_file(path), read_description(folder)
    if change_tensors:
        change_tensors(tensors)
    if change_description:
        change_description(description)
    (folder / CONFIG_FILE).unlink()
    save_file(tensors, path, metadata={"description": json.dumps(description)})


def test_all_wrong_keys_are_listed_at_once(tmp_path):
    save_policy(policies()[1], tmp_path)

    def change(tensors):
        del tensors["mean.0.bias"]
        tensors["surplus"] = torch.zeros(4)
        tensors["std_logit"] = torch.zeros(1, 2)
        tensors["mean.2.bias"] = tensors["mean.2.bias"].half()

    rewrite(tmp_path, change)
    with pytest.raises(PolicyCheckpointError) as error:
        load_policy(tmp_path)
    message = str(error.value)
    assert "missing mean.0.bias (16,)" in message
    assert "unknown surplus (4,)" in message
    assert "std_logit has shape (1, 2) torch.float32, expected (8, 2) torch.float32" in message
    assert "mean.2.bias has shape (8,) torch.float16" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d.update({"class": "tiny_vlm"}), "unknown policy class 'tiny_vlm'"),
        (lambda d: d.update({"format": "v9"}), "format 'v9'"),
        (lambda d: d["config"].update({"hidden_width": [3]}), "did you mean 'hidden_widths'"),
        (lambda d: d["config"].update({"action_dim": "two"}), "config.action_dim"),
        (lambda d: d["config"].update({"supervised_loss": "mae"}), "must be one of"),
        (lambda d: d["config"].pop("state_dim"), "state_dim is 0"),
        (lambda d: d["config"].update({"initial_std": 5.0}), "std_min < initial_std"),
    ],
)
def test_wrong_descriptions(tmp_path, change, expected):
    save_policy(policies()[1], tmp_path)
    rewrite(tmp_path, change_description=change)
    with pytest.raises(PolicyCheckpointError, match=expected):
        load_policy(tmp_path)


def test_another_environment_is_refused(tmp_path):
    save_policy(policies()[1], tmp_path, spec=SPEC)
    other = dataclasses.replace(SPEC, action=ActionSpec((-1.0, -2.0), (1.0, 1.0), ("dx", "dy")))
    with pytest.raises(PolicyCheckpointError, match="action low"):
        load_policy(tmp_path, spec=other)
    with pytest.raises(PolicyCheckpointError, match="state_names"):
        load_policy(tmp_path, spec=dataclasses.replace(SPEC, state_names=("x", "y", "z")))
    save_policy(policies()[1], tmp_path / "without")
    with pytest.raises(PolicyCheckpointError, match="without the spec"):
        load_policy(tmp_path / "without", spec=SPEC)


def test_a_failed_write_leaves_the_old_policy(tmp_path, monkeypatch):
    first = policies()[1]
    save_policy(first, tmp_path)

    def full_disk(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "save_file", full_disk)
    second = policies()[1]
    second.std_logit.data += 1.0
    with pytest.raises(OSError, match="No space left"):
        save_policy(second, tmp_path)
    assert torch.equal(load_policy(tmp_path).std_logit, first.std_logit)
    assert sorted(os.listdir(tmp_path)) == [CONFIG_FILE, WEIGHTS_FILE]


@dataclasses.dataclass(frozen=True)
class OwnConfig:
    width: int = 3


class OwnPolicy(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer = nn.Linear(config.width, config.width)


def test_users_register_their_own_class(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_REGISTRY", dict(native._REGISTRY))
    policy = OwnPolicy(OwnConfig(5))
    with pytest.raises(TypeError, match="register_policy"):
        save_policy(policy, tmp_path)
    register_policy("own", OwnPolicy, OwnConfig)
    register_policy("own", OwnPolicy, OwnConfig)
    save_policy(policy, tmp_path)
    assert torch.equal(load_policy(tmp_path).layer.weight, policy.layer.weight)
    with pytest.raises(ValueError, match="registered already"):
        register_policy("own", GaussianMLP, GaussianMLPConfig)


def test_configs_survive_json():
    for config in (TINY, SPEC, GaussianMLPConfig(3, 2), dataclasses.replace(SPEC, max_episode_steps=None)):
        text = json.dumps(config_to_dict(config))
        assert config_from_dict(type(config), json.loads(text)) == config
    with pytest.raises(TypeError, match="no JSON form"):
        config_to_dict(dataclasses.replace(TINY, cameras=torch.zeros(1)))
    with pytest.raises(ValueError, match="expected an object"):
        config_from_dict(TinyVLAConfig, {"state_dim": 3, "action_dim": 2, "expert": 5})
