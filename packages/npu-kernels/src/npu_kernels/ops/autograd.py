"""What autograd functions of the ops share."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from npu_kernels.errors import KernelError


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that is not differentiated itself: asked for a second derivative, it says so.

    PyTorch's `once_differentiable` alone says so only where the incoming gradient requires one; elsewhere the second
    derivative would silently lack this part.
    """
    guarded = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # only under create_graph
            raise KernelError("this op has no second derivative: PUNA_KERNELS=reference has one")
        return guarded(ctx, *grads)

    return checked
