"""On-policy algorithms, one file each: frozen config, pure losses, learner."""
