"""Schedules, transition kernels, samplers and likelihoods of flow policies: pure functions, in torch."""
