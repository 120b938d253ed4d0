"""Core attention of the local layer spec: packed rows and context parallelism, which megatron-core's own lacks.

Each sequence of a packed row attends to itself alone, causally, at a cost of the sum of squared lengths. Under context
parallelism the ranks hold zigzag shards of every sequence (layout.local_indices); keys and values are all-gathered over
the context-parallel group (their gradients come back by a reduce-scatter), and each of a sequence's two local chunks
attends to the keys up to its own end.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from megatron_vespo.policy.layout import local_indices


def packed_seq_params(cu_seqlens: torch.Tensor) -> PackedSeqParams:
    """What a megatron-core model takes beside a packed row.

    ``cu_seqlens``: [sequences + 1] int, of the whole row before context parallelism cuts it, starting at 0 and ending
    at the row's length. Padding counts as part of the sequence before it: causal, no real token sees it.
    """
    cu_seqlens = cu_seqlens.to(torch.int32)
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


class PackedAttention(MegatronModule):
    """Takes the place of DotProductAttention in a layer spec; causal self-attention without dropout.

    ``k_channels`` and ``v_channels`` are what multi-latent attention tells Transformer Engine's in advance; here they
    are seen at the tensors.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout or config.window_size is not None or attn_mask_type != AttnMaskType.causal:
            raise ValueError(
                "PackedAttention is causal, without dropout and without a sliding window; got "
                f"attention_dropout={dropout}, window_size={config.window_size}, attn_mask_type={attn_mask_type}"
            )
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.cp_group = groups.cp
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """``query`` [t, heads, d], ``key`` [t, kv_heads, d] and ``value`` [t, kv_heads, v] of a packed row (this rank's
        t tokens of it), or [s, b, heads, d] without ``packed_seq_params``: b sequences of s (local) tokens. Returns
        [t, 1, heads * v], or [s, b, heads * v]. Raises ValueError for an attention mask (it is causal by itself) and
        for a row that does not end where its last sequence does."""
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("this attention is causal by itself: pass attention_mask=None, and no attention_bias")
        cp_size = self.cp_group.size()
        if packed_seq_params is not None:
            lengths = _sequence_lengths(packed_seq_params)
            if sum(lengths) != query.shape[0] * cp_size:
                raise ValueError(
                    f"cu_seqlens ends at {sum(lengths)}, and the row has {query.shape[0]} tokens on each of {cp_size} "
                    "context-parallel ranks; padding must belong to a sequence"
                )
            return self._attend(query, key, value, lengths).flatten(1).unsqueeze(1)
        rows, batch = query.shape[:2]
        query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        attended = self._attend(query, key, value, (rows * cp_size,) * batch)
        return attended.flatten(1).unflatten(0, (batch, rows)).transpose(0, 1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...]
    ) -> torch.Tensor:
        """[t, heads, d], ``lengths`` being those of the whole sequences."""
        cp_size, cp_rank = self.cp_group.size(), self.cp_group.rank()
        if cp_size == 1:
            sequences = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
            return torch.cat([self._causal(q, k, v) for q, k, v in sequences])
        gathered = gather_from_sequence_parallel_region(torch.cat([key, value], -1).contiguous(), group=self.cp_group)
        whole = gathered.index_select(0, _order_of_gathered(lengths, cp_size).to(query.device))
        chunks = [n // (2 * cp_size) for n in lengths]
        attended = []
        queries = query.split([c for chunk in chunks for c in (chunk, chunk)])
        for i, (chunk, kv) in enumerate(zip(chunks, whole.split(lengths), strict=True)):
            k, v = kv.split([key.shape[-1], value.shape[-1]], -1)
            for part, end in ((0, chunk * (cp_rank + 1)), (1, chunk * (2 * cp_size - cp_rank))):
                attended.append(self._causal(queries[2 * i + part], k[:end], v[:end]))
        return torch.cat(attended)

    def _causal(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One sequence; the queries [n, heads, d] are the last n positions of the keys [m, kv_heads, d]."""
        n, m = len(query), len(key)
        mask: dict[str, Any] = {"is_causal": True}
        if n != m:
            mask = {"attn_mask": torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)}
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=True, **mask)
        return attended.squeeze(0).transpose(0, 1)


def _sequence_lengths(params: PackedSeqParams) -> tuple[int, ...]:
    padded = params.cu_seqlens_q_padded
    cu_seqlens = params.cu_seqlens_q if padded is None else padded
    return tuple((cu_seqlens[1:] - cu_seqlens[:-1]).tolist())


@lru_cache(maxsize=16)  # every layer of a micro-batch asks for the same
def _order_of_gathered(lengths: tuple[int, ...], cp_size: int) -> torch.Tensor:
    """[T] int64: where each token of the whole row lies when the ranks' shards are laid end to end."""
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0)
    gathered = torch.cat([local_indices(cu_seqlens, cp_size, rank) for rank in range(cp_size)])
    return torch.argsort(gathered)
