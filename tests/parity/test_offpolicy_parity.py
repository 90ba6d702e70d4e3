"""Losses and gradients of CQL, Cal-QL, SAC, REDQ and IQL against d3rlpy and torchrl.

`golden/` has what they make of one fixed batch with given weights and noise (`make_golden.py`). Both sides compute in
double precision, so that an agreement is one of definitions: it is within 1e-14, and 2e-7 where d3rlpy rounds the
expectile to single precision. Where definitions differ, the difference is a constant or a conversion with a name here,
or an option of ours.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.make_golden import make_inputs
from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy import iql, rlpd
from vla_rl.offpolicy.calql import (
    CalQLConfig,
    ConservativeConfig,
    conservative_gap,
    conservative_loss_of,
    lagrange_term,
)
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig, bootstrap_loss
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec, Network, tanh_gaussian
from vla_rl.offpolicy.sac import (
    ActorCritic,
    SACConfig,
    actor_loss_of,
    chunk_values,
    next_values_of,
    temperature_loss,
)

GOLDEN = Path(__file__).parent / "golden"
RTOL, ROUNDING = 1e-6, 1e-12
SPEC = AgentSpec(obs_dim=5, action_horizon=2, action_dim=3)
CHUNK = SPEC.chunk_dim
ALL = EnsembleReduction("min", None)
KEY = jax.random.key(0)  # draws nothing where all members count

# ------------------------------------------------------------------------------------------- differences by definition
SUM_OVER_TWO_CRITICS = 2.0  # d3rlpy and torchrl's CQL add the two critics' losses; ours is their mean


def by_log(value: float, gradient_of_softplus_parameter: Any) -> Any:
    """Ours is softplus of its parameter, theirs exp: d loss / d log(value) from d loss / d parameter."""
    return gradient_of_softplus_parameter / (1.0 - np.exp(-value)) * value


def softplus_parameter(value: float) -> jax.Array:
    return jnp.log(jnp.expm1(jnp.asarray(value)))


# ------------------------------------------------------------------------------------------------------------- golden
class Golden(NamedTuple):
    """A peer's options, losses and gradients, and the inputs of all peers."""

    options: dict[str, Any]
    losses: dict[str, float]
    gradients: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]

    @staticmethod
    def load(peer: str) -> "Golden":
        report = json.loads((GOLDEN / f"{peer}.json").read_text())
        arrays = []
        for name in (peer, "inputs"):
            with np.load(GOLDEN / f"{name}.npz") as stored:
                arrays.append({key: stored[key] for key in stored.files})
        return Golden(report["options"], report["losses"], *arrays)

    def params(self, network: Network, name: str, members: int = 1) -> Any:
        """The stored weights in the structure of `network`."""
        paths, structure = jax.tree_util.tree_flatten_with_path(network.initial)
        stored = [
            self.inputs["shared_log_std"]
            if leaf_name(path) == "log_std"
            else self.inputs[f"{name}/{leaf_name(path)}"][:members]
            for path, _ in paths
        ]
        if "shared_log_std" in self.inputs and any(leaf_name(path) == "log_std" for path, _ in paths):
            stored = [x[..., :CHUNK] if x.shape[-1] == 2 * CHUNK else x for x in stored]
        return structure.unflatten(
            jnp.asarray(x).reshape(leaf.shape) for x, (_, leaf) in zip(stored, paths, strict=True)
        )

    def chunks(self, name: str) -> jax.Array:
        """[..., H * A] -> [..., H, A]."""
        array = self.inputs[name]
        return jnp.asarray(array.reshape(*array.shape[:-1], SPEC.action_horizon, SPEC.action_dim))

    def batch(self, discount: np.ndarray) -> ReplayBatch:
        rows = np.arange(len(discount))
        batch = ReplayBatch(
            obs=self.inputs["obs"],
            actions=self.chunks("actions"),
            mask=np.ones((len(rows), SPEC.action_horizon), bool),
            reward=self.inputs["reward"],
            discount=discount * (1.0 - self.inputs["terminated"]),
            next_obs=self.inputs["next_obs"],
            mc_return=self.inputs["mc_return"],
            weight=np.ones(len(rows)),
            rows=rows,
            next_rows=rows,
        )
        return jax.tree.map(jnp.asarray, batch)

    def check_loss(self, name: str, ours: Any) -> None:
        assert float(ours) == pytest.approx(self.losses[name], rel=RTOL), name

    def check(self, name: str, ours: Any) -> None:
        """A number, or a network's gradients by leaf: the largest difference relative to the leaf's largest element.

        The conservative term has no gradient for a bias of the last layer: what is there is rounding on both sides.
        """
        leaves = jax.tree_util.tree_flatten_with_path(ours)[0]
        checked = 0
        for path, leaf in leaves:
            full = "/".join(filter(None, (name, leaf_name(path))))
            if full.endswith("/log_std"):
                continue
            wanted, scale = self.gradients[full], np.abs(self.gradients[full]).max()
            error = np.abs(np.asarray(leaf).reshape(wanted.shape) - wanted).max() / max(scale, ROUNDING / RTOL)
            assert error < RTOL, f"{full}: {error:.1e}"
            checked += 1
        assert checked > 0


