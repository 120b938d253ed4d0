"""What a sequence-level objective costs under context parallelism: sums against the gather of full log-probs.

    python benchmarks/sequence_sums.py [--ranks 2 4] [--responses 16] [--tokens 16384] [--repeats 20]

sums        ours: one all-reduce of [responses, 3] float64 (objectives/sequence.py), no collective in the backward
all-gather  all ranks' packed log-probs, detached, with the own shard put back in, cut into whole sequences and the loss
            taken on them by every rank, which has all old log-probs already (as verl's Megatron engine does)
padded      each response's shard padded with zeros to its whole length and all-reduced with autograd, the current
            log-probs and the old ones (as slime's all_gather_with_cp does)

All three start from zigzag shards and end with the gradient of the VESPO loss on this rank's log-probs; the gradients
are checked to be equal. The two others are written here from their description; no code of theirs runs. Bytes are those
of the tensors handed to collectives on one rank, forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_vespo.objectives.sequence import segment_sums
from megatron_vespo.objectives.vespo import kernel

Path = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(log-probs [t] with grad, old log-probs [t], old log-probs [responses, tokens], advantages [responses]) -> loss."""


def vespo_loss(log_w: torch.Tensor, advantages: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """logprobs: [responses, anything]."""
    phi = torch.where(advantages >= 0, kernel(log_w, 2, 3), kernel(log_w, 3, 2))
    return -((phi * advantages)[:, None] * logprobs).sum()


@cache
def segment_ids(responses: int, local: int) -> torch.Tensor:
    """Comes with a packed micro-batch, and is not part of what is timed."""
    return torch.arange(responses).repeat_interleave(local)


def by_sums(
    logprobs: torch.Tensor, old: torch.Tensor, old_whole: torch.Tensor, advantages: torch.Tensor
) -> torch.Tensor:
    responses = len(advantages)
    local = len(logprobs) // responses
    segments = segment_ids(responses, local)
    log_ratio = logprobs.detach().double() - old
    # Three columns as the objectives take them: count, log W_stale, log W_engine (0 here).
    columns = [torch.ones_like(log_ratio), log_ratio, torch.zeros_like(log_ratio)]
    log_w = segment_sums(columns, segments, responses, dist.group.WORLD)[:, 1]
    return vespo_loss(log_w, advantages, logprobs.view(responses, local))


def by_all_gather(
    logprobs: torch.Tensor, old: torch.Tensor, old_whole: torch.Tensor, advantages: torch.Tensor
) -> torch.Tensor:
    ranks, rank, responses = dist.get_world_size(), dist.get_rank(), len(advantages)

    def whole(shard: torch.Tensor) -> torch.Tensor:
        shards = [torch.empty_like(shard) for _ in range(ranks)]
        dist.all_gather(shards, shard.detach())
        shards[rank] = shard
        rows = []
        for cut in zip(*(each.view(responses, 2, -1) for each in shards), strict=True):
            halves = torch.stack(cut)  # [ranks, 2, chunk]: first halves in order of rank, second halves in reverse
            rows.append(torch.cat([halves[:, 0].flatten(), halves[:, 1].flip(0).flatten()]))
        return torch.stack(rows)

    full = whole(logprobs)
    log_w = (full.detach().double() - old_whole).sum(-1)
    return vespo_loss(log_w, advantages, full)


class AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def by_padded_all_reduce(
    logprobs: torch.Tensor, old: torch.Tensor, old_whole: torch.Tensor, advantages: torch.Tensor
) -> torch.Tensor:
    ranks, rank, responses = dist.get_world_size(), dist.get_rank(), len(advantages)
    chunk = old_whole.shape[1] // (2 * ranks)

    def whole(shard: torch.Tensor) -> torch.Tensor:
        first, second = shard.view(2, chunk)
        before, between = (torch.zeros(chunks * chunk, requires_grad=True) for chunks in (rank, 2 * (ranks - 1 - rank)))
        return AllReduce.apply(torch.cat([before, first, between, second, before]))

    pairs = zip(logprobs.view(responses, -1), old.view(responses, -1), strict=True)
    log_w = torch.stack([(whole(new) - whole(before)).double().sum() for new, before in pairs])
    # W has a gradient on this path; its value 0 keeps the backward of the collectives, as in the original, and adds
    # nothing to the gradient of the loss.
    loss = vespo_loss(log_w.detach(), advantages, logprobs.view(responses, -1))
    return loss + 0.0 * log_w.sum()


PATHS: dict[str, Path] = {"sums": by_sums, "all-gather": by_all_gather, "padded": by_padded_all_reduce}


def count_collectives() -> dict[str, int]:
    """Counts, from now on in this process, of calls and bytes handed to all_reduce and all_gather."""
    tally = {"calls": 0, "bytes": 0}
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def counted_all_reduce(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        tally["calls"] += 1
        tally["bytes"] += tensor.nbytes
        return all_reduce(tensor, *args, **options)

    def counted_all_gather(tensors: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        tally["calls"] += 1
        tally["bytes"] += sum(each.nbytes for each in tensors)
        return all_gather(tensors, tensor, *args, **options)

    dist.all_reduce, dist.all_gather = counted_all_reduce, counted_all_gather
    return tally


def rank_main(rank: int, ranks: int, port: int, responses: int, tokens: int, repeats: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    tally = count_collectives()
    generator = torch.Generator().manual_seed(1)
    logprobs = -torch.rand(responses, tokens, generator=generator)
    old = logprobs + torch.randn(logprobs.shape, generator=generator) / tokens**0.5
    advantages = torch.randn(responses, generator=generator).double()
    chunks = [x.view(responses, 2 * ranks, -1)[:, [rank, 2 * ranks - 1 - rank]].flatten() for x in (logprobs, old)]

    gradients: dict[str, torch.Tensor] = {}
    rows = {}
    for name, path in PATHS.items():
        seconds = []
        for repeat in range(repeats + 3):
            leaf = chunks[0].clone().requires_grad_()
            dist.barrier()
            tally.update(calls=0, bytes=0)
            start = time.perf_counter()
            path(leaf, chunks[1], old, advantages).backward()
            if repeat >= 3:
                seconds.append(time.perf_counter() - start)
        assert leaf.grad is not None
        gradients[name] = leaf.grad
        rows[name] = (tally["calls"], tally["bytes"], statistics.median(seconds))
    error = max(
        float((gradient - gradients["sums"]).abs().max() / gradients["sums"].abs().max())
        for gradient in gradients.values()
    )
    if not error < 1e-5:
        raise SystemExit(f"rank {rank}: the gradients differ by {error:.1e}")
    if rank == 0:
        print(f"CP = {ranks}: {responses} responses of {tokens} tokens; gradients agree to {error:.1e}")
        print(f"{'':12}{'collectives':>12}{'bytes':>12}{'ms':>9}")
        for name, (calls, size, median) in rows.items():
            ratio = (
                ""
                if name == "sums"
                else f"   bytes x{size / rows['sums'][1]:.0f}, time x{median / rows['sums'][2]:.1f}"
            )
            print(f"{name:12}{calls:12}{size:12,}{1000 * median:9.2f}{ratio}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16_384, help="of a response; a multiple of 2 x ranks")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    for ranks in options.ranks:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        arguments = (ranks, store.port, options.responses, options.tokens, options.repeats)
        mp.spawn(rank_main, arguments, nprocs=ranks)


if __name__ == "__main__":
    main()
