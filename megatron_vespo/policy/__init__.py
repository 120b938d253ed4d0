from megatron_vespo import platform

platform.silence_fallback_warnings()