def leaf_name(path: Any) -> str:
    names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
    return "/".join(name for name in names if name not in ("mlp", "value", ""))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def _sac_part(*, members: int, layer_norm: bool, **fields: Any) -> SACConfig:
    return SACConfig(
        actor=ActorNetConfig((8, 8), layer_norm=layer_norm),
        critic=MLPCriticConfig(members, (8, 8), layer_norm=layer_norm),
        target_reduction=ALL,
        actor_reduction=ALL,
        entropy_on_next_obs=False,
        **fields,
    )


def _networks(golden: Golden, config: SACConfig) -> tuple[ActorCritic, dict[str, Any]]:
    nets, members = ActorCritic.build(SPEC, config), config.critic.num_members
    return nets, {
        "actor": golden.params(nets.actor, "actor"),
        "critic": golden.params(nets.critic, "critic", members),
        "target_critic": golden.params(nets.critic, "target_critic", members),
        "temperature": softplus_parameter(golden.options["temperature"]),
    }


def test_inputs_are_those_of_the_script():
    stored, made = Golden.load("d3rlpy").inputs, make_inputs()
    assert stored.keys() == made.keys()
    for name, array in made.items():
        np.testing.assert_allclose(stored[name], array, rtol=1e-15, err_msg=name)


# ------------------------------------------------------------------------------------------------------------- d3rlpy
@pytest.mark.parametrize("name", ["calql", "cql"])
def test_conservative_critic_loss_of_d3rlpy(name):
    """Cal-QL with the best of three sampled chunks in the backup, CQL with one chunk and the entropy term."""
    golden, soft = Golden.load("d3rlpy"), name == "cql"
    options = golden.options
    samples = 1 if soft else options["n_action_samples"]
    part = _sac_part(members=2, layer_norm=False, num_target_actions=samples, backup_entropy=soft)
    conservative = ConservativeConfig(
        alpha=options["conservative_weight"],
        num_actions=options["n_action_samples"],
        form="importance",
        calibrate=not soft,
        lagrange_gap=options["alpha_threshold"],
    )
    nets, params = _networks(golden, part)
    batch = golden.batch(options["gamma"] ** golden.inputs["steps"])
    multiplier = softplus_parameter(options["alpha"])

    def loss(critic: Any, parameter: Any) -> tuple[jax.Array, jax.Array]:
        following = next_values_of(nets, part, params, batch.next_obs, golden.chunks("noise_next")[:samples], KEY)
        td, _ = bootstrap_loss(nets.critic, part.critic.head, critic, batch, following, 1)
        gap, _ = conservative_loss_of(
            nets,
            CalQLConfig(part, conservative),
            critic,
            params,
            batch,
            golden.chunks("random"),
            golden.chunks("noise_policy"),
            KEY,
        )
        return td + lagrange_term(conservative, parameter, gap), (td, gap)  # pyright: ignore[reportReturnType]

    gradients, (td, gap) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params["critic"], multiplier)
    weighed = options["alpha"] * options["conservative_weight"] * (gap - options["alpha_threshold"])
    golden.check_loss(f"{name}/conservative", SUM_OVER_TWO_CRITICS * weighed)
    golden.check_loss(f"{name}/critic", SUM_OVER_TWO_CRITICS * (td + weighed))
    golden.check(f"{name}/critic", jax.tree.map(lambda x: SUM_OVER_TWO_CRITICS * x, gradients[0]))
    golden.check(f"{name}/log_alpha", by_log(options["alpha"], gradients[1]))


