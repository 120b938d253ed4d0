"""The weight routes of an engine's HTTP API, as the sender of weights calls them (:class:`~.sync.EngineWeights`)."""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from megatron_vespo.rollout.client import HttpEngine
from megatron_vespo.rollout.protocol import EngineError
from megatron_vespo.weights.buckets import TensorSpec
from megatron_vespo.weights.sync import Checksums, EngineWeights

FLAT = "flattened_bucket"
"""SGLang's name for tensors laid end to end."""


def engine_weights(
    kind: Literal["reference", "sglang"], url: str, timeout_s: float, key: str | None = None
) -> EngineWeights:
    engine = HttpEngine(url, key=key, control_timeout_s=timeout_s)
    return ReferenceWeights(engine) if kind == "reference" else SglangWeights(engine)


class _HttpWeights:
    """What both engines answer: SGLang's own routes, between ``begin_weight_update`` and ``end_weight_update``.

    A checksum has no field in them; it comes as JSON in the answer's message, from the reference engine and from an
    SGLang that has our plugin (rollout/sglang_plugin.py).
    """

    def __init__(self, engine: HttpEngine) -> None:
        self.engine, self.url = engine, engine.url
        self._ranks = 0

    def pause(self) -> None:
        self.engine.pause()

    def resume(self) -> None:
        self.engine.resume()

    def load_folder(self, folder: Path, version: int) -> Checksums | None:
        body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": True}
        return self._told("/update_weights_from_disk", body).get("checksums")

    def begin_update(self) -> str | None:
        try:
            return self._told("/begin_weight_update", {}).get("kept")
        except EngineError as error:
            if "already open" not in str(error):
                raise
        with contextlib.suppress(EngineError):  # of what a sender that died had left
            self.end_update()
        return self._told("/begin_weight_update", {}).get("kept")

    def end_update(self) -> Checksums | None:
        return self._told("/end_weight_update", {}).get("checksums")

    def set_version(self, version: int) -> None:
        self._post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    def ranks(self) -> int:
        if not self._ranks:
            self._ranks = int(self.engine.control("GET", "/server_info")["tp_size"])
        return self._ranks

    def join_broadcast(self, group: str, address: str, port: int, first_rank: int, size: int, backend: str) -> None:
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": first_rank,
            "world_size": size,
            "group_name": group,
            "backend": backend,
        }
        self._post("/init_weights_update_group", body)

    def leave_broadcast(self, group: str) -> None:
        self._post("/destroy_weights_update_group", {"group_name": group})

    def receive_broadcast(self, group: str, specs: Sequence[TensorSpec]) -> None:
        body = {**_described(specs), "group_name": group, "load_format": FLAT, "flush_cache": True}
        self._post("/update_weights_from_distributed", body, of=specs)

    def _post(self, path: str, body: dict[str, Any], of: Sequence[TensorSpec] = ()) -> Any:
        asked = f"{path} of {len(of)} tensors from {of[0].name}" if of else path
        return self.engine.control("POST", path, body, asked=asked)

    def _told(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What the message of the answer tells as JSON; {} where it is plain text."""
        message = self._post(path, body)["message"]
        # SGLang may add a sentence of its own.
        return json.JSONDecoder().raw_decode(message)[0] if message.startswith("{") else {}


class ReferenceWeights(_HttpWeights):
    def receive_shared(self, place: Callable[[], str], specs: Sequence[TensorSpec]) -> None:
        self._post("/update_weights_from_place", {**_described(specs), "place": place()}, of=specs)


class SglangWeights(_HttpWeights):
    def receive_shared(self, place: Callable[[], str], specs: Sequence[TensorSpec]) -> None:
        """SGLang takes a pickle here, which it restricts to data: still, this must not leave the machine.

        It holds neither weights nor a handle that unpickling would open: our plugin finds the bucket at the place that
        the name of the first entry tells.
        """
        entries = [_entry("", torch.uint8, (0,), 0, 0)]
        for spec in specs:
            start = entries[-1].end_idx
            entries.append(_entry(spec.name, spec.dtype, spec.shape, start, start + spec.nbytes))

        def payload() -> str:
            entries[0].name = place()
            pickled = pickle.dumps({"flattened_tensor": torch.empty(0, dtype=torch.uint8), "metadata": entries})
            return base64.b64encode(pickled).decode()

        payloads = [payload() for _ in range(self.ranks())]
        body = {"serialized_named_tensors": payloads, "load_format": FLAT, "flush_cache": True}
        self._post("/update_weights_from_tensor", body, of=specs)


def _entry(name: str, dtype: torch.dtype, shape: tuple[int, ...], start: int, end: int) -> SimpleNamespace:
    """The fields of SGLang's FlattenedTensorMetadata."""
    size = torch.Size(shape)
    return SimpleNamespace(name=name, shape=size, dtype=dtype, start_idx=start, end_idx=end, numel=end - start)


def _described(specs: Sequence[TensorSpec]) -> dict[str, Any]:
    return {
        "names": [spec.name for spec in specs],
        "dtypes": [spec.dtype_name for spec in specs],
        "shapes": [list(spec.shape) for spec in specs],
    }
