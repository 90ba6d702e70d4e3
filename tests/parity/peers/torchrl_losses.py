"""REDQ and CQL of torchrl, with given weights, batch, noise and subset."""

from __future__ import annotations

import warnings

warnings.simplefilter("ignore")

import torch  # noqa: E402
from common import GivenNoise, Results, load_inputs, rows_first  # noqa: E402
from tensordict import TensorDict, TensorDictParams  # noqa: E402  # pyright: ignore[reportMissingImports]
from tensordict.nn import TensorDictModule  # noqa: E402  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # noqa: E402
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator  # noqa: E402  # pyright: ignore[reportMissingImports]
from torchrl.objectives import CQLLoss, REDQLoss  # noqa: E402  # pyright: ignore[reportMissingImports]

SAMPLES, GAMMA = 3, 0.81
OPTIONS = {
    "gamma": GAMMA,  # of the whole chunk: torchrl has one discount for all rows
    "redq_critics": 4,
    "redq_subset": [1, 3],
    "temperature": 0.4,
    "target_entropy_per_dim": -0.5,
    "num_random": SAMPLES,
    "lagrange_threshold": 0.8,
    "layer_norm_epsilon": 1e-6,
}
INPUTS = load_inputs()
OBS_DIM, CHUNK = INPUTS["obs"].shape[1], INPUTS["actions"].shape[1]
HIDDEN = INPUTS["critic/linear/0/bias"].shape[-1]
LAYERS = {"0": "linear/0", "1": "norm/0", "3": "linear/1", "4": "norm/1", "6": "out"}  # of the Sequential
NOISE = GivenNoise()


