"""What transformers computes from one folder against what megatron-core, or transformers, computes from another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from megatron_vespo import platform
from megatron_vespo.config.load import ConfigError
from megatron_vespo.config.schema import ModelConfig
from megatron_vespo.convert.megatron_folder import is_megatron_folder
from megatron_vespo.convert.placement import one_rank
from megatron_vespo.convert.safetensors_folder import HfReader
from megatron_vespo.policy.attention import packed_seq_params
from megatron_vespo.policy.checkpoint import load_weights
from megatron_vespo.policy.layout import ParallelLayout
from megatron_vespo.policy.model import build_model

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    return n if n < 2 else",
    "Let $f(x) = x^3 - 3x + 1$. The sum of the squares of its roots is",
    "Ein Satz auf Deutsch, y uno en español, 中文也有。",
    "1 2 4 8 16 32 64",
)


@dataclass(frozen=True, slots=True)
class Parity:
    """Logits of both over all tokens of the prompts, computed in float32."""

    prompts: int
    tokens: int
    largest: float
    """Difference of two logits."""
    scale: float
    """Largest magnitude of a logit."""
    same_choice: float
    """Share of tokens after which both prefer the same next one."""
    tolerance: float | None
    """Of ``largest / scale``; None: not judged."""

    @property
    def equal(self) -> bool:
        return self.tolerance is None or self.largest <= self.tolerance * self.scale


def read_prompts(file: Path) -> list[str]:
    """One prompt a line: a JSON string, or text as it is. Raises ConfigError where there is none."""
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"--prompts {file}: {error.strerror}") from None
    if not lines:
        raise ConfigError(f"--prompts {file}: holds no prompts; give one a line")
    return [json.loads(line) if line.startswith('"') else line for line in lines]


def compare_logits(hf: Path, other: Path, prompts: Sequence[str] | None, tolerance: float | None) -> Parity:
    """Both models in float32, one after the other in memory."""
    transformers.utils.logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(hf)
    rows = _tokens(hf, config, prompts)
    theirs = _of_megatron(hf, config, other, rows) if is_megatron_folder(other) else _of_transformers(other, rows)
    largest = scale = 0.0
    same = 0
    for a, b in zip(_of_transformers(hf, rows), theirs, strict=True):
        # A NaN in either must not pass for equality.
        largest = max(largest, float((a - b).abs().nan_to_num(float("inf"), float("inf")).max()))
        scale = max(scale, float(a.abs().max()))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    tokens = sum(map(len, rows))
    return Parity(len(rows), tokens, largest, scale, same / tokens, tolerance)


def _tokens(hf: Path, config: PreTrainedConfig, prompts: Sequence[str] | None) -> list[torch.Tensor]:
    """[tokens] int64 of each prompt. A folder without a tokenizer gets random tokens for our own prompts."""
    if not any((hf / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        if prompts is not None:
            raise ConfigError(f"--prompts: {hf} has no tokenizer; leave it out to compare on random tokens")
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(config.vocab_size, (24,), generator=generator) for _ in PROMPTS]
    tokenizer = AutoTokenizer.from_pretrained(hf)
    rows = [tokenizer(prompt, return_tensors="pt").input_ids[0].long() for prompt in prompts or PROMPTS]
    return [row for row in rows if len(row)]


@torch.no_grad()
def _of_transformers(folder: Path, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[tokens, vocabulary] float32 each."""
    config = AutoConfig.from_pretrained(folder)
    config.dtype = torch.float32
    if getattr(config, "quantization_config", None) is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    else:  # transformers computes with fp8 on a GPU alone; what the blocks stand for it computes anywhere
        del config.quantization_config
        reader = HfReader(folder)
        state = {
            name: reader.read(name, 0, torch.empty(info.shape, dtype=reader.stored_dtype(name)))
            for name, info in reader.tensors.items()
        }
        reader.close()
        with torch.device("meta"):
            kind: Any = type(AutoModelForCausalLM.from_config(config))
        model = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, attn_implementation="eager"
        )
    return [model.eval()(row[None]).logits[0].float() for row in rows]


@torch.no_grad()
def _of_megatron(hf: Path, config: PreTrainedConfig, folder: Path, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with one_rank():
        settings = ModelConfig(path=hf, dtype="float32", layer_spec="local", router_dtype="fp32")
        [model] = build_model(config, settings, ParallelLayout())
        load_weights(folder, [model])
        device = platform.current().device
        found = []
        for row in rows:
            lengths = torch.tensor([0, len(row)], dtype=torch.int32, device=device)
            logits = model.eval()(
                input_ids=row[None].to(device),
                position_ids=torch.arange(len(row), device=device)[None],
                attention_mask=None,
                packed_seq_params=packed_seq_params(lengths),
            )
            found.append(logits[0][:, : config.vocab_size].float().cpu())
        return found
