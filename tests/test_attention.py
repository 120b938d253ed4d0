"""Core attention on packed rows against a plain softmax in float64; context-parallel shards without ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_vespo.policy import attention
from megatron_vespo.policy.attention import PackedAttention, packed_seq_params
from megatron_vespo.policy.layout import local_indices

HEADS, KV_HEADS, DIM = 4, 2, 8
LENGTHS = (8, 4, 16, 4)
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0)
CONFIG = dict(num_layers=1, hidden_size=32, num_attention_heads=HEADS, num_query_groups=KV_HEADS, kv_channels=DIM)


def build(cp_size: int = 1, cp_rank: int = 0, **config: Any) -> PackedAttention:
    group = SimpleNamespace(size=lambda: cp_size, rank=lambda: cp_rank)
    settings = TransformerConfig(**{**CONFIG, "attention_dropout": 0.0, **config})
    return PackedAttention(settings, 1, AttnMaskType.causal, "self", pg_collection=SimpleNamespace(cp=group))


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM)]
    return [torch.randn(sum(LENGTHS), *s, generator=generator, dtype=torch.float64) for s in shapes]


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / DIM**0.5
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = (sequence[:, None] == sequence[None]) & torch.ones_like(scores[0], dtype=torch.bool).tril()
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def test_each_packed_sequence_attends_causally_to_itself_alone() -> None:
    output = build()(*inputs(), None, packed_seq_params=packed_seq_params(CU_SEQLENS))
    assert output.shape == (sum(LENGTHS), 1, HEADS * DIM)
    torch.testing.assert_close(output[:, 0], by_hand(*inputs()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_zigzag_shards_see_what_the_whole_row_sees(cp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [local_indices(CU_SEQLENS, cp_size, r) for r in range(cp_size)]
    _, key, value = inputs()
    all_gathered = torch.cat([torch.cat([key, value], -1)[shard] for shard in shards])
    monkeypatch.setattr(attention, "gather_from_sequence_parallel_region", lambda _, group: all_gathered)
    for rank, shard in enumerate(shards):
        q, k, v = (x[shard] for x in inputs())
        output = build(cp_size, rank)(q, k, v, None, packed_seq_params=packed_seq_params(CU_SEQLENS))
        torch.testing.assert_close(output[:, 0], by_hand(*inputs())[shard], rtol=0, atol=1e-12)


def test_a_row_costs_the_sum_of_squared_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = 0
    real = torch.nn.functional.scaled_dot_product_attention

    def counting(query: torch.Tensor, key: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        nonlocal pairs
        pairs += query.shape[-2] * key.shape[-2]
        return real(query, key, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    build()(*inputs(), None, packed_seq_params=packed_seq_params(CU_SEQLENS))
    assert pairs == sum(n * n for n in LENGTHS)


def test_a_batch_that_is_not_packed_is_as_many_sequences() -> None:
    q, k, v = inputs()
    rows = [x.unflatten(0, (2, 16)).transpose(0, 1) for x in (q, k, v)]  # [s, b, heads, d]
    output = build()(*rows, None)
    packed = build()(q, k, v, None, packed_seq_params=packed_seq_params(torch.tensor([0, 16, 32])))
    torch.testing.assert_close(output.transpose(0, 1).flatten(0, 1), packed[:, 0], rtol=0, atol=0)


def test_padding_outside_every_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="cu_seqlens ends at 28, and the row has 32 tokens"):
        build()(*inputs(), None, packed_seq_params=packed_seq_params(CU_SEQLENS[:-1]))


def test_an_attention_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_mask=None"):
        build()(*inputs(), torch.zeros(1), packed_seq_params=packed_seq_params(CU_SEQLENS))


def test_dropout_and_windows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        build(attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"window_size=\(8, 0\)"):
        build(window_size=(8, 0))
