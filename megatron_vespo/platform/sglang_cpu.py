"""What stock SGLang needs on a machine without CUDA. ``python -m megatron_vespo.platform.sglang_cpu FLAGS`` serves."""

SGLANG_VERSION = "0.5.21"
