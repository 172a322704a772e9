"""The optimizer is always megatron-core's DistributedOptimizer: one state format, one path."""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from dapo_megatron.actor.model import DTYPES
from dapo_megatron.actor.precision import optimizer_arguments
from dapo_megatron.config import RunConfig


def build_optimizer(config: RunConfig, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW with float32 state, sharded over data parallelism."""
    o = config.optimizer
    dtype = DTYPES[config.model.dtype]
    optimizer = get_megatron_optimizer(
        McoreOptimizerConfig(
            optimizer="adam",
            lr=o.lr,
            weight_decay=o.weight_decay,
            adam_beta1=o.beta1,
            adam_beta2=o.beta2,
            adam_eps=o.eps,
            clip_grad=o.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            **optimizer_arguments(config.precision),
        ),
        model,
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        # Before the first update too, the optimizer has the state that a checkpoint of it holds.
        part.init_state_fn(part.optimizer, part.config)
    return optimizer


def build_schedule(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Learning rate lr * min(1, k / warm-up updates) for update k = 1, 2, ...

    megatron-core's scheduler gives lr * n / warm-up after n calls of step() and so would train update 1 with 0: it is
    stepped before each update, not after.
    """
    o = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.lr,
        lr_warmup_steps=config.warmup_updates,
        lr_decay_steps=max(config.updates_per_step * config.trainer.steps, config.warmup_updates + 1),
        lr_decay_style="constant",
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # Of a checkpoint only the position: a resume may change the rest.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
