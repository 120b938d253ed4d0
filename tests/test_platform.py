"""The CPU adaptations of megatron-core are checked entry by entry, and refused where they do not fit."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_vespo import platform
from megatron_vespo.platform import PlatformError, megatron_cpu
from megatron_vespo.platform.adam import FusedAdam
from megatron_vespo.platform.megatron_cpu import Missing, Replace, Retarget

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is present: the CPU adaptations are not used")


def apply_one(*entries: Retarget | Replace | Missing) -> None:
    megatron_cpu.apply(
        [e for e in entries if isinstance(e, Retarget)],
        [e for e in entries if isinstance(e, Replace)],
        [e for e in entries if isinstance(e, Missing)],
    )


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(PlatformError, match=r"megatron-core 0\.17\.0 .* 0\.16\.1"):
        megatron_cpu.check_version("0.17.0")


@cpu_only
def test_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_cpu, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(PlatformError, match="CUDA is present"):
        megatron_cpu.install()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Retarget("transformer.attention", ("Attention.gone",), ""), "Attention.gone does not exist"),
        (Retarget("transformer.mlp", ("MLP.forward",), "", complete=False), "MLP.forward does not name CUDA"),
        (
            Retarget("tensor_parallel.data", ("_build_key_size_numel_dictionaries",), ""),
            r"\['broadcast_data'\] name CUDA too",
        ),
        (
            Replace("models.common.embeddings.rope_utils", "_rotate_half", lambda x, other: x, ""),
            "takes .*'rotary_interleaved'.*, its replacement .*'other'",
        ),
        (Missing("transformer.moe.moe_utils", "permute", None, ""), "moe_utils:permute is defined now"),
        (Missing("transformer.moe.moe_utils", "HAVE_TE", None, "", found=True), "moe_utils:HAVE_TE is False now"),
    ],
)
@cpu_only
def test_an_entry_that_does_not_fit_is_refused_and_changes_nothing(
    entry: Retarget | Replace | Missing, message: str
) -> None:
    from megatron.core.transformer.attention import Attention

    before = Attention._allocate_memory.__code__
    fits = Retarget("transformer.attention", ("Attention._allocate_memory",), "")
    with pytest.raises(PlatformError, match=message):
        apply_one(fits, entry)
    assert Attention._allocate_memory.__code__ is before


@cpu_only
def test_retargeting_renames_in_nested_code_and_keeps_the_rest() -> None:
    def allocates() -> torch.Tensor:
        def inner() -> torch.Tensor:
            return torch.zeros(2, device="cuda")

        return inner() + torch.ones(2, device=torch.cuda.current_device())

    allocates.__code__ = megatron_cpu._renamed(allocates.__code__, "cpu")
    assert torch.equal(allocates(), torch.ones(2))


@cpu_only
def test_generator_states_are_really_restored() -> None:
    """As shipped, setting a state on a CPU is queued until CUDA starts, and a fork leaves the generator changed."""
    platform.current().prepare_megatron()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    expected_outside = torch.rand(2)
    torch.manual_seed(1)
    tracker.add("inside", 7)
    draws = []
    for _ in range(2):
        with tracker.fork("inside"):
            draws.append(torch.rand(2))
    assert torch.equal(torch.rand(2), expected_outside)
    torch.manual_seed(7)
    assert torch.equal(torch.cat(draws), torch.cat([torch.rand(2), torch.rand(2)]))


def test_fused_adam_equals_torch_adamw_and_keeps_the_fused_state_layout() -> None:
    torch.manual_seed(0)
    ours = torch.nn.Linear(5, 3, dtype=torch.float64)
    theirs = copy.deepcopy(ours)
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    a, b = FusedAdam(ours.parameters(), **settings), torch.optim.AdamW(theirs.parameters(), **settings)
    for _ in range(3):
        x = torch.randn(4, 5, dtype=torch.float64)
        for module, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            module(x).pow(2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=0)
    assert a.param_groups[0]["step"] == 3
    assert set(a.state[ours.weight]) == {"exp_avg", "exp_avg_sq"}


def test_fused_adam_refuses_what_it_does_not_do() -> None:
    with pytest.raises(TypeError, match="store_param_remainders"):
        FusedAdam([torch.nn.Parameter(torch.ones(1))], store_param_remainders=True)


def test_peak_memory_counts_what_was_allocated() -> None:
    here = platform.current()
    before = here.peak_memory_bytes()
    block = torch.ones(64 * 2**20 // 4, device=here.device)  # 64 MiB
    assert here.peak_memory_bytes() >= max(before, block.nbytes)
    assert here.peak_memory_bytes() < 2**40