def mlp(in_dim: int, out_dim: int) -> nn.Sequential:
    def norm() -> nn.LayerNorm:
        return nn.LayerNorm(HIDDEN, eps=OPTIONS["layer_norm_epsilon"])

    first, second = nn.Linear(in_dim, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
    return nn.Sequential(first, norm(), nn.ReLU(), second, norm(), nn.ReLU(), nn.Linear(HIDDEN, out_dim))


class ActorNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(OBS_DIM, 2 * CHUNK)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.exp()


class CriticNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(OBS_DIM + CHUNK, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([obs, action], dim=-1))


def weights(network: str, index: str, parameter: str, num_members: int) -> Tensor:
    layer = f"{network}/{LAYERS[index]}"
    if "norm" in layer:
        return INPUTS[f"{layer}/{'scale' if parameter == 'weight' else 'bias'}"][:num_members, 0].clone()
    if parameter == "weight":
        return INPUTS[f"{layer}/kernel"][:num_members].transpose(1, 2).clone()
    return INPUTS[f"{layer}/bias"][:num_members, 0].clone()


def set_weights(params: TensorDictParams, network: str, num_members: int | None) -> None:
    for key, value in params.items(True, True):
        *_, index, parameter = key
        new = weights(network, index, parameter, num_members or 1)
        value.data.copy_(new if num_members else new[0])


def store(results: Results, prefix: str, params: TensorDictParams, stacked: bool) -> None:
    for key, value in params.items(True, True):
        *_, index, parameter = key
        gradient = value.grad if stacked else value.grad[None]
        name = LAYERS[index]
        if name.startswith("norm"):
            results.gradient(f"{prefix}/{name}/{'scale' if parameter == 'weight' else 'bias'}", gradient[:, None])
        elif parameter == "weight":
            results.gradient(f"{prefix}/{name}/kernel", gradient.transpose(1, 2))
        else:
            results.gradient(f"{prefix}/{name}/bias", gradient[:, None])


def networks() -> tuple[ProbabilisticActor, ValueOperator]:
    actor = ProbabilisticActor(
        TensorDictModule(ActorNet(), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    return actor, ValueOperator(CriticNet(), in_keys=["observation", "action"])


def batch() -> TensorDict:
    terminated = INPUTS["terminated"].bool()[:, None]
    following = {
        "observation": INPUTS["next_obs"],
        "reward": INPUTS["reward"][:, None],
        "done": terminated,
        "terminated": terminated,
    }
    rows = INPUTS["obs"].shape[0]
    return TensorDict(
        {
            "observation": INPUTS["obs"],
            "action": INPUTS["actions"],
            "next": TensorDict(following, [rows]),
        },
        [rows],
    )


def clear(loss: nn.Module) -> None:
    for parameter in loss.parameters():
        parameter.grad = None


def ensemble(results: Results) -> None:
    members = OPTIONS["redq_critics"]
    loss = REDQLoss(
        *networks(),
        num_qvalue_nets=members,
        sub_sample_len=len(OPTIONS["redq_subset"]),
        loss_function="l2",
        alpha_init=OPTIONS["temperature"],
        target_entropy=OPTIONS["target_entropy_per_dim"] * CHUNK,
    )
    loss.make_value_estimator(gamma=GAMMA)
    set_weights(loss.actor_network_params, "actor", None)
    set_weights(loss.qvalue_network_params, "critic", members)
    set_weights(loss.target_qvalue_network_params, "target_critic", members)
    chosen = OPTIONS["redq_subset"]
    rest = [i for i in range(members) if i not in chosen]
    torch.randperm, drawn = (lambda n: torch.tensor(chosen + rest)), torch.randperm
    NOISE.give([torch.stack([INPUTS["noise_actor"], INPUTS["noise_next"][0]])])
    out = loss(batch())
    torch.randperm = drawn
    for name in ("qvalue", "actor", "alpha"):
        results.loss(f"redq/{name}", out[f"loss_{name}"])
    out["loss_qvalue"].backward(retain_graph=True)
    store(results, "redq/critic", loss.qvalue_network_params, stacked=True)
    clear(loss)
    out["loss_actor"].backward()
    store(results, "redq/actor", loss.actor_network_params, stacked=False)
    clear(loss)
    out["loss_alpha"].backward()
    results.gradient("redq/log_alpha", loss.log_alpha.grad)


def conservative(results: Results) -> None:
    members = 2
    loss = CQLLoss(
        *networks(),
        loss_function="l2",
        alpha_init=OPTIONS["temperature"],
        target_entropy=OPTIONS["target_entropy_per_dim"] * CHUNK,
        num_random=SAMPLES,
        with_lagrange=True,
        lagrange_thresh=OPTIONS["lagrange_threshold"],
    )
    loss.make_value_estimator(gamma=GAMMA)
    set_weights(loss.actor_network_params, "actor", None)
    set_weights(loss.qvalue_network_params, "critic", members)
    set_weights(loss.target_qvalue_network_params, "target_critic", members)
    data = batch()
    NOISE.give([INPUTS["noise_next"][0]])
    td, _ = loss.q_loss(data)  # leaves the data's values behind for the conservative loss
    td.backward(retain_graph=True)
    results.loss("cql/td", td)
    store(results, "cql/td", loss.qvalue_network_params, stacked=True)
    clear(loss)
    NOISE.give([rows_first(x) for x in INPUTS["noise_policy"]], [rows_first(INPUTS["random"])])
    gap, _ = loss.cql_loss(data)
    gap.backward(retain_graph=True)
    results.loss("cql/conservative", gap)
    store(results, "cql/conservative", loss.qvalue_network_params, stacked=True)
    clear(loss)
    prime, _ = loss.alpha_prime_loss(data)
    prime.mean().backward()
    results.gradient("cql/log_alpha_prime", loss.log_alpha_prime.grad)
    clear(loss)
    NOISE.give([INPUTS["noise_actor"]])
    actor, _ = loss.actor_loss(batch())
    actor.backward()
    results.loss("cql/actor", actor)
    store(results, "cql/actor", loss.actor_network_params, stacked=False)


def main() -> None:
    NOISE.install()
    results = Results()
    ensemble(results)
    conservative(results)
    results.save("torchrl", OPTIONS)


if __name__ == "__main__":
    main()
