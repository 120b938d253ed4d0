"""Routed experts between engine and sample: what is sent, what is kept, what is refused."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from megatron_vespo.rollout import EngineError, GenerateRequest, SamplingParams
from megatron_vespo.rollout.client import _generate_body, _generation, calls_of
from megatron_vespo.rollout.routing import decode_routing, encode_routing
from megatron_vespo.samples.records import RoutingShape

SHAPE = RoutingShape(layers=4, moe_layers=(1, 3), topk=2, experts=8)


def request(name: str, routing: RoutingShape | None) -> GenerateRequest:
    return GenerateRequest(name, np.array([5, 6, 7], np.int32), SamplingParams(8), n=2, routing=routing)


@pytest.mark.parametrize("experts,dtype", [(8, np.uint8), (256, np.uint8), (257, np.int16)])
def test_moe_layers_come_back_in_the_narrowest_type(experts: int, dtype: type) -> None:
    shape = RoutingShape(4, (1, 3), 2, experts)
    sent = np.random.default_rng(0).integers(0, experts, (5, 2, 2))
    sent[0, 0, 0] = experts - 1
    back = decode_routing(encode_routing(sent, shape), 5, shape)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, sent)


@pytest.mark.parametrize(
    "values,message",
    [
        (np.zeros(5 * 4 * 2 - 1, np.int32), "39 numbers for 5 tokens x 4 layers x top-2"),
        (np.full(5 * 4 * 2, 8, np.int32), "from 8 to 8, and the model has 8"),
        (np.full(5 * 4 * 2, -1, np.int32), "from -1 to -1"),
    ],
)
def test_what_is_not_of_the_models_shape_is_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_routing(base64.b64encode(values.tobytes()).decode(), 5, SHAPE)
    with pytest.raises(ValueError, match="base64"):
        decode_routing("%", 5, SHAPE)


def test_only_requests_that_want_their_routing_ask_for_it() -> None:
    wanted = [request("a", None), request("b", SHAPE), request("c", SHAPE), request("d", None)]
    calls = calls_of(wanted, lambda request: request)
    assert [[r.id for r in call] for call in calls] == [["a"], ["b", "c"], ["d"]]
    assert [_generate_body(call).get("return_routed_experts") for call in calls] == [None, True, None]


def test_an_answer_without_the_routing_that_was_asked_for_is_refused_by_name() -> None:
    meta = {"output_token_logprobs": [[-1.0, 4, None]] * 2, "finish_reason": {"type": "length"}, "weight_version": "0"}
    with pytest.raises(EngineError, match=r"http://x answered request 'a' without .*--enable-return-routed-experts"):
        _generation("http://x", request("a", SHAPE), {"meta_info": meta})
    assert _generation("http://x", request("a", None), {"meta_info": meta}).routed_experts is None
    aborted = meta | {"output_token_logprobs": [], "finish_reason": {"type": "abort"}}
    assert _generation("http://x", request("a", SHAPE), {"meta_info": aborted}).routed_experts is None
    with pytest.raises(EngineError, match="http://x sent unusable routed experts for request 'a': 1 numbers for 4 tok"):
        _generation("http://x", request("a", SHAPE), {"meta_info": meta | {"routed_experts": "AAAAAA=="}})
