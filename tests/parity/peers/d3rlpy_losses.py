"""CQL, Cal-QL, SAC's actor and IQL of d3rlpy, with given weights, batch and noise."""

from __future__ import annotations

import math
import warnings

warnings.simplefilter("ignore")

import torch  # noqa: E402
from common import GivenNoise, Results, load_inputs, rows_first  # noqa: E402
from d3rlpy.algos.qlearning.torch.cal_ql_impl import CalQLImpl  # noqa: E402  # pyright: ignore[reportMissingImports]
from d3rlpy.algos.qlearning.torch.cql_impl import CQLImpl, CQLModules  # noqa: E402  # pyright: ignore[reportMissingImports]
from d3rlpy.algos.qlearning.torch.iql_impl import IQLImpl, IQLModules  # noqa: E402  # pyright: ignore[reportMissingImports]
from d3rlpy.models.torch import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    ContinuousEnsembleQFunctionForwarder,
    ContinuousMeanQFunction,
    ContinuousMeanQFunctionForwarder,
    NormalPolicy,
    Parameter,
    ValueFunction,
    VectorEncoder,
    VectorEncoderWithAction,
)
from d3rlpy.torch_utility import TorchMiniBatch  # noqa: E402  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # noqa: E402

MEMBERS, SAMPLES, GAMMA = 2, 3, 0.9
OPTIONS = {
    "gamma": GAMMA,
    "num_critics": MEMBERS,
    "n_action_samples": SAMPLES,
    "temperature": 0.4,
    "alpha": 1.7,
    "conservative_weight": 5.0,
    "alpha_threshold": 0.8,
    "expectile": 0.8,
    "weight_temp": 3.0,
    "max_weight": 2.0,
    "log_std_range": [-20.0, 2.0],
}
INPUTS = load_inputs()
OBS_DIM, CHUNK = INPUTS["obs"].shape[1], INPUTS["actions"].shape[1]
HIDDEN = [INPUTS["critic/linear/0/bias"].shape[-1]] * 2
NOISE = GivenNoise()


class NoStep:
    """An optimiser that leaves gradients and parameters alone."""

    def zero_grad(self) -> None: ...

    def step(self) -> None: ...


def linears(encoder: nn.Module, out: nn.Linear) -> list[tuple[str, nn.Linear]]:
    hidden = [m for m in encoder.modules() if isinstance(m, nn.Linear)]
    return [("linear/0", hidden[0]), ("linear/1", hidden[1]), ("out", out)]


def set_weights(layers: list[tuple[str, nn.Linear]], network: str, member: int, columns: slice = slice(None)) -> None:
    for name, layer in layers:
        chosen = columns if name == "out" else slice(None)
        layer.weight.data = INPUTS[f"{network}/{name}/kernel"][member][:, chosen].T.clone()
        layer.bias.data = INPUTS[f"{network}/{name}/bias"][member, 0, chosen].clone()


def q_functions(network: str) -> tuple[nn.ModuleList, ContinuousEnsembleQFunctionForwarder]:
    modules = nn.ModuleList()
    for member in range(MEMBERS):
        encoder = VectorEncoderWithAction((OBS_DIM,), CHUNK, HIDDEN, activation=nn.ReLU())
        modules.append(ContinuousMeanQFunction(encoder, HIDDEN[-1]))
        set_weights(linears(modules[-1]._encoder, modules[-1]._fc), network, member)
    forwarders = [ContinuousMeanQFunctionForwarder(q) for q in modules]
    return modules, ContinuousEnsembleQFunctionForwarder(forwarders, CHUNK)


def policy(shared_std: bool) -> NormalPolicy:
    low, high = OPTIONS["log_std_range"]
    net = NormalPolicy(VectorEncoder((OBS_DIM,), HIDDEN), HIDDEN[-1], CHUNK, low, high, use_std_parameter=shared_std)
    set_weights(linears(net._encoder, net._mu), "actor", 0, slice(0, CHUNK))
    if shared_std:  # d3rlpy squashes its parameter into the range by a sigmoid
        share = (INPUTS["shared_log_std"] - low) / (high - low)
        net._logstd.data = torch.log(share / (1.0 - share))[None]
    else:
        set_weights([("out", net._logstd)], "actor", 0, slice(CHUNK, 2 * CHUNK))
    return net


def batch() -> TorchMiniBatch:
    def column(name: str) -> Tensor:
        return INPUTS[name].double()[:, None]

    return TorchMiniBatch(
        observations=INPUTS["obs"],
        actions=INPUTS["actions"],
        rewards=column("reward"),
        next_observations=INPUTS["next_obs"],
        next_actions=INPUTS["actions"],
        returns_to_go=column("mc_return"),
        terminals=column("terminated"),
        intervals=column("steps"),
        device="cpu",
    )


def store_layers(results: Results, prefix: str, per_member: list[list[tuple[str, nn.Linear]]]) -> None:
    for i, (name, _) in enumerate(per_member[0]):
        layers = [layers[i][1] for layers in per_member]
        results.gradient(f"{prefix}/{name}/kernel", torch.stack([layer.weight.grad.T for layer in layers]))
        results.gradient(f"{prefix}/{name}/bias", torch.stack([layer.bias.grad[None] for layer in layers]))


