"""A small rollout engine over ``transformers``: the subset of SGLang's HTTP API that :mod:`..client` speaks.

For machines without SGLang. ``python -m megatron_vespo.rollout.reference --model-path FOLDER --port 30000``.
"""
