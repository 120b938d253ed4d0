"""Off-policy reinforcement learning for Mixture-of-Experts language models: VESPO on megatron-core."""

__version__ = "0.1.0"
