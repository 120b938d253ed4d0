"""Routing replay: the routers send tokens where an earlier pass sent them (docs/routing_replay.md).

R2 replays the routing of the trainer's own old-log-prob pass in the update, R3 the engine's in both passes (arXiv
2510.11370). Only *which* experts, and in which slot, is replayed: how much each counts follows from the router's live
logits, so that the router still has a gradient.

A routing belongs to a micro-batch and travels with it, on the packed-sequence parameters that every layer is called
with, in every schedule and when a layer is recomputed. megatron-core's own RouterReplay keeps lists that all models of
a process share, and relies on backward passes coming in the order of the forward ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from megatron_vespo import platform
from megatron_vespo.policy import ranks
from megatron_vespo.policy.architecture import routing_shape
from megatron_vespo.policy.model import PolicyModel
from megatron_vespo.samples.records import Sample

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""megatron-core's: (scores [t, E], topk, num_groups=, group_topk=) -> values and expert numbers [t, topk]."""


@dataclass(slots=True)
class MicroBatchRouting:
    """Where one micro-batch's t tokens of this rank go in its L MoE layers."""

    given: torch.Tensor
    """[t] bool: tokens that go where ``replayed`` says; the others (padding, for one) go where the router says."""
    replayed: torch.Tensor | None = None
    """[t, L, topk] of RoutingShape.dtype."""
    recorded: torch.Tensor | None = None
    """Likewise: filled with where all tokens went."""
    counts: torch.Tensor = field(init=False)
    """[2, L] int64: given tokens that the router would have sent elsewhere; those sent to one expert twice."""

    def __post_init__(self) -> None:
        layers = next((x.shape[1] for x in (self.replayed, self.recorded) if x is not None), 0)
        self.counts = torch.zeros(2, layers, dtype=torch.int64, device=self.given.device)

    def choose(self, column: int, live: torch.Tensor) -> torch.Tensor:
        """[t, topk] int64: the experts of this rank's MoE layer number ``column``, for which the router itself chose
        ``live``. A recomputation finds the same, and counts it once."""
        chosen = live
        if self.replayed is not None:
            chosen = torch.where(self.given[:, None], self.replayed[:, column].to(live.dtype), live)
            ordered = chosen.sort(-1).values
            elsewhere = (ordered != live.sort(-1).values).any(-1) & self.given
            twice = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
            self.counts[:, column] = torch.stack([elsewhere.sum(), twice.sum()])
        if self.recorded is not None:
            self.recorded[:, column] = chosen.to(self.recorded.dtype)
        return chosen


class LayerReplay:
    """What a TopKRouter has as its ``router_replay``, in the place of megatron-core's."""

    def __init__(self, column: int) -> None:
        self.column = column
        self.routing: MicroBatchRouting | None = None
        """Of the micro-batch that the layer is computing."""

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Asked by megatron-core instead of ``default_compute_topk``, with whose result it goes on."""
        assert default_compute_topk is not None
        if self.routing is None:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        with torch.no_grad():
            _, live = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
            chosen = self.routing.choose(self.column, live)
        return scores.gather(1, chosen), chosen

    def before_layer(self, layer: torch.nn.Module, inputs: Any, options: dict[str, Any]) -> None:
        """Forward pre-hook of the router's transformer layer."""
        self.routing = getattr(options.get("packed_seq_params"), "routing", None)


