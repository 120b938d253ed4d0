"""What megatron-core 0.16.1 needs on a machine without CUDA: three tables, each entry by name and checked.

- RETARGETED: functions that name CUDA where they mean "the device". They keep their code; only the name ``cuda`` in
  it reads ``cpu`` (torch.cuda.current_device() becomes torch.cpu.current_device(), device="cuda" device="cpu",
  x.cuda() x.cpu(), "torch.cuda.FloatTensor" "torch.FloatTensor"). torch.cpu is torch's own twin of torch.cuda; what it
  lacks raises AttributeError when called, so that nothing becomes a silent no-op.
- REPLACED: functions whose CUDA way has no CPU twin, or that gloo cannot carry; ours are in megatron_cpu_bodies.py.
- MISSING: names that megatron-core reads and defines, or defines rightly, only where Transformer Engine is.

Functions are changed in place (``__code__``), because modules hold copies of each other's functions; torch itself is
never touched. ``install`` refuses another megatron-core, a machine with CUDA, and any entry that does not fit.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from megatron_vespo.platform import PlatformError
from megatron_vespo.platform import megatron_cpu_bodies as bodies

MEGATRON_CORE_VERSION = "0.16.1"


@dataclass(frozen=True)
class Retarget:
    """Functions of one module of megatron.core in which ``cuda`` is to read ``twin``."""

    module: str
    functions: tuple[str, ...]
    reason: str
    twin: str = "cpu"
    complete: bool = True
    """Whether these are all of the module's functions that name CUDA (checked); False: the others never run here."""


@dataclass(frozen=True)
class Replace:
    """One function of megatron.core, and the body that takes its place (same parameters: checked)."""

    module: str
    function: str
    body: Callable[..., Any]
    reason: str


UNDEFINED = object()


@dataclass(frozen=True)
class Missing:
    """A name that a module of megatron.core reads and does not define, or defines as ``found`` (checked)."""

    module: str
    name: str
    value: Any
    reason: str
    found: Any = UNDEFINED


_ALLOCATES = "allocates on torch.cuda.current_device()"
_SIDE_STREAM = "opens or waits for a side stream"

