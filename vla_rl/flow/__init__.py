"""Schedules, transition kernels, samplers and likelihoods of flow policies: pure functions, in torch."""

from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.flow.kernels import KernelTable, data_estimate, kernel_table, noise_estimate
from vla_rl.flow.likelihood import LogProb, chain_kl, gaussian_kl, k3_divergence, log_prob
from vla_rl.flow.noise_head import NoiseHead
from vla_rl.flow.sampling import ode, sample_chain
from vla_rl.flow.trace import FlowTrace

__all__ = [
    "FlowSamplerConfig",
    "FlowTrace",
    "KernelTable",
    "LogProb",
    "NoiseHead",
    "chain_kl",
    "data_estimate",
    "gaussian_kl",
    "k3_divergence",
    "kernel_table",
    "log_prob",
    "noise_estimate",
    "ode",
    "sample_chain",
]
