"""Recipes: functions that return a complete, frozen config."""

if __name__ == "configs":
    raise ImportError("import vla_rl.configs, not configs")