RETARGETED: tuple[Retarget, ...] = (
    Retarget(
        "tensor_parallel.layers",
        (
            "VocabParallelEmbedding.__init__",
            "ColumnParallelLinear.__init__",
            "RowParallelLinear.__init__",
            "LinearWithGradAccumulationAndAsyncCommunication.backward",
        ),
        _ALLOCATES,
    ),
    Retarget(
        "tensor_parallel.mappings",
        ("_gather_along_last_dim", "_reduce_scatter_along_first_dim", "_AllToAll.forward"),
        _ALLOCATES,
    ),
    Retarget("tensor_parallel.utils", ("split_tensor_into_1d_equal_chunks", "gather_split_1d_tensor"), _ALLOCATES),
    Retarget(
        "tensor_parallel.random",
        ("CudaRNGStatesTracker.add", "model_parallel_cuda_manual_seed"),
        "seeds the device's generator; torch.random holds the CPU's",
        twin="random",
        complete=False,
    ),
    Retarget("utils", ("GlobalMemoryBuffer.get_tensor", "local_multi_tensor_l2_norm"), _ALLOCATES, complete=False),
    Retarget("transformer.dot_product_attention", ("DotProductAttention.__init__",), _ALLOCATES),
    Retarget("transformer.utils", ("get_default_causal_mask", "get_sliding_window_causal_mask"), "mask on device cuda"),
    Retarget("transformer.moe.router", ("Router.gating", "TopKRouter.__init__"), _ALLOCATES),
    Retarget("transformer.moe.token_dispatcher", ("MoEAlltoAllTokenDispatcher.__init__",), _SIDE_STREAM),
    Retarget("transformer.moe.moe_utils", ("track_moe_metrics",), "metrics on device cuda"),
    Retarget(
        "transformer.moe.shared_experts",
        (
            "SharedExpertMLP.__init__",
            "SharedExpertMLP.pre_forward_comm",
            "SharedExpertMLP.linear_fc1_forward_and_act",
            "SharedExpertMLP.linear_fc2_forward",
            "SharedExpertMLP.post_forward_comm",
            "SharedExpertMLP.get_output",
        ),
        _SIDE_STREAM,
    ),
    Retarget(
        "models.common.embeddings.rotary_pos_embedding",
        ("RotaryEmbedding.__init__", "RotaryEmbedding.get_emb", "MultimodalRotaryEmbedding.__init__"),
        _ALLOCATES,
    ),
    Retarget(
        "models.common.embeddings.yarn_rotary_pos_embedding",
        ("YarnRotaryEmbedding.__init__", "YarnRotaryEmbedding.get_emb"),
        _ALLOCATES,
    ),
    Retarget(
        "models.common.language_module.language_module",
        ("LanguageModule.setup_embeddings_and_output_layer",),
        "moves the tied embedding to CUDA for its all-reduce",
    ),
    Retarget(
        "pipeline_parallel.schedules",
        (
            "forward_step",
            "forward_backward_no_pipelining",
            "forward_backward_pipelining_with_interleaving",
            "forward_backward_pipelining_without_interleaving",
        ),
        "token counts on device cuda",
    ),
    Retarget(
        "pipeline_parallel.p2p_communication",
        ("P2PCommunicator._communicate_shapes", "P2PCommunicator._communicate"),
        "allocates what it receives, and waits for the device",
    ),
    Retarget(
        "distributed.param_and_grad_buffer",
        (
            "_ParamAndGradBuffer.__init__",
            "_ParamAndGradBucketGroup.start_grad_sync",
            "_ParamAndGradBucketGroup.finish_grad_sync",
        ),
        "allocates buffers; side streams only with several distributed-optimizer instances",
    ),
    Retarget(
        "distributed.distributed_data_parallel",
        (
            "DistributedDataParallel.__init__",
            "DistributedDataParallel.offload_grad_buffers",
            "DistributedDataParallel.restore_grad_buffers",
        ),
        _SIDE_STREAM,
    ),
    Retarget(
        "optimizer.optimizer",
        (
            "MegatronOptimizer.offload_to_cpu",
            "MegatronOptimizer.restore_from_cpu",
            "MixedPrecisionOptimizer.__init__",
            "Float16OptimizerWithFloat16Params.__init__",
            "FP32Optimizer.__init__",
            "ChainedOptimizer.get_loss_scale",
        ),
        "scalars on device cuda; parameter types by their CUDA names",
    ),
    Retarget(
        "optimizer.clip_grads",
        ("get_grad_norm_fp32", "clip_grad_by_total_norm_fp32", "count_zeros_fp32"),
        "norms on device cuda; gradient types by their CUDA names",
    ),
    Retarget(
        "optimizer.distrib_optimizer",
        (
            "DistributedOptimizer._build_model_and_main_param_groups",
            "DistributedOptimizer.__init__",
            "DistributedOptimizer.load_state_dict",
            "DistributedOptimizer.get_parameter_state_dp_zero",
        ),
        "parameter types by their CUDA names; state on device cuda",
    ),
    Retarget(
        "optimizer.grad_scaler",
        ("MegatronGradScaler.__init__", "DynamicGradScaler.__init__", "DynamicGradScaler.load_state_dict"),
        "loss scale on device cuda",
    ),
    Retarget(
        "dist_checkpointing.exchange_utils",
        (
            "_get_empty_tensor_for_exchange",
            "exchange_loaded_tensors_gather_rounds",
            "exchange_loaded_tensors_broadcast",
        ),
        "exchanges loaded shards on device cuda",
    ),
    Retarget(
        "dist_checkpointing.strategies.fully_parallel",
        ("FullyParallelLoadStrategyWrapper.load",),
        "waits for the device",
    ),
    Retarget(
        "dist_checkpointing.strategies.filesystem_async",
        ("FileSystemWriterAsync.preload_tensors",),
        "waits for the device",
    ),
    Retarget(
        "dist_checkpointing.strategies.state_dict_saver",
        ("verify_global_md_reuse", "save_state_dict_async_finalize"),
        "agrees on flags on device cuda",
    ),
)

REPLACED: tuple[Replace, ...] = (
    Replace("tensor_parallel.random", "_get_cuda_rng_state", bodies.get_rng_state, "reads the CUDA generator's state"),
    Replace(
        "tensor_parallel.random",
        "_set_cuda_rng_state",
        bodies.set_rng_state,
        "queues the change until CUDA starts: on a CPU nothing is ever restored, and nothing says so",
    ),
    Replace(
        "models.common.embeddings.rope_utils",
        "get_pos_emb_on_this_cp_rank",
        bodies.get_pos_emb_on_this_cp_rank,
        "pins memory and copies it to CUDA",
    ),
    Replace(
        "transformer.moe.moe_utils",
        "maybe_move_tensor_to_cpu",
        bodies.maybe_move_tensor_to_cpu,
        "converts CUDA tensors only; all_to_all_single refuses split sizes that stay tensors",
    ),
    Replace(
        "transformer.moe.token_dispatcher",
        "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
        bodies.maybe_dtoh_and_synchronize,
        "records an event on a side stream; torch.cpu.Stream has no events",
    ),
    Replace(
        "tensor_parallel.mappings",
        "_gather_along_first_dim",
        bodies.gather_along_first_dim,
        "gloo gathers equal sizes only",
    ),
)