def test_actor_and_temperature_of_d3rlpy():
    golden = Golden.load("d3rlpy")
    config = _sac_part(members=2, layer_norm=False)
    nets, params = _networks(golden, config)
    batch = golden.batch(np.ones(6))

    def loss(actor: Any) -> Any:
        return actor_loss_of(nets, config, actor, params, batch, golden.chunks("noise_actor"), KEY)

    gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(params["actor"])
    golden.check_loss("sac/actor", metrics["actor_loss"])
    golden.check("sac/actor", gradient)
    of_temperature = jax.grad(temperature_loss)(params["temperature"], metrics["entropy"], -1.0 * CHUNK)
    golden.check("sac/log_temp", by_log(golden.options["temperature"], of_temperature))


def test_iql_of_d3rlpy():
    golden = Golden.load("d3rlpy")
    options = golden.options
    config = iql.IQLConfig(
        actor=ActorNetConfig((8, 8), layer_norm=False, std="shared"),
        critic=MLPCriticConfig(2, (8, 8), layer_norm=False),
        value_hidden_sizes=(8, 8),
        expectile=options["expectile"],
        inverse_temperature=options["weight_temp"],
        max_weight=options["max_weight"],
    )
    nets = iql.IQLNetworks.build(SPEC, config)
    params = {
        "actor": golden.params(nets.actor, "actor"),
        "critic": golden.params(nets.critic, "critic", 2),
        "target_critic": golden.params(nets.critic, "target_critic", 2),
        "value": golden.params(nets.value, "value"),
    }
    batch = golden.batch(options["gamma"] ** golden.inputs["steps"])
    q_data = iql.data_values(nets, config, params, batch, KEY)

    gradient, metrics = jax.jit(
        jax.grad(lambda critic: iql.critic_loss(nets, config, critic, params, batch), has_aux=True)
    )(params["critic"])
    golden.check_loss("iql/critic", SUM_OVER_TWO_CRITICS * metrics["td_loss"])
    golden.check("iql/critic", jax.tree.map(lambda x: SUM_OVER_TWO_CRITICS * x, gradient))

    gradient, metrics = jax.grad(lambda v: iql.value_loss(nets, config, v, batch, q_data), has_aux=True)(
        params["value"]
    )
    golden.check_loss("iql/value", metrics["value_loss"])
    golden.check("iql/value", gradient)

    gradient, metrics = jax.jit(
        jax.grad(lambda actor: iql.actor_loss(nets, config, actor, params, batch, q_data), has_aux=True)
    )(params["actor"])
    assert 0.0 < float(metrics["clipped_share"]) < 1.0  # both sides of the clip are compared
    golden.check_loss("iql/actor", metrics["actor_loss"])
    golden.check("iql/actor", gradient)
    # d3rlpy's standard deviation is a sigmoid of its parameter within a range, ours the exponential of it, clipped
    low, high = options["log_std_range"]
    share = 1.0 / (1.0 + np.exp(-golden.gradients["iql/actor/log_std_parameter_value"]))
    ours = np.asarray(gradient["log_std"][...]) * (high - low) * share * (1.0 - share)
    golden.check("iql/actor/log_std_parameter", ours)


# ------------------------------------------------------------------------------------------------------------ torchrl
def _key_that_draws(reduction: EnsembleReduction, members: list[int], num_members: int) -> jax.Array:
    """A key with which `reduction` draws the subset that the peer was given."""
    for seed in range(1000):
        key = jax.random.key(seed)
        if sorted(np.asarray(reduction.members(key, num_members)).tolist()) == members:
            return key
    raise AssertionError(f"no key draws {members}")


