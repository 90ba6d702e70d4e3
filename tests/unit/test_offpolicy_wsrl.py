"""The switch from offline to online: what crosses it, bit for bit and in another process, and what each option leaves.

Experiment: pre-train, save, load in a fresh process, switch, update. All must be as without the file between.
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.unit.offpolicy_batches import ACTION_DIM, HORIZON, OBS_DIM, host, minibatches
from vla_rl.offpolicy.calql import CalQL, CalQLConfig, ConservativeConfig
from vla_rl.offpolicy.critics import MLPCriticConfig
from vla_rl.offpolicy.iql import IQL, IQLConfig
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec
from vla_rl.offpolicy.sac import SAC, SACConfig
from vla_rl.offpolicy.train_state import load_train_state, save_train_state, to_tensors, with_raw_key
from vla_rl.offpolicy.wsrl import CarryOver, carry_over

SPEC = AgentSpec(OBS_DIM, HORIZON, ACTION_DIM)
SMALL = SACConfig(actor=ActorNetConfig((8,)), critic=MLPCriticConfig(2, (8,)))
OFFLINE = CalQLConfig(SMALL, ConservativeConfig(num_actions=2, lagrange_gap=0.8))
SEED = 5


def digest(state):
    """Of every number in a train state: actor, critics, temperature, Adam's moments, key, count."""
    sha = hashlib.sha256()
    for leaf in host(state):
        sha.update(str((leaf.dtype, leaf.shape)).encode() + np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


@cache
def online_agent():
    return SAC(SPEC, SMALL)


def switch_and_update(offline):
    """Digests of the first online state and of the one after its first update."""
    agent = online_agent()
    state = carry_over(offline, agent, CarryOver(), SEED)
    at_switch = digest(state)
    state, _ = agent.update(state, minibatches(2))
    return at_switch, digest(state)


def in_a_new_process(path):
    offline = load_train_state(path, CalQL(SPEC, OFFLINE).init(1))
    print(json.dumps([digest(offline), *switch_and_update(offline)]))


@pytest.fixture(scope="module")
def pretrained():
    agent = CalQL(SPEC, OFFLINE)
    state, _ = agent.update(agent.init(0), minibatches(3))
    return state


def test_a_new_process_goes_on_exactly_where_the_offline_one_stopped(pretrained, tmp_path):
    save_train_state(tmp_path / "state.pt", pretrained)
    code = f"from tests.unit.test_offpolicy_wsrl import in_a_new_process as f; f({str(tmp_path / 'state.pt')!r})"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [digest(pretrained), *switch_and_update(pretrained)]


# What each option leaves behind: parts of the state that are then those of a new agent.
LEFT = {
    "actor": (CarryOver(actor=False), {"params actor", "moments actor"}),
    "critic": (CarryOver(critic=False), {"params critic", "moments critic"}),
    "target": (CarryOver(target="fresh"), {"params target_critic"}),
    "moments": (CarryOver(moments=False), {"moments actor", "moments critic", "moments temperature"}),
    "temperature": (CarryOver(temperature=False), {"params temperature", "moments temperature"}),
    "generator": (CarryOver(generator=False), {"key"}),
    "nothing": (CarryOver(), set()),
}


def parts_of(state):
    parts = {f"{kind} {name}": tree for kind in ("params", "moments") for name, tree in getattr(state, kind).items()}
    return parts | {"key": jax.random.key_data(state.key), "num_updates": state.num_updates}


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(host(a), host(b), strict=True))


@pytest.mark.parametrize("name", LEFT)
def test_each_option_leaves_behind_what_it_names_and_nothing_else(name, pretrained):
    carried, left = LEFT[name]
    agent = online_agent()
    fresh, online, offline = (
        parts_of(s) for s in (agent.init(SEED), carry_over(pretrained, agent, carried, SEED), pretrained)
    )
    assert set(online) == set(fresh) == set(offline) - {"params cql_multiplier", "moments cql_multiplier"}
    for part, tree in online.items():
        assert same(tree, fresh[part] if part in left else offline[part]), part
    trained = {"params actor", "params critic", "params temperature", "moments critic", "key"}
    assert all(not same(fresh[part], offline[part]) for part in trained)  # or the lines above would say nothing


def test_a_target_can_begin_as_a_copy_of_the_critic(pretrained):
    agent = online_agent()
    online = carry_over(pretrained, agent, CarryOver(target="critic"), SEED)
    assert same(online.params["target_critic"], pretrained.params["critic"])
    assert not same(online.params["target_critic"], pretrained.params["target_critic"])


def test_the_offline_state_can_be_used_again(pretrained):
    """An update hands the memory of its input on, so what crosses is a copy."""
    before = digest(pretrained)
    first, second = (switch_and_update(pretrained) for _ in range(2))
    assert first == second
    assert digest(pretrained) == before
    assert to_tensors(with_raw_key(pretrained))


def test_agents_that_do_not_belong_together_are_named(pretrained):
    wide = SAC(SPEC, replace(SMALL, critic=MLPCriticConfig(2, (16,))))
    with pytest.raises(ValueError, match="critic is another network offline"):
        carry_over(pretrained, wide, CarryOver(), SEED)
    iql = IQL(SPEC, IQLConfig(actor=ActorNetConfig((8,)), critic=MLPCriticConfig(2, (8,)), value_hidden_sizes=(8,)))
    with pytest.raises(ValueError, match="use an online agent with the same parts"):
        carry_over(iql.init(0), online_agent(), CarryOver(), SEED)
