"""Our own simulator: engines, scene, tasks, experts, rendering, randomisation."""

if __name__ == "sim":
    raise ImportError("import vla_rl.sim, not sim")
