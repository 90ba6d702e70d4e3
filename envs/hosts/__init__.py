"""The far ends of `vla_rl.envs.remote`: run by a simulator's own Python, imported by nobody here but for the wire."""
