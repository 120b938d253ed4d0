"""megatron-core's DDP, Adam and learning-rate schedule, set up so that gradients are plain sums.

Scaling happens in the objective's denominators and nowhere else: ``calculate_per_token_loss`` makes the schedules
and DDP leave gradients unscaled, and :func:`sum_gradients` keeps ``finalize_model_grads`` from dividing by tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import (
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vespo import platform
from megatron_vespo.config.schema import OptimizerConfig
from megatron_vespo.objectives.ess import ess_step_scale
from megatron_vespo.policy import ranks


def wrap_for_training(models: Sequence[GPTModel], *, distributed_optimizer: bool) -> list[DistributedDataParallel]:
    """Each model chunk in megatron-core's DDP, gradients summed (never averaged) in float32."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        check_for_nan_in_grad=True,
    )
    chunks = [
        DistributedDataParallel(model.config, config, model, disable_bucketing=i > 0) for i, model in enumerate(models)
    ]
    for model in models:
        model.config.finalize_model_grads_func = sum_gradients
    return chunks


def sum_gradients(model: list[Any], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """finalize_model_grads without its division by the number of tokens."""
    finalize_model_grads(model, None, **options)


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    config: OptimizerConfig,
    *,
    dtype: torch.dtype,
    distributed_optimizer: bool,
    total_updates: int,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW over all chunks, and its schedule; call ``scheduler.step(1)`` before each update."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(
        settings,
        list(chunks),
        config_overrides=get_standard_config_overrides(settings),
        use_gloo_process_groups=False,
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=0.0,
        lr_warmup_steps=config.warmup_updates,
        # One beyond the last update, so that a decaying schedule never spends an update at a rate of zero.
        lr_decay_steps=max(total_updates, config.warmup_updates) + 1,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def scale_learning_rate(
    optimizer: MegatronOptimizer, metrics: Mapping[str, tuple[float, float]], weight: Literal["w", "phi"]
) -> None:
    """This update's rate times sqrt(ESS / n) (VCPO, arXiv 2602.17616); the schedule sets the next one anew.

    metrics: the mini-batch's sums on the last pipeline stage, {} on the others, which are told.
    """
    scale = torch.tensor([ess_step_scale(metrics, weight=weight) if metrics else 0.0], dtype=torch.float64)
    scale = scale.to(platform.current().device)
    group = ranks.pp_group()
    dist.broadcast(scale, group=group, group_src=group.size() - 1)
    for parameters in optimizer.param_groups:
        parameters["lr"] *= scale.item()
