"""Adam with the state layout of TransformerEngine's and apex's FusedAdam, on torch's own functional Adam.

Without either, megatron-core 0.16.1 falls back to torch.optim.AdamW, whose per-parameter `step` its
DistributedOptimizer cannot checkpoint: state_dict() asserts on a fresh optimizer, and
load_parameter_state_from_fully_reshardable raises KeyError 'step'. FusedAdam keeps one `step` in the parameter group;
with that layout the CPU takes the same path, and writes the same checkpoints, as a GPU.
"""

from typing import Any

import torch
from torch.optim.adam import adam


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) with `step` in the parameter group.

    `capturable` (in CUDA graphs) is named by megatron-core 0.19 and means nothing here.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        self.adam_w_mode = adam_w_mode
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            done = group.get("step", 0)
            group["step"] = done + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            if params:
                adam(
                    params,
                    [p.grad for p in params],
                    [self.state[p]["exp_avg"] for p in params],
                    [self.state[p]["exp_avg_sq"] for p in params],
                    [],
                    [torch.tensor(float(done)) for _ in params],
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                    decoupled_weight_decay=self.adam_w_mode,
                )


def install() -> None:
    """Give megatron-core this Adam where neither TransformerEngine nor apex is installed."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distrib_optimizer.Adam = FusedAdam  # DistributedOptimizer checks isinstance(optimizer, Adam)
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
