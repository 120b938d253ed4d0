"""The tensors of a Hugging Face folder by name, wherever its shards put them; no model, no megatron-core."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_vespo.weights.mapping import Shape, WeightsError

INDEX_FILE = "model.safetensors.index.json"


class HfFolder:
    """The tensors of an HF folder by name: their files and, from the files' headers, their shapes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = tensor_files(folder)
        self._headers: dict[Path, dict[str, tuple[Shape, str]]] = {}

    def header(self, name: str) -> tuple[Shape, str]:
        """(shape, safetensors dtype). Raises WeightsError when the file is missing, broken or without the tensor."""
        file = self.files[name]
        if file not in self._headers:
            with open_tensors(file) as handle:
                slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
                self._headers[file] = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
        if name not in self._headers[file]:
            raise WeightsError(f"{name}: {self.folder / INDEX_FILE} says it is in {file}, and it is not")
        return self._headers[file][name]


def stream_hf(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of an HF folder, file by file. Raises WeightsError."""
    files = tensor_files(folder)
    for file in sorted(set(files.values())):
        with open_tensors(file) as handle:
            for name in sorted(name for name, place in files.items() if place == file):
                yield name, handle.get_tensor(name)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file. Raises WeightsError where there are no safetensors."""
    index = folder / INDEX_FILE
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.exists():
        raise WeightsError(f"{folder}: neither {INDEX_FILE} nor {single.name} is there")
    with open_tensors(single) as handle:
        return dict.fromkeys(handle.keys(), single)


def open_tensors(file: Path) -> Any:
    """safe_open. Raises WeightsError naming the file where it is missing or broken."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file}: {error}") from error
