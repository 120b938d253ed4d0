"""A sync as an engine sees it from outside, asked of the reference engine and of SGLang alike."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rollout_checkpoints import plain_logprobs
from safetensors.torch import load_file
from served_engines import PROMPT, TOLERANCE, Served, ask, assert_span

from megatron_vespo.rollout.weight_routes import engine_weights
from megatron_vespo.weights.buckets import Bucket
from megatron_vespo.weights.sync import SyncError, WeightTransport
from megatron_vespo.weights.transports.broadcast import Broadcast
from megatron_vespo.weights.transports.disk import DiskTransport
from megatron_vespo.weights.transports.shared_memory import SharedMemory
from megatron_vespo.weights.transports.streamed import StreamedTransport

pytestmark = pytest.mark.slow
TRANSPORTS = ("disk", "broadcast", "shared_memory", "broadcast delta", "shared_memory delta")
SEQUENCE = np.random.default_rng(4).integers(3, 150, 60).astype(np.int32)


def transport_to(kind: str, served: Served, folder: Path) -> WeightTransport:
    name, _, delta = kind.partition(" ")
    engines = [engine_weights(served.kind, served.engine.url, 60)]  # type: ignore[arg-type]
    if name == "disk":
        return DiskTransport(engines, folder, served.folders[0])
    channel = (
        Broadcast(engines, address="127.0.0.1", backend="gloo", device=torch.device("cpu"), timeout_s=60)
        if name == "broadcast"
        else SharedMemory(engines)
    )
    return StreamedTransport(engines, channel, bucket_bytes=200_000, delta=bool(delta))


def publish(served: Served, transport: WeightTransport, index: int) -> int:
    """Version that now has the weights of checkpoint ``index``, proven."""
    served.version += 1
    tensors = load_file(served.folders[index] / "model.safetensors")
    report = transport.publish(served.version, iter(tensors.items()))
    assert report.tensors == report.checked == len(tensors)
    return served.version


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_responses_in_flight_are_of_one_version_then_of_the_next(kind: str, served: Served, tmp_path: Path) -> None:
    transport = transport_to(kind, served, tmp_path)
    for head_start_s in (0.3, 1.0, 3.0):  # on a busy machine the first tokens may come late
        old = publish(served, transport, 0)
        answer = served.in_background([ask("a", 600, n=2), ask("b", 400, prompt=PROMPT[:3])])
        time.sleep(head_start_s)
        new = publish(served, transport, 1)
        (first, second), (third,) = answer.result(timeout=120)
        for prompt, got in ((PROMPT, first), (PROMPT, second), (PROMPT[:3], third)):
            assert np.isin(got.weight_versions, (old, new)).all() and (np.diff(got.weight_versions) >= 0).all()
            for version, model in zip((old, new), served.models, strict=True):
                if version in got.weight_versions:
                    assert_span(model, prompt, got, version)
        if all(set(got.weight_versions) == {old, new} for got in (first, second, third)):
            break
    else:
        pytest.fail("no sync met a response half-way")
    # And with the next version in which little changed, a delta where the transport makes one.
    last = publish(served, transport, 1)
    (scored,) = served.engine.score([SEQUENCE])
    expected = plain_logprobs(served.models[1], SEQUENCE[:1], SEQUENCE[1:])
    np.testing.assert_allclose(scored, expected, atol=TOLERANCE, rtol=0)
    assert served.engine.weight_version() == last
    transport.close()


@pytest.mark.parametrize("kind", ["broadcast", "shared_memory delta"])
def test_a_tensor_damaged_on_the_way_is_named(
    kind: str, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = transport_to(kind, served, tmp_path)
    assert isinstance(transport, StreamedTransport)
    publish(served, transport, 0)
    send = transport.channel.send

    def damaging(bucket: Bucket) -> None:
        if any("layers.0.mlp.experts.3.down_proj" in spec.name for spec in bucket.specs):
            start = 0
            for spec in bucket.specs:
                if "layers.0.mlp.experts.3.down_proj" in spec.name:
                    bucket.flat[start + 2] ^= 1
                start += spec.nbytes
        send(bucket)

    monkeypatch.setattr(transport.channel, "send", damaging)
    with pytest.raises(
        SyncError, match=rf"layers\.0\.mlp\.experts\.3\.down_proj\.weight was sent .*{served.engine.url}"
    ):
        publish(served, transport, 1)
    monkeypatch.undo()
    publish(served, transport, 1)
    (scored,) = served.engine.score([SEQUENCE])
    expected = plain_logprobs(served.models[1], SEQUENCE[:1], SEQUENCE[1:])
    np.testing.assert_allclose(scored, expected, atol=TOLERANCE, rtol=0)
    transport.close()