def test_redq_of_torchrl():
    """RLPD's settings with the entropy term; torchrl draws its subset without replacement and has means as ours."""
    golden = Golden.load("torchrl")
    options = golden.options
    published = rlpd.rlpd_config((8, 8), num_members=options["redq_critics"], backup_entropy=True)
    config = SACConfig(
        actor=ActorNetConfig((8, 8)),
        critic=published.critic,
        target_reduction=published.target_reduction,
        actor_reduction=published.actor_reduction,
        backup_entropy=True,
    )
    nets, params = _networks(golden, config)
    batch = golden.batch(np.full(6, options["gamma"]))
    key = _key_that_draws(config.target_reduction, options["redq_subset"], options["redq_critics"])
    following = next_values_of(nets, config, params, batch.next_obs, golden.chunks("noise_next")[:1], key)

    gradient, metrics = jax.jit(
        jax.grad(lambda c: bootstrap_loss(nets.critic, config.critic.head, c, batch, following, 1), has_aux=True)
    )(params["critic"])
    golden.check_loss("redq/qvalue", metrics["td_loss"])
    golden.check("redq/critic", gradient)

    def loss(actor: Any) -> Any:
        return actor_loss_of(nets, config, actor, params, batch, golden.chunks("noise_actor"), KEY)

    gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(params["actor"])
    golden.check_loss("redq/actor", metrics["actor_loss"])
    golden.check("redq/actor", gradient)
    # torchrl reads the entropy at both ends of the transition, ours at one of them by option
    at_next = -tanh_gaussian(*nets.actor(params["actor"], batch.next_obs), golden.chunks("noise_next")[:1])[1].mean()
    entropy, target = 0.5 * (metrics["entropy"] + at_next), options["target_entropy_per_dim"] * CHUNK
    value, of_temperature = jax.value_and_grad(temperature_loss)(params["temperature"], entropy, target)
    golden.check_loss("redq/alpha", value)
    golden.check("redq/log_alpha", by_log(options["temperature"], of_temperature))


def test_td_and_actor_of_torchrls_cql():
    golden = Golden.load("torchrl")
    config = _sac_part(members=2, layer_norm=True)
    nets, params = _networks(golden, config)
    batch = golden.batch(np.full(6, golden.options["gamma"]))
    following = next_values_of(nets, config, params, batch.next_obs, golden.chunks("noise_next")[:1], KEY)

    gradient, metrics = jax.jit(
        jax.grad(lambda c: bootstrap_loss(nets.critic, config.critic.head, c, batch, following, 1), has_aux=True)
    )(params["critic"])
    golden.check_loss("cql/td", SUM_OVER_TWO_CRITICS * metrics["td_loss"])
    golden.check("cql/td", jax.tree.map(lambda x: SUM_OVER_TWO_CRITICS * x, gradient))

    def loss(actor: Any) -> Any:
        return actor_loss_of(nets, config, actor, params, batch, golden.chunks("noise_actor"), KEY)

    gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(params["actor"])
    golden.check_loss("cql/actor", metrics["actor_loss"])
    golden.check("cql/actor", gradient)


def test_conservative_term_of_torchrls_cql():
    """torchrl has a log-sum-exp over each triple (uniform, policy at s, policy at s') and their mean, where the paper
    and ours have one over all samples; and it values the policy's chunks of s' at s', the authors' code and ours at s.
    """
    golden = Golden.load("torchrl")
    part = _sac_part(members=2, layer_norm=True)
    nets, params = _networks(golden, part)
    batch, samples = golden.batch(np.ones(6)), golden.options["num_random"]
    config = ConservativeConfig(
        alpha=1.0, num_actions=1, calibrate=False, lagrange_gap=golden.options["lagrange_threshold"]
    )

    def loss(critic: Any, parameter: Any) -> Any:
        def values(obs: Any, chunks: Any) -> Any:
            """[N, B, H, A] -> [E, 1, B * N, 1]: every sample as a row of its own."""
            return chunk_values(nets, part, critic, obs, chunks)[..., 0].reshape(2, 1, -1, 1)

        noise = golden.chunks("noise_policy")
        policy = [
            tanh_gaussian(*nets.actor(params["actor"], obs), n)
            for obs, n in ((batch.obs, noise[0]), (batch.next_obs, noise[1]))
        ]
        q_policy = [values(obs, chunks) for obs, (chunks, _) in zip((batch.obs, batch.next_obs), policy, strict=True)]
        q_data = values(batch.obs, jnp.broadcast_to(batch.actions, (samples, *batch.actions.shape)))[:, 0]
        gap, _ = conservative_gap(
            config,
            q_data,
            values(batch.obs, golden.chunks("random")),
            jnp.concatenate(q_policy, axis=1),
            jnp.full(q_data.shape[1], -jnp.inf),
            jnp.stack([log_prob.reshape(-1) for _, log_prob in policy]),
            CHUNK,
        )
        return lagrange_term(config, parameter, gap.mean()), gap.mean()

    gradients, gap = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params["critic"], softplus_parameter(1.0))
    golden.check_loss("cql/conservative", SUM_OVER_TWO_CRITICS * gap)
    golden.check("cql/log_alpha_prime", by_log(1.0, gradients[1]))
    leaves = jax.tree.map(lambda x: SUM_OVER_TWO_CRITICS * x, gradients[0])  # the multiplier is 1
    golden.check("cql/conservative", leaves)
