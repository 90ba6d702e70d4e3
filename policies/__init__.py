"""Policies on shared blocks."""

if __name__ == "policies":
    raise ImportError("import vla_rl.policies, not policies")
