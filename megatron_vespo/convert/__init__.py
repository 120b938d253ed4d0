"""HF folders to Megatron's distributed checkpoints and back, tensor by tensor, without building the model."""

from megatron_vespo import platform

platform.silence_upstream_warnings()
