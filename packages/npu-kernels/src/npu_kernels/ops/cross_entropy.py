"""Cross entropy of next-token logits, one loss per token."""

import torch
from torch import Tensor
from torch.nn import functional as F

from npu_kernels.dispatch import select


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """-log softmax(logits)[label] of every position, 0 where the label is `ignore_index`.

    Computed in fp32 whatever the logits' type (fp64 logits stay fp64). Not averaged: the caller divides the sum by the
    global number of labelled tokens.

    Args:
        logits: [..., v].
        labels: int64 [...], from 0 to v - 1, or `ignore_index`; already shifted.
        ignore_index: The label of positions without a loss.

    Returns:
        fp32 of the shape of `labels`. Units: nats.

    Raises:
        ValueError: The shapes do not fit.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits are {list(logits.shape)}, labels {list(labels.shape)}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return select(BACKENDS)(wide, labels, ignore_index)


def _reference(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    ignored = labels == ignore_index
    picked = logits.gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)  # [...]
    return (logits.logsumexp(-1) - picked).masked_fill(ignored, 0.0)


def _torch(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none")
    return loss.view(labels.shape)


BACKENDS = {"reference": _reference, "torch": _torch}
