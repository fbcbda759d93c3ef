"""Two questions that several backends ask of their inputs."""

import torch
from torch import Tensor

SMALL = 2**20
"""Numbers that a CPU's caches hold: below it, what saves trips through memory only costs calls."""


def is_small(x: Tensor) -> bool:
    """Whether PyTorch's plain ops are the fastest way for `x`: on a CPU, where it fits the caches."""
    return x.device.type == "cpu" and x.numel() <= SMALL


def wants_grad(*tensors: Tensor) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
