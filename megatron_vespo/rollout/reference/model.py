"""Any causal language model of ``transformers`` with a KV cache whose rows come and go."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from megatron_vespo.rollout.reference.precision import Fp8, round_inputs, round_key_values, round_weights
from megatron_vespo.rollout.reference.routing import Routers

LOADING = threading.Lock()
"""transformers patches torch's and its own functions while it loads: two threads at once could leave them so."""
PREFILL_TOKENS = 8192
"""Padded tokens in one prefill or scoring forward; bounds its memory."""


def grouped_query_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over [rows, heads, tokens, dim]; returns [rows, tokens, heads, dim].

    When decoding, the query heads that share a key head are laid along the token axis, so that keys and values are
    read where they are. ``transformers``' own SDPA repeats them first, which costs more than the attention.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("the reference engine has no attention soft-capping and no attention sinks")
    rows, heads, tokens, dim = query.shape
    if tokens == 1:
        grouped = query.view(rows, key.shape[1], heads // key.shape[1], dim)
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return out.reshape(rows, 1, heads, -1), None
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=heads != key.shape[1]
    )
    return out.transpose(1, 2), None


AttentionInterface.register("vespo_reference", grouped_query_attention)


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, heads, capacity, dim]; what the next forward writes is set by RowCache."""

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache.fp8:
            key_states, value_states = round_key_values(key_states), round_key_values(value_states)
        rows, sources, positions = self.cache.rows, self.cache.sources, self.cache.positions
        if not len(rows):  # scoring: nothing is kept
            return key_states, value_states
        self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if positions is None:
            length = key_states.shape[2]
            self.keys[rows, :, :length] = key_states[sources]
            self.values[rows, :, :length] = value_states[sources]
            return key_states, value_states
        self.keys[rows, :, positions] = key_states[:, :, 0]
        self.values[rows, :, positions] = value_states[:, :, 0]
        window = (slice(len(rows)), slice(None), slice(self.cache.length))
        return self.keys[window], self.values[window]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        capacity = (self.cache.row_capacity, self.cache.token_capacity)
        if self.keys is None or self.values is None:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys = _resized(key_states[:0, :, :0], capacity)
            self.values = _resized(value_states[:0, :, :0], capacity)
        elif (self.keys.shape[0], self.keys.shape[2]) != capacity:
            self.keys, self.values = _resized(self.keys, capacity), _resized(self.values, capacity)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys[targets] = self.keys[sources]
            self.values[targets] = self.values[sources]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length, 0

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_cache_shape(self) -> int:
        return -1


def _resized(old: Tensor, capacity: tuple[int, int]) -> Tensor:
    new = old.new_zeros(capacity[0], old.shape[1], capacity[1], old.shape[3])
    new[: old.shape[0], :, : old.shape[2]] = old
    return new


class RowCache(Cache):
    """Where the next forward writes its keys and values. Rows 0..n-1 are in use; capacities only grow, by doubling."""

    def __init__(self, layers: int, *, fp8: bool = False) -> None:
        self.fp8 = fp8
        self.row_layers = [RowLayer(self) for _ in range(layers)]
        super().__init__(layers=[*self.row_layers])
        self.row_capacity, self.token_capacity, self.length = 16, 64, 0
        self.rows = self.sources = torch.empty(0, dtype=torch.long)
        self.positions: Tensor | None = None

    def reserve(self, rows: int, tokens: int) -> None:
        while self.row_capacity < rows:
            self.row_capacity *= 2
        while self.token_capacity < tokens:
            self.token_capacity *= 2

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def move(self, sources: Tensor, targets: Tensor) -> None:
        for layer in self.row_layers:
            layer.move(sources, targets)

    def empty(self) -> None:
        """Give up the memory of all keys and values."""
        for layer in self.row_layers:
            layer.keys = layer.values = None

    @property
    def nbytes(self) -> int:
        tensors = [tensor for layer in self.row_layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class ReferenceModel:
    """One set of weights. The forward passes return float32 and touch no weights."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, context_length: int | None = None, fp8: Fp8 | None = None
    ) -> None:
        """Raises ValueError naming the folder where it holds no complete model that this engine can run."""
        self.fp8 = fp8 or Fp8()
        if not (folder / "config.json").is_file():
            raise ValueError(f"model folder {folder} holds no config.json; give an HF-format checkpoint folder")
        config = AutoConfig.from_pretrained(folder)
        self.config = config.get_text_config(decoder=True)
        self.context_length = _context_length(self.config, context_length)
        if self.fp8.key_values and getattr(self.config, "kv_lora_rank", None):
            raise ValueError(f"{folder}: this model caches a latent, which the reference engine cannot keep in fp8")
        with LOADING:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="vespo_reference", output_loading_info=True
            )
        model, info = loaded
        # transformers fills what the files lack with random numbers and only warns.
        if info["missing_keys"] or info["mismatched_keys"]:
            wrong = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
            raise ValueError(
                f"checkpoint {folder} lacks or mis-shapes {len(wrong)} tensors, the first: {wrong[0]}; export it again"
            )
        self.module = model.eval().requires_grad_(False)
        self.routers = Routers(model)
        if self.fp8.weights:
            round_weights(self.module)
        if self.fp8.activations:
            round_inputs(self.module)
        self._given_up: tuple[BinaryIO, list[torch.Size]] | None = None
        """Bytes of the weights, while they are given up, and the shapes of the parameters."""
        self.vocab_size: int = self.config.vocab_size
        self.eos_token_ids = _eos_token_ids(folder, self.config)

    def give_up_weights(self) -> None:
        """Their memory goes back to the machine; their bytes wait in a file without a name in the temporary folder."""
        file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - it lives until take_back_weights
        shapes = []
        for parameter in self.module.parameters():
            shapes.append(parameter.shape)
            file.write(_bytes(parameter.data.contiguous()))
            parameter.data = parameter.data.new_empty(0)
        file.seek(0)
        self._given_up = file, shapes

    def take_back_weights(self) -> None:
        assert self._given_up is not None, "give_up_weights comes first"
        (file, shapes), self._given_up = self._given_up, None
        # The decoding thread is in inference mode, and a tensor made in it takes no new weights elsewhere.
        with file, torch.inference_mode(False):
            for parameter, shape in zip(self.module.parameters(), shapes, strict=True):
                parameter.data = parameter.data.new_empty(shape)
                file.readinto(_bytes(parameter.data))  # type: ignore[attr-defined]

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters())

    def new_cache(self) -> RowCache:
        return RowCache(self.config.num_hidden_layers, fp8=self.fp8.key_values)

    def prefill(self, cache: RowCache, tokens: Tensor, rows: Tensor, sources: Tensor) -> None:
        """Write the keys and values of ``tokens`` [prompts, length] (padded on the right) into the cache.

        Row ``rows[i]`` of the cache becomes that of prompt ``sources[i]``: a prompt group is computed once.
        """
        cache.rows, cache.sources, cache.positions, cache.length = rows, sources, None, 0
        self._forward(tokens, _causal(tokens), torch.arange(tokens.shape[1])[None], cache, logits_to_keep=1)

    def decode(self, cache: RowCache, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [rows, vocab] after feeding tokens [rows] at positions [rows] to the rows 0..n-1 of the cache."""
        cache.rows, cache.positions, cache.length = torch.arange(len(tokens)), positions, int(positions.max()) + 1
        # A bias, made once: a boolean mask would be turned into one by every layer.
        hidden = torch.arange(cache.length)[None] > positions[:, None]
        bias = torch.zeros(hidden.shape, dtype=self.module.dtype).masked_fill(hidden, -torch.inf)
        return self._forward(tokens[:, None], bias[:, None, None], positions[:, None], cache)[:, 0]

    def score(self, tokens: Tensor) -> Tensor:
        """Log-probs [sequences, length - 1] of tokens [sequences, length] given their prefix, at temperature 1."""
        logits = self._forward(tokens, _causal(tokens), torch.arange(tokens.shape[1])[None], self.new_cache())
        return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)

    def _forward(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: RowCache, logits_to_keep: int = 0
    ) -> Tensor:
        output = self.module(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        return output.logits.float()


def _bytes(tensor: Tensor) -> memoryview:
    """Of a contiguous tensor, to read or write."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _causal(tokens: Tensor) -> Tensor:
    length = tokens.shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


def _context_length(config: Any, asked: int | None) -> int:
    longest = config.max_position_embeddings
    length = asked or longest
    if length > longest:
        raise ValueError(f"--context-length {length} is above the model's max_position_embeddings {longest}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"the reference engine runs full attention only, the model has {sorted(kinds)}; use sglang")
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        # Up to the window's length sliding attention is full attention.
        raise ValueError(f"the model attends to {window} tokens; give --context-length {window} or less, or use sglang")
    return length


def _eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    eos = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(folder).eos_token_id or eos
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (eos,)
