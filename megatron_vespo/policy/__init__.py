from megatron_vespo import platform

platform.silence_upstream_warnings()
