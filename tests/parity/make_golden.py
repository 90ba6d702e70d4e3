"""Makes `golden/`: losses and gradients of independent implementations on one fixed batch, in double precision.

    python -m tests.parity.make_golden

Writes `inputs.npz` (weights, batch, noise, uniform chunks), then runs each script of `peers/` in a virtual environment
of its own; they write `<peer>.json` (losses, options, versions) and `<peer>.npz` (gradients). Peers are given the noise
instead of drawing it, so that nothing random is left. `test_offpolicy_parity.py` holds our losses against these files.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np

from tests.benchmarks.harness import peer_python

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
PEERS = {
    "d3rlpy": ["d3rlpy==2.8.1", "gymnasium==1.0.0", "torch==2.13.0"],
    "torchrl": ["torchrl==0.14.1", "torch==2.13.0"],
}
B, OBS_DIM, HORIZON, ACTION_DIM, HIDDEN, MEMBERS, SAMPLES = 6, 5, 2, 3, 8, 4, 3
CHUNK = HORIZON * ACTION_DIM


def make_inputs(seed: int = 0) -> dict[str, np.ndarray]:
    """Networks with two hidden layers, kernels [E, in, out], biases [E, 1, out]; LayerNorms, which a peer may leave."""
    rng = np.random.default_rng(seed)

    def network(name: str, members: int, in_dim: int, out_dim: int) -> dict[str, np.ndarray]:
        arrays = {}
        for i, (a, b) in enumerate([(in_dim, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, out_dim)]):
            layer = f"{name}/linear/{i}" if i < 2 else f"{name}/out"
            arrays[f"{layer}/kernel"] = rng.normal(size=(members, a, b)) / np.sqrt(a)
            arrays[f"{layer}/bias"] = 0.1 * rng.normal(size=(members, 1, b))
            if i < 2:
                arrays[f"{name}/norm/{i}/scale"] = 1.0 + 0.1 * rng.normal(size=(members, 1, b))
                arrays[f"{name}/norm/{i}/bias"] = 0.1 * rng.normal(size=(members, 1, b))
        return arrays

    mc_return = rng.normal(size=B)
    mc_return[1] = -np.inf
    return {
        **network("critic", MEMBERS, OBS_DIM + CHUNK, 1),
        **network("target_critic", MEMBERS, OBS_DIM + CHUNK, 1),
        **network("actor", 1, OBS_DIM, 2 * CHUNK),
        **network("value", 1, OBS_DIM, 1),
        "shared_log_std": 0.3 * rng.normal(size=CHUNK),
        "obs": rng.normal(size=(B, OBS_DIM)),
        "next_obs": rng.normal(size=(B, OBS_DIM)),
        "actions": np.tanh(rng.normal(size=(B, CHUNK))),
        "reward": rng.normal(size=B),
        "steps": np.array([2, 2, 1, 2, 1, 2]),  # k executed of each chunk
        "terminated": np.array([0.0, 0.0, 1.0, 0.0, 0.0, 1.0]),
        "mc_return": mc_return,
        "noise_next": rng.normal(size=(SAMPLES, B, CHUNK)),  # of the target
        "noise_policy": rng.normal(size=(2, SAMPLES, B, CHUNK)),  # of the conservative term, at obs and next_obs
        "noise_actor": rng.normal(size=(B, CHUNK)),
        "random": rng.uniform(-1.0, 1.0, size=(SAMPLES, B, CHUNK)),
    }


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN / "inputs.npz", **make_inputs())
    for name, requirements in PEERS.items():
        subprocess.run([str(peer_python(name, requirements)), str(HERE / "peers" / f"{name}_losses.py")], check=True)


if __name__ == "__main__":
    main()
