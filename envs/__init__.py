"""Environments: the chunk contract (`vector.py`) and one adapter a file."""

if __name__ == "envs":
    raise ImportError("import vla_rl.envs, not envs")