def store_policy(results: Results, prefix: str, net: NormalPolicy) -> None:
    layers = linears(net._encoder, net._mu)
    if isinstance(net._logstd, nn.Linear):
        joined = nn.Linear(HIDDEN[-1], 2 * CHUNK)
        joined.weight.grad = torch.cat([net._mu.weight.grad, net._logstd.weight.grad])
        joined.bias.grad = torch.cat([net._mu.bias.grad, net._logstd.bias.grad])
        layers[-1] = ("out", joined)
    else:
        results.gradient(f"{prefix}/log_std_parameter", net._logstd.grad[0])
        results.gradient(f"{prefix}/log_std_parameter_value", net._logstd.detach()[0])
    store_layers(results, prefix, [layers])


def conservative(results: Results, name: str, impl_class: type[CQLImpl], soft: bool) -> None:
    """Critic loss and gradients; with `soft` the backup has the entropy term, else it is the best of the samples."""
    (q, forwarder), (target, target_forwarder) = q_functions("critic"), q_functions("target_critic")
    modules = CQLModules(
        policy=policy(shared_std=False),
        q_funcs=q,
        targ_q_funcs=target,
        actor_optim=NoStep(),
        critic_optim=NoStep(),
        log_temp=Parameter(torch.full((1, 1), math.log(OPTIONS["temperature"]))),
        temp_optim=NoStep(),
        log_alpha=Parameter(torch.full((1, 1), math.log(OPTIONS["alpha"]))),
        alpha_optim=NoStep(),
    )
    weight, threshold = OPTIONS["conservative_weight"], OPTIONS["alpha_threshold"]
    impl = impl_class(
        observation_shape=(OBS_DIM,),
        action_size=CHUNK,
        modules=modules,
        q_func_forwarder=forwarder,
        targ_q_func_forwarder=target_forwarder,
        gamma=GAMMA,
        tau=0.005,
        alpha_threshold=threshold,
        conservative_weight=weight,
        n_action_samples=SAMPLES,
        soft_q_backup=soft,
        max_q_backup=not soft,
        compiled=False,
        device="cpu",
    )
    for member, net in enumerate(target):  # the constructor has made the target a copy of the critic
        set_weights(linears(net._encoder, net._fc), "target_critic", member)
    NOISE.give([INPUTS["noise_next"][0] if soft else INPUTS["noise_next"]])
    q_next = impl.compute_target(batch())
    NOISE.give(list(INPUTS["noise_policy"]), [rows_first(INPUTS["random"])])
    loss = impl.compute_critic_loss(batch(), q_next)
    # the multiplier's gradient is there already; the critic's loss would add to it, which d3rlpy never applies
    results.gradient(f"{name}/log_alpha", next(modules.log_alpha.parameters()).grad[0, 0])
    loss.critic_loss.backward()
    results.loss(f"{name}/critic", loss.critic_loss)
    results.loss(f"{name}/conservative", loss.conservative_loss)
    store_layers(results, f"{name}/critic", [linears(net._encoder, net._fc) for net in q])
    if soft:
        NOISE.give([INPUTS["noise_actor"]])
        modules.policy.zero_grad()
        actor = impl.compute_actor_loss(batch(), modules.policy(INPUTS["obs"]))
        temperature_gradient = next(modules.log_temp.parameters()).grad[0, 0].clone()
        actor.actor_loss.backward()
        results.loss("sac/actor", actor.actor_loss)
        results.gradient("sac/log_temp", temperature_gradient)
        store_policy(results, "sac/actor", modules.policy)


def implicit(results: Results) -> None:
    (q, forwarder), (target, target_forwarder) = q_functions("critic"), q_functions("target_critic")
    value = ValueFunction(VectorEncoder((OBS_DIM,), HIDDEN), HIDDEN[-1])
    set_weights(linears(value._encoder, value._fc), "value", 0)
    net = policy(shared_std=True)
    modules = IQLModules(
        policy=net, q_funcs=q, targ_q_funcs=target, actor_optim=NoStep(), critic_optim=NoStep(), value_func=value
    )
    impl = IQLImpl(
        observation_shape=(OBS_DIM,),
        action_size=CHUNK,
        modules=modules,
        q_func_forwarder=forwarder,
        targ_q_func_forwarder=target_forwarder,
        gamma=GAMMA,
        tau=0.005,
        expectile=OPTIONS["expectile"],
        weight_temp=OPTIONS["weight_temp"],
        max_weight=OPTIONS["max_weight"],
        compiled=False,
        device="cpu",
    )
    for member, module in enumerate(target):
        set_weights(linears(module._encoder, module._fc), "target_critic", member)
    NOISE.give([])
    loss = impl.compute_critic_loss(batch(), impl.compute_target(batch()))
    loss.critic_loss.backward()
    results.loss("iql/critic", loss.q_loss)
    results.loss("iql/value", loss.v_loss)
    store_layers(results, "iql/critic", [linears(m._encoder, m._fc) for m in q])
    store_layers(results, "iql/value", [linears(value._encoder, value._fc)])
    actor = impl.compute_actor_loss(batch(), net(INPUTS["obs"]))
    actor.actor_loss.backward()
    results.loss("iql/actor", actor.actor_loss)
    store_policy(results, "iql/actor", net)


def main() -> None:
    NOISE.install()
    results = Results()
    conservative(results, "calql", CalQLImpl, soft=False)
    conservative(results, "cql", CQLImpl, soft=True)
    implicit(results)
    results.save("d3rlpy", OPTIONS)


if __name__ == "__main__":
    main()
