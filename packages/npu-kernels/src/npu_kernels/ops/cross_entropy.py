"""Cross entropy of next-token logits, one loss per token, over a few tokens at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from npu_kernels.dispatch import Op
from npu_kernels.ops.ascend import check_dtype, npu
from npu_kernels.ops.autograd import first_derivative_only

CHUNK_ELEMENTS = {"cpu": 2**21}
"""Logits that are widened to fp32 at a time, by device: on a CPU 8 MiB in fp32, which stay in its caches."""
OTHERWISE = 2**26
"""On accelerators: 256 MiB in fp32, enough to keep one busy."""


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """-log softmax(logits)[label] of every position, 0 where the label is `ignore_index`.

    Computed in fp32 whatever the logits' type (fp64 logits stay fp64). Not averaged: the caller divides the sum by the
    global number of labelled tokens.

    The logits are the largest tensor of a training step. Besides them, and their gradient in the backward, only some
    tokens' worth is ever held in fp32; the softmax is computed again in the backward instead of being kept.

    Args:
        logits: [..., v].
        labels: int64 [...], from 0 to v - 1, or `ignore_index`; already shifted.
        ignore_index: The label of positions without a loss.

    Returns:
        fp32 of the shape of `labels`. Units: nats.

    Raises:
        ValueError: The shapes or types do not fit. A label outside the vocabulary is PyTorch's to refuse.
    """
    if not logits.dim() or logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits are {list(logits.shape)}, labels {list(labels.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"the logits are {logits.dtype}: give floating point numbers")
    if labels.dtype != torch.int64:
        raise ValueError(f"the labels are {labels.dtype}: give int64")
    if logits.dim() == 1:
        return CROSS_ENTROPY.on(logits)(logits[None], labels[None], ignore_index)[0]
    return CROSS_ENTROPY.on(logits)(logits, labels, ignore_index)


def _reference(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    wide = logits.to(_wide(logits))
    ignored = labels == ignore_index
    picked = wide.gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)  # [...]
    return (wide.logsumexp(-1) - picked).masked_fill(ignored, 0.0)


def _torch(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    rows, targets = logits.flatten(0, -2), labels.flatten()
    flat: Tensor
    if len(rows) <= _step(rows):  # one chunk
        flat = F.cross_entropy(rows.to(_wide(rows)), targets, ignore_index=ignore_index, reduction="none")
    else:
        flat = _Chunked.apply(rows, targets, ignore_index)  # type: ignore[no-untyped-call]
    return flat.view(labels.shape)


def _ascend(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    check_dtype("cross_entropy", logits)
    flat: Tensor = _ChunkedOnAscend.apply(logits.flatten(0, -2), labels.flatten(), ignore_index)  # type: ignore[no-untyped-call]
    return flat.view(labels.shape)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _step(logits: Tensor) -> int:
    """Tokens of a chunk."""
    return max(1, CHUNK_ELEMENTS.get(logits.device.type, OTHERWISE) // max(1, logits.shape[1]))


def _chunks(logits: Tensor) -> Iterator[slice]:
    step = _step(logits)
    return (slice(start, start + step) for start in range(0, len(logits), step))


class _Chunked(torch.autograd.Function):
    """Logits [T, v] and labels [T] to losses [T]. Source of the gradient: (softmax(logits) - onehot(label)) * dloss."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """Keeps the logits themselves and each token's log-sum-exp [T]."""
        wide = _wide(logits)
        ignored = labels == ignore_index
        index = labels.masked_fill(ignored, 0).unsqueeze(-1)  # [T, 1]
        loss = logits.new_empty(labels.shape, dtype=wide)
        for rows in _chunks(logits):  # PyTorch's fused loss takes half of logsumexp's time
            loss[rows] = F.cross_entropy(logits[rows].to(wide), index[rows, 0], reduction="none")
        total = loss + logits.gather(-1, index).squeeze(-1)
        ctx.save_for_backward(logits, index, ignored, total)
        return loss.masked_fill_(ignored, 0.0)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        """The gradient in the logits' type."""
        logits, index, ignored, total = ctx.saved_tensors
        dloss = dloss.masked_fill(ignored, 0.0).unsqueeze(-1)  # [T, 1]
        dlogits = torch.empty_like(logits)
        for rows in _chunks(logits):
            # In place, and in the result itself where it is as wide.
            target = dlogits[rows] if dlogits.dtype == total.dtype else None
            grad = torch.sub(logits[rows].to(total.dtype), total[rows].unsqueeze(-1), out=target)
            grad.exp_().mul_(dloss[rows]).scatter_add_(-1, index[rows], -dloss[rows])
            if target is None:
                dlogits[rows] = grad
        return dlogits, None, None


class _ChunkedOnAscend(torch.autograd.Function):
    """The same through npu_cross_entropy_loss, which would return its losses in the logits' type: it gets fp32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """Keeps the logits and labels only."""
        ctx.save_for_backward(logits, labels)
        ctx.ignore_index = ignore_index
        loss = logits.new_empty(labels.shape, dtype=torch.float32)
        for rows in _chunks(logits):
            loss[rows] = _fused(logits[rows], labels[rows], ignore_index)[0]
        return loss

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        """The log-softmax is computed again, chunk by chunk."""
        logits, labels = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        dloss = dloss.contiguous()
        for rows in _chunks(logits):
            log_prob = _fused(logits[rows], labels[rows], ctx.ignore_index)[1]
            arguments = {"reduction": "none", "ignore_index": ctx.ignore_index}
            dlogits[rows] = npu().npu_cross_entropy_loss_backward(dloss[rows], log_prob, labels[rows], **arguments)
        return dlogits, None, None


def _fused(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    loss, log_prob, _, _ = npu().npu_cross_entropy_loss(
        logits.float(), labels, reduction="none", ignore_index=ignore_index
    )
    return loss, log_prob


CROSS_ENTROPY = Op(
    "cross_entropy",
    _reference,
    _torch,
    "F.cross_entropy in chunks",
    _ascend,
    ("npu_cross_entropy_loss", "npu_cross_entropy_loss_backward"),
)
