"""torchrl's updates of soft actor-critic; runs in torchrl's own environment (see `harness.PeerGroup`).

Modes: "sac", SACLoss with an ensemble, its critic and actor losses called apart, so that the actor is updated once an
environment step; "redq", REDQLoss, whose one loss makes every update one of critics, actor and temperature;
"sac_compiled", the first with torch.compile on its two losses. The sizes come as JSON in CRITIC_SIZES.
"""

import json
import os
import sys
import time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the library prints goes to the log

import torch  # noqa: E402
from tensordict import TensorDict  # noqa: E402  # pyright: ignore[reportMissingImports]
from tensordict.nn import NormalParamExtractor, TensorDictModule  # noqa: E402  # pyright: ignore[reportMissingImports]
from torchrl.data import Bounded  # noqa: E402  # pyright: ignore[reportMissingImports]
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator  # noqa: E402  # pyright: ignore[reportMissingImports]
from torchrl.objectives import SoftUpdate  # noqa: E402  # pyright: ignore[reportMissingImports]
from torchrl.objectives.redq import REDQLoss  # noqa: E402  # pyright: ignore[reportMissingImports]
from torchrl.objectives.sac import SACLoss  # noqa: E402  # pyright: ignore[reportMissingImports]


class Critic(torch.nn.Module):
    def __init__(self, sizes: dict) -> None:
        super().__init__()
        self.mlp = MLP(
            in_features=sizes["obs_dim"] + sizes["chunk_dim"],
            out_features=1,
            num_cells=sizes["hidden_sizes"],
            activation_class=torch.nn.ReLU,
            norm_class=torch.nn.LayerNorm,
            norm_kwargs=[{"normalized_shape": width} for width in sizes["hidden_sizes"]],
        )

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.mlp(torch.cat([obs, action], -1))


class Learner:
    def __init__(self, mode: str, sizes: dict, device: torch.device) -> None:
        actions = sizes["chunk_dim"]
        mlp = MLP(
            in_features=sizes["obs_dim"],
            out_features=2 * actions,
            num_cells=sizes["hidden_sizes"],
            activation_class=torch.nn.ReLU,
        )
        actor = ProbabilisticActor(
            TensorDictModule(
                torch.nn.Sequential(mlp, NormalParamExtractor()), in_keys=["observation"], out_keys=["loc", "scale"]
            ),
            in_keys=["loc", "scale"],
            spec=Bounded(-torch.ones(actions), torch.ones(actions), (actions,)),
            distribution_class=TanhNormal,
            return_log_prob=True,
        )
        critic = ValueOperator(Critic(sizes), in_keys=["observation", "action"])
        kind = REDQLoss if mode == "redq" else SACLoss
        self.loss = kind(actor, critic, num_qvalue_nets=sizes["num_members"], loss_function="l2").to(device)
        self.loss.make_value_estimator(gamma=0.99)
        self.target = SoftUpdate(self.loss, tau=0.005)
        self.update = self.update_redq if mode == "redq" else self.update_sac
        parts = (
            (self.loss.actor_network_params, 1e-4),
            (self.loss.qvalue_network_params, 3e-4),
            ([self.loss.log_alpha], 1e-4),
        )
        self.actor_adam, self.critic_adam, self.alpha_adam = (
            torch.optim.Adam(p if isinstance(p, list) else list(p.values(True, True)), lr=rate) for p, rate in parts
        )
        if mode != "redq":
            wrap = torch.compile if mode == "sac_compiled" else lambda function: function
            self.critic_loss, self.actor_loss = wrap(self.loss.qvalue_v2_loss), wrap(self.loss.actor_loss)

    def update_redq(self, minibatches: list[TensorDict]) -> None:
        for batch in minibatches:
            losses = self.loss(batch.copy())
            (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]).backward()
            for adam in (self.actor_adam, self.critic_adam, self.alpha_adam):
                adam.step()
                adam.zero_grad()
            self.target.step()

    def update_sac(self, minibatches: list[TensorDict]) -> None:
        for batch in minibatches:
            step(self.critic_loss(batch.copy())[0], self.critic_adam)
            self.target.step()
        actor_loss, info = self.actor_loss(minibatches[-1].copy())
        step(actor_loss, self.actor_adam)
        step(self.loss.alpha_loss(info["log_prob"].detach()).mean(), self.alpha_adam)


def step(loss: torch.Tensor, adam: torch.optim.Adam) -> None:
    loss.backward()
    adam.step()
    adam.zero_grad()


def minibatches(sizes: dict, device: torch.device) -> list[TensorDict]:
    torch.manual_seed(0)
    rows, obs = sizes["batch_size"], sizes["obs_dim"]

    def one() -> TensorDict:
        after = {
            "observation": torch.randn(rows, obs),
            "reward": torch.randn(rows, 1),
            "done": torch.zeros(rows, 1, dtype=torch.bool),
            "terminated": torch.zeros(rows, 1, dtype=torch.bool),
        }
        now = {"observation": torch.randn(rows, obs), "action": torch.tanh(torch.randn(rows, sizes["chunk_dim"]))}
        return TensorDict({**now, "next": after}, batch_size=[rows], device=device)

    return [one() for _ in range(sizes["utd"])]


def main(mode: str) -> None:
    sizes = json.loads(os.environ["CRITIC_SIZES"])
    torch.set_num_threads(sizes["num_threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learner, batches = Learner(mode, sizes, device), minibatches(sizes, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):
        learner.update(batches)
    wait()
    answer({"ready": True})
    for line in sys.stdin:
        seconds = json.loads(line)["seconds"]
        count, begin, cpu = 0, time.perf_counter(), time.process_time()
        while (elapsed := time.perf_counter() - begin) < seconds:
            learner.update(batches)
            wait()
            count += 1
        answer({"steps": count, "seconds": elapsed, "cpu_seconds": time.process_time() - cpu})


def answer(message: dict) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