class RoutingReplay:
    """One rank's part of ``model.routing_replay``: gives the routers of its chunks what they replay in each pass."""

    def __init__(
        self, mode: Literal["r2", "r3", "both"], chunks: Sequence[PolicyModel], hf_config: PreTrainedConfig
    ) -> None:
        """Raises ValueError for a dense model."""
        shape = routing_shape(hf_config)
        if shape is None:
            raise ValueError(f"model.routing_replay = {mode}, but the model ({hf_config.model_type}) has no experts")
        self.mode = mode
        self.shape = shape
        self.columns: list[int] = []
        """Which of the model's MoE layers are this rank's, counted from 0, in the order of its chunks."""
        self._recorded: dict[tuple[str, ...], torch.Tensor] = {}
        self._sequence_parallel = chunks[0].config.sequence_parallel
        for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
            if layer.layer_number - 1 in shape.moe_layers:
                replay = LayerReplay(len(self.columns))
                self.columns.append(shape.moe_layers.index(layer.layer_number - 1))
                layer.mlp.router.router_replay = replay
                layer.register_forward_pre_hook(replay.before_layer, with_kwargs=True)

    def of_old_pass(
        self, samples: Sequence[Sample], cu_seqlens: torch.Tensor, local: torch.Tensor
    ) -> MicroBatchRouting:
        """For the old-log-prob pass of a micro-batch: R3's is the engine's; what R2 will replay is recorded.

        samples: the micro-batch's, in the order in which ``cu_seqlens`` [sequences + 1] has them. local: [T / context]
        int64, this context-parallel rank's tokens of the row. Raises ValueError for a sample whose ``routed_experts``
        are missing (but not in mode both) or misshapen.
        """
        mine = self._own(local)
        replayed, recorded = None, None
        given = torch.zeros(len(mine), dtype=torch.bool)
        if samples and self.mode != "r2":
            replayed, given = self._of_engine(samples, cu_seqlens, mine)
        if samples and self.mode != "r3":
            recorded = self._empty(len(mine))
            self._recorded[_names(samples)] = recorded
        return self._routing(given, replayed, recorded)

    def of_update(self, samples: Sequence[Sample], cu_seqlens: torch.Tensor, local: torch.Tensor) -> MicroBatchRouting:
        """For the training pass of a micro-batch. Raises ValueError where R2 has recorded no such micro-batch: the
        old-log-prob pass must have seen the same mini-batch, and a recording is replayed in one update only."""
        mine = self._own(local)
        if not samples:
            return self._routing(torch.zeros(len(mine), dtype=torch.bool), None, None)
        if self.mode == "r3":
            replayed, given = self._of_engine(samples, cu_seqlens, mine)
            return self._routing(given, replayed, None)
        recorded = self._recorded.pop(_names(samples), None)
        if recorded is None:
            raise ValueError(
                f"model.routing_replay = {self.mode}: no routing was recorded for the micro-batch of sample "
                f"{samples[0].id}; call compute_old_logprobs with the same mini-batch before each update"
            )
        real = torch.zeros(int(cu_seqlens[-1]), dtype=torch.bool)
        for sample, start in zip(samples, cu_seqlens.tolist(), strict=False):
            real[start : start + sample.length] = True
        return self._routing(real[mine], recorded, None)

    # ------------------------------------------------------------------------------------------ parts

    def _own(self, local: torch.Tensor) -> torch.Tensor:
        """Sequence parallelism cuts a context-parallel rank's tokens evenly over its tensor-parallel ranks."""
        return local.chunk(ranks.tp_group().size())[ranks.tp_rank()] if self._sequence_parallel else local

    def _of_engine(
        self, samples: Sequence[Sample], cu_seqlens: torch.Tensor, mine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """([t, L, topk], [t] bool: the tokens that have one) of the tokens ``mine`` of the whole row."""
        total = int(cu_seqlens[-1])
        row, given = self._empty(total, "cpu"), torch.zeros(total, dtype=torch.bool)
        for sample, start in zip(samples, cu_seqlens.tolist(), strict=False):
            experts, needed = sample.routed_experts, _last_policy_token(sample)
            if experts is None:
                if self.mode == "r3" and needed:
                    raise ValueError(
                        f"model.routing_replay = r3, and sample {sample.id} has no routed_experts; 'both' takes such "
                        "samples, and gives them the trainer's own routing"
                    )
                continue
            of_a_token = (len(self.shape.moe_layers), self.shape.topk)
            if not needed <= len(experts) < sample.length or experts.shape[1:] != of_a_token:
                raise ValueError(
                    f"routed_experts of sample {sample.id}, of {sample.length} tokens, are {experts.shape}; expected "
                    f"({sample.length - 1}, {', '.join(map(str, of_a_token))})"
                )
            end = start + len(experts)
            row[start:end] = torch.from_numpy(experts[:, self.columns].astype(self.shape.dtype))
            given[start:end] = True
        return row[mine], given[mine]

    def _empty(self, tokens: int, device: str | torch.device | None = None) -> torch.Tensor:
        dtype = torch.uint8 if self.shape.dtype.itemsize == 1 else torch.int16
        size = (tokens, len(self.columns), self.shape.topk)
        return torch.zeros(size, dtype=dtype, device=device or platform.current().device)

    def _routing(
        self, given: torch.Tensor, replayed: torch.Tensor | None, recorded: torch.Tensor | None
    ) -> MicroBatchRouting:
        device = platform.current().device
        return MicroBatchRouting(given.to(device), None if replayed is None else replayed.to(device), recorded)


def mismatch_metric(name: str, routings: Sequence[MicroBatchRouting] | None) -> dict[str, tuple[float, float]]:
    """``name`` -> (replayed (token, layer) pairs that the live router would have sent elsewhere, replayed pairs), of
    all ranks and micro-batches of a pass; {} where nothing was replayed. One all-reduce: each pair is on one rank.

    Raises ValueError where a token was sent to one expert twice, which no router does.
    """
    if routings is None:
        return {}
    total = torch.zeros(3, dtype=torch.float64, device=platform.current().device)
    for routing in routings:
        if routing.replayed is not None:
            pairs = routing.given.sum() * routing.counts.shape[1]
            total += torch.cat([routing.counts.sum(1), pairs[None]])
    dist.all_reduce(total)
    elsewhere, twice, of = total.tolist()
    if twice:
        raise ValueError(
            f"routing replay sent {twice:.0f} of {of:.0f} (token, layer) pairs to one expert twice: the routed "
            "experts that the engine returned have holes"
        )
    return {name: (elsewhere, of)} if of else {}


def _names(samples: Sequence[Sample]) -> tuple[str, ...]:
    return tuple(sample.id for sample in samples)


def _last_policy_token(sample: Sample) -> int:
    """Its place in the sequence: its log-prob depends on where the tokens before it go. 0 where there is none."""
    places = sample.loss_mask.nonzero()[0]
    return len(sample.prompt.tokens) + int(places[-1]) if len(places) else 0
