"""The training loop, run folders, checkpoints, metrics, supervised fine-tuning."""