MISSING: tuple[Missing, ...] = (
    Missing(
        "transformer.moe.moe_utils",
        "te_general_gemm",
        None,
        "upstream bug: a NameError in every MoE router where Transformer Engine is absent",
    ),
    Missing(
        "transformer.multi_latent_attention",
        "HAVE_TE",
        False,
        "upstream bug: true where Transformer Engine is absent, and an isinstance of a mock follows",
        found=True,
    ),
)

_installed = False


def install() -> None:
    """Adapts megatron-core to a CPU, once a process. Raises PlatformError before anything has been changed where the
    version is unknown or CUDA is present, and where an entry of the tables does not fit."""
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise PlatformError("CUDA is present: megatron-core must not be adapted to the CPU here")
    import megatron.core

    check_version(megatron.core.__version__)
    apply(RETARGETED, REPLACED, MISSING)
    # One generator plays both roles on a CPU, so that this sanity check of CudaRNGStatesTracker.fork always warns.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    _installed = True


def check_version(version: str) -> None:
    if version != MEGATRON_CORE_VERSION:
        raise PlatformError(
            f"megatron-core {version} is installed; the CPU adaptations in {__name__} are checked for "
            f"{MEGATRON_CORE_VERSION} only. Install megatron-core=={MEGATRON_CORE_VERSION}, or go through the tables."
        )


def apply(retargeted: Sequence[Retarget], replaced: Sequence[Replace], missing: Sequence[Missing]) -> None:
    """Checks every entry, and only then changes megatron-core. Raises PlatformError naming each that does not fit."""
    problems: list[str] = []
    new_code: list[tuple[FunctionType, CodeType]] = []
    taken: set[str] = {f"{r.module}:{r.function}" for r in replaced}
    for replacement in replaced:
        function = _find(replacement.module, replacement.function, problems)
        if function is None:
            continue
        theirs, ours = _parameters(function), _parameters(replacement.body)
        if theirs != ours:
            problems.append(f"{replacement.module}:{replacement.function} takes {theirs}, its replacement {ours}")
        new_code.append((function, replacement.body.__code__))
    for entry in retargeted:
        for name in entry.functions:
            function = _find(entry.module, name, problems)
            if function is None:
                continue
            code = _renamed(function.__code__, entry.twin)
            if code == function.__code__:
                problems.append(f"{entry.module}:{name} does not name CUDA")
            new_code.append((function, code))
        if entry.complete:
            naming = {f.__qualname__ for f in _functions_naming_cuda(_module(entry.module))}
            naming -= {name for name in naming if f"{entry.module}:{name}" in taken}
            if extra := sorted(naming - set(entry.functions)):
                problems.append(f"{entry.module}: {extra} name CUDA too, and are not in the table")
    for absent in missing:
        found = getattr(_module(absent.module), absent.name, UNDEFINED)
        if found is not absent.found:
            now = "defined" if absent.found is UNDEFINED else f"{found!r}"
            problems.append(f"{absent.module}:{absent.name} is {now} now; drop the entry")
    if problems:
        raise PlatformError("megatron-core is not as the CPU adaptations expect it: " + "; ".join(problems))
    for function, code in new_code:
        function.__code__ = code
    for absent in missing:
        setattr(_module(absent.module), absent.name, absent.value)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"megatron.core.{name}")


def _find(module: str, qualname: str, problems: list[str]) -> FunctionType | None:
    found: Any = _module(module)
    for part in qualname.split("."):
        if part not in vars(found):
            problems.append(f"{module}:{qualname} does not exist")
            return None
        found = vars(found)[part]
    return _unwrapped(found)


def _unwrapped(found: Any) -> Any:
    found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    return found


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    code: CodeType = function.__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _functions_naming_cuda(scope: ModuleType | type, module: str = "") -> Iterator[FunctionType]:
    module = module or scope.__name__
    for value in vars(scope).values():
        function = _unwrapped(value)
        if isinstance(function, FunctionType) and function.__module__ == module:
            if _renamed(function.__code__, "cpu") != function.__code__:
                yield function
        elif isinstance(value, type) and value.__module__ == module:
            yield from _functions_naming_cuda(value, module)


def _renamed(code: CodeType, twin: str) -> CodeType:
    """``code`` with the name and the constant "cuda" read as ``twin``, in nested functions too."""
    names = tuple(twin if name == "cuda" else name for name in code.co_names)
    return code.replace(co_names=names, co_consts=tuple(_renamed_constant(c, twin) for c in code.co_consts))


def _renamed_constant(constant: Any, twin: str) -> Any:
    if isinstance(constant, CodeType):
        return _renamed(constant, twin)
    if isinstance(constant, tuple):
        return tuple(_renamed_constant(c, twin) for c in constant)
    if constant == "cuda":
        return twin
    if constant in ("torch.cuda.FloatTensor", "torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"):
        return constant.replace(".cuda", "")
    return constant
