"""Where device memory lies that another process of this machine may open, as plain fields: no pickle is needed."""

from __future__ import annotations

import base64
import dataclasses
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class IpcHandle:
    """What torch tells of a CUDA storage that is shared (``UntypedStorage._share_cuda_``), in its order, the device by
    its UUID: its index differs between processes that see other devices. Good for one opening."""

    device: str
    allocation: bytes
    """CUDA's handle of the allocation that the storage lies in."""
    storage_bytes: int
    storage_offset: int
    """Bytes of the allocation before the storage."""
    ref_counter: bytes
    """Name of the sender's counter by which it learns that the memory was closed."""
    ref_counter_offset: int
    event: bytes
    """CUDA's handle of the event after which the sender's writes are done."""
    event_sync_required: bool
    start: int
    """Bytes of the storage before the memory that is shared."""
    length: int
    """Of that memory, bytes."""

    def storage_fields(self) -> tuple[Any, ...]:
        """What ``UntypedStorage._new_shared_cuda`` wants after the device's index."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self)[1:8])

    def to_json(self) -> str:
        values = dataclasses.asdict(self).items()
        return json.dumps({name: _text(value) if isinstance(value, bytes) else value for name, value in values})

    @classmethod
    def from_json(cls, text: str) -> IpcHandle:
        """Raises ValueError where ``text`` is not what :meth:`to_json` gives."""
        try:
            values = json.loads(text)
            for name in _BYTES:
                values[name] = base64.b64decode(values[name], validate=True)
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"not a handle of device memory: {error!r}") from None


_BYTES = ("allocation", "ref_counter", "event")


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()
