"""Adam and AdamW with the interface of apex's FusedAdam, which megatron-core is written for, on torch's own kernels."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """One fused kernel a step where the device has it (CPU, CUDA, NPU), torch's multi-tensor one elsewhere.

    The step's number stands in each parameter group, as in apex and Transformer Engine, not in a tensor beside each
    parameter: this is what megatron-core's distributed optimizer saves and loads.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Decay of the mean and of the mean square.
        eps: Added to the root.
        weight_decay: Decoupled (AdamW) or part of the gradient (Adam), as `adam_w_mode` says.
        adam_w_mode: Whether decay is decoupled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._rule = adamw if adam_w_mode else adam

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("FusedAdam takes no closure")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        device = params[0].device
        fused = device.type in ("cpu", "cuda", torch._C._get_privateuse1_backend_name())
        before = group["step"] - 1.0  # the kernel counts up itself
        self._rule(
            params,
            [p.grad for p in params if p.grad is not None],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [torch.tensor(before, device=device) for _ in params],
            fused=fused,
            foreach=not fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
