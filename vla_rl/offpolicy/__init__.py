"""Off-policy reinforcement learning on action chunks, in JAX and Flax (nnx).

A critic never sees a policy or a picture: what it reads are arrays, the features and state of `ReplayBatch.obs`
[B, O] and action chunks [B, H, A] in [-1, 1]. Every algorithm is a file with its config, its pure losses and its agent.
"""

import os

# The policy, the simulator and JAX share one GPU: by default JAX would take three quarters of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
