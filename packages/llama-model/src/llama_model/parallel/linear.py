"""A linear layer of one rank for training: as few passes over its gradients, and as fast a product, as can be had.

m rows, i input and o output channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from llama_model.errors import ModelError


def linear(x: Tensor, weight: nn.Parameter) -> Tensor:
    """`x weight^T`.

    Where megatron-core's data-parallel wrapper has given the weight a `main_grad` of its own type, the backward pass
    adds to that in the product itself, and the wrapper is told so: no gradient is written, read and added afterwards.

    Args:
        x: [..., i].
        weight: [o, i].

    Returns:
        [..., o].

    Raises:
        ModelError: On asking for a second derivative.
    """
    y: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter) -> Tensor:
        """Keeps both."""
        ctx.save_for_backward(x)
        ctx.weight = weight  # the parameter itself: its main_grad is an attribute
        return product(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor]:
        """The two products."""
        if torch.is_grad_enabled():  # only under create_graph
            raise ModelError("a linear layer of llama_model.parallel has no second derivative")
        (x,) = ctx.saved_tensors
        rows = dy.flatten(0, -2)  # [m, o]
        dx = product(rows, ctx.weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, weight_gradient(ctx.weight, rows, x.flatten(0, -2))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x weight^T` of x [m, i] and a weight [o, i] of any strides: [m, o]."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and _HAS_ONEDNN:
        # On AMD's processors oneDNN is up to a tenth faster than MKL, PyTorch's choice for fp32.
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return y
    return x @ weight.t()


_HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def weight_gradient(weight: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """`dy^T x` of dy [m, o] and x [m, i], to be returned as the weight's gradient.

    Added to the weight's `main_grad`, where there is one of its type; what is returned then holds nothing: it only
    makes the wrapper's hook run.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or main_grad.dtype != dy.dtype:
        return dy.t() @ x
    main_grad.addmm_(dy.t(), x)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)
