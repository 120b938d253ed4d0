"""Routed experts on the wire, in SGLang's form: base64 of int32 [tokens, layers of the model, topk], C order."""

from __future__ import annotations

import base64
import binascii

import numpy as np

from megatron_vespo.samples.records import RoutingShape


def encode_routing(experts: np.ndarray, shape: RoutingShape) -> str:
    """experts: [tokens, MoE layers, topk]; dense layers are sent as zeros, as SGLang sends them."""
    whole = np.zeros((len(experts), shape.layers, shape.topk), np.int32)
    whole[:, list(shape.moe_layers)] = experts
    return base64.b64encode(whole.tobytes()).decode()


def decode_routing(packed: str, tokens: int, shape: RoutingShape) -> np.ndarray:
    """[tokens, MoE layers, topk] of ``shape.dtype``: dense layers are left out.

    Raises ValueError where the size or a number is not of this shape. That no token goes to one expert twice is for
    the trainer to see (policy/routing_replay.py), which sorts them anyway.
    """
    try:
        flat = np.frombuffer(base64.b64decode(packed, validate=True), np.int32)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"not base64 of int32: {error}") from None
    if flat.size != tokens * shape.layers * shape.topk:
        raise ValueError(f"{flat.size} numbers for {tokens} tokens x {shape.layers} layers x top-{shape.topk}")
    experts = flat.reshape(tokens, shape.layers, shape.topk)[:, list(shape.moe_layers)]
    if experts.size and not 0 <= int(experts.min()) <= int(experts.max()) < shape.experts:
        raise ValueError(f"expert numbers from {experts.min()} to {experts.max()}, and the model has {shape.experts}")
    return experts.astype(shape.dtype)
