"""Runs a function on n gloo ranks of this machine, and brings back what each returned or raised.

``from ranks import run_ranks``; the function must be importable (top level of the test module).
"""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rank_slots import rank_slots

IMPORTED_ONCE = ["megatron_vespo.policy.trainer", "megatron_vespo.weights.export"]
"""By the process that ranks are forked from, which starts no thread: a rank that imports megatron-core itself takes
seconds of a core for it, and the suite has hundreds of ranks. They see the environment of its start."""


class RankError(AssertionError):
    """A rank raised, died or ran out of time; the message holds each rank's own traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """``[function(*args) on rank r for r in range(world_size)]``, each in a process with gloo initialised.

    ``function`` finds its rank in torch.distributed. Arguments and results are pickled. The first failure ends the
    other ranks (they would wait for it for ever), and RankError shows the tracebacks.
    """
    with rank_slots(world_size):
        return _run_ranks(function, world_size, args, timeout_s)


def _run_ranks(function: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # port 0: the system finds a free one
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    pipes, processes = [], []
    call = pickle.dumps(
        (function, args)
    )  # multiprocessing would send a descriptor for each tensor, and no more than 250
    for rank in range(world_size):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(call, rank, world_size, store.port, sending), daemon=True)
        process.start()
        sending.close()
        pipes.append(receiving)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout_s, timeout_s)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    while len(results) + len(errors) < len(pipes):
        waiting = {pipe: r for r, pipe in enumerate(pipes) if r not in results and r not in errors}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            if not errors:
                raise RankError(f"ranks {sorted(waiting.values())} gave no answer within {timeout_s} s")
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                kind, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                kind, value = "error", "the process died without a Python exception"
            if kind == "result":
                results[rank] = value
            else:
                errors[rank] = value
                deadline = min(deadline, time.monotonic() + 2)  # time for a peer to report an error of its own
    if errors:
        raise RankError("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(errors.items())))
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(call: bytes, rank: int, world_size: int, port: int, pipe: Connection) -> None:
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        function, args = pickle.loads(call)
        answer = ("result", function(*args))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answer = ("error", traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    if answer[0] == "error":
        os._exit(1)  # a peer may be waiting in a collective; an orderly exit would wait for it
