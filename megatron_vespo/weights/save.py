"""A Hugging Face folder from a stream of tensors: sharded safetensors, index, tokenizer, config and checksums."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_vespo.weights.checksum import ALGORITHM, checksum
from megatron_vespo.weights.fp8 import BLOCK, SCALE_SUFFIX
from megatron_vespo.weights.hf_folder import INDEX_FILE
from megatron_vespo.weights.mapping import is_multi_token_prediction

CHECKSUM_FILE = "checksums.json"
_CARRIED_OVER = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*")
"""Config, generation config, tokenizer and chat template, code of custom models."""


def is_writer() -> bool:
    """Whether this process writes: rank 0 of torch.distributed, or any process without it."""
    return not dist.is_initialized() or dist.get_rank() == 0


def save_hf_folder(
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    source_folder: Path,
    max_shard_bytes: int = 1 << 30,
) -> None:
    """Writes ``tensors`` as an HF folder, beside the tokenizer and configs of ``source_folder``.

    Works on ``<folder>.partial`` and renames it once it is whole; a folder of the same name is replaced if this
    function wrote it. ``checksums.json`` holds each tensor's file, dtype, shape and digest. At most one shard
    (``max_shard_bytes``, or one tensor if that is larger) is held in memory, uncopied where a tensor is on the CPU and
    contiguous: what it shares memory with must not change before this returns. Under torch.distributed every rank
    calls it with its stream, and rank 0 writes; the others return when their stream ends, which may be earlier.
    Raises FileExistsError for a folder that is not ours, OSError when the disk is full.
    """
    if not is_writer():
        for _ in tensors:
            pass
        return
    if folder.exists() and not (folder / CHECKSUM_FILE).exists():
        raise FileExistsError(f"{folder}: is there already and has no {CHECKSUM_FILE}, so it is not replaced")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        carry_over(source_folder, partial)
        manifest = _write_shards(tensors, partial, max_shard_bytes)
        fit_config(partial / "config.json", manifest)
        write_json(partial / CHECKSUM_FILE, {"algorithm": ALGORITHM, "tensors": manifest})
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, max_shard_bytes: int
) -> dict[str, dict[str, Any]]:
    """The shards and their index; returns the manifest: tensor name -> file, dtype, shape, checksum."""
    manifest: dict[str, dict[str, Any]] = {}
    shards: list[Path] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        file = folder / f"shard-{len(shards)}"  # its name says how many there are, which is not known yet
        save_file(shard, file, metadata={"format": "pt"})
        shards.append(file)
        shard.clear()

    for name, tensor in tensors:
        if name in manifest:
            raise ValueError(f"{name}: came twice")
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        manifest[name] = {
            "file": len(shards),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "checksum": checksum(shard[name]),
        }
    if not manifest:
        raise ValueError(f"{folder}: no tensors came to be saved")
    flush()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for file, name in zip(shards, names, strict=True):
        file.rename(folder / name)
    for entry in manifest.values():
        entry["file"] = names[entry["file"]]
    if len(shards) > 1:
        weight_map = {name: entry["file"] for name, entry in manifest.items()}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return manifest


def carry_over(source: Path, folder: Path) -> None:
    """Copy everything of an HF folder but its weights."""
    for pattern in _CARRIED_OVER:
        for file in source.glob(pattern):
            if file.name not in (CHECKSUM_FILE, INDEX_FILE):
                shutil.copyfile(file, folder / file.name)


def fit_config(config_file: Path, manifest: dict[str, dict[str, Any]]) -> None:
    """config.json must name the dtype of the weights: transformers and the engines load in the dtype it names; and say
    which are fp8 blocks, if any are. Nor may it promise layers for multi-token prediction where there are none: an
    engine may look for them."""
    config = json.loads(config_file.read_text())
    rounded = {name for name in manifest if name + SCALE_SUFFIX in manifest}
    plain = {
        name: entry
        for name, entry in manifest.items()
        if name not in rounded and name.removesuffix(SCALE_SUFFIX) not in rounded
    }
    dtype = Counter(entry["dtype"] for entry in plain.values()).most_common(1)[0][0]
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    config.pop("quantization_config", None)
    if rounded:
        whole = [name for name, entry in plain.items() if name.endswith(".weight") and len(entry["shape"]) == 2]
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": [name.removesuffix(".weight") for name in whole],
        }
    if predicting := config.get("num_nextn_predict_layers"):
        layers = config["num_hidden_layers"]
        if not any(is_multi_token_prediction(name, layers, predicting) for name in manifest):
            config["num_nextn_predict_layers"] = 0
    write_json(config_file, config)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
