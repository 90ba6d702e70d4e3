"""vla-rl: take a vision-language-action policy from demonstrations to a real arm with reinforcement learning."""

__version__ = "0.1.0"
