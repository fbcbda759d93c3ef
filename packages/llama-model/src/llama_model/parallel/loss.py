"""The training loss: the head's product and the cross entropy over a vocabulary that ranks share, in one function.

The logits are the largest tensor of a training step. They are computed once, in the model's type; a few tokens at a
time become, in the same memory, the gradient of their loss. Nothing else of that size is ever held.

n tokens, h hidden, v vocabulary with its padding, t tensor-parallel size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed

from llama_model.errors import ModelError
from llama_model.parallel.linear import product, weight_gradient

CHUNK_ELEMENTS = {"cpu": 2**19}
"""Logits that are widened at a time, by device: on a CPU 2 MiB in fp32, which stay in its caches."""
OTHERWISE = 2**26

SHIFT = {torch.float16: 2.0**11}
"""What the gradient is multiplied by as long as it is stored: fp16 would lose probabilities below 6e-8. Not by more,
or the product with the head's weights could pass fp16's largest number.
"""


def head_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    true_rows: int,
    first_row: int = 0,
    ignore_index: int = -100,
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    """-log softmax(x weight^T)[label] of every token, 0 where the label is `ignore_index`.

    Args:
        x: [n, h], whole on every rank.
        weight: [v / t, h]: this rank's rows.
        labels: int64 [n], of the whole vocabulary.
        true_rows: Rows of `weight` that are no padding; those behind them enter nothing.
        first_row: The label that the first row stands for.
        ignore_index: The label of tokens without a loss.
        group: The t ranks; None for one.

    Raises:
        ModelError: On asking for a second derivative.

    Returns:
        fp32 [n] (fp64 for fp64), the same on every rank. The gradient of `x` is this rank's share: the sum over the
        ranks is the whole. Units: nats.

    Source: the gradient of the logits is softmax(logits) - onehot(label); Shoeybi et al., "Megatron-LM",
        https://arxiv.org/abs/1909.08053, section 3, for the sums over ranks.
    """
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss: Tensor = _HeadLoss.apply(x, weight, labels, true_rows, first_row, ignore_index, group, wants_grad)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        true_rows: int,
        first_row: int,
        ignore_index: int,
        group: distributed.ProcessGroup | None,
        wants_grad: bool,
    ) -> Tensor:
        """Keeps x, the weight, and the gradient of the logits [n, v / t] in their place."""
        logits = product(x, weight)  # [n, v / t]
        local = labels - first_row
        ours = (local >= 0) & (local < true_rows)
        index = local.masked_fill(~ours, 0).unsqueeze(-1)  # [n, 1]
        target = logits.gather(-1, index).squeeze(-1).to(_wide(logits)).masked_fill_(~ours, 0.0)  # [n]
        total = _to_softmax(logits, true_rows) if wants_grad else _log_sum_exp(logits, true_rows)
        if group is not None and group.size() > 1:
            local_total = total
            total, target = _over_ranks(local_total, target, group)
            if wants_grad:
                logits.mul_((local_total - total).exp_().unsqueeze(-1).to(logits.dtype))
        loss = total - target
        ignored = labels == ignore_index
        if wants_grad:
            # p - 1 from the loss itself: exact, whatever the logits' type has rounded p to.
            at_label = torch.expm1(-loss).mul_(SHIFT.get(logits.dtype, 1.0)).to(logits.dtype).unsqueeze(-1)  # [n, 1]
            logits.scatter_(-1, index, torch.where(ours.unsqueeze(-1), at_label, logits.gather(-1, index)))
            ctx.save_for_backward(x, logits, ignored)
            ctx.weight = weight
        return loss.masked_fill_(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """The loss's own gradient multiplies the rows of the small matrices."""
        if torch.is_grad_enabled():  # only under create_graph
            raise ModelError("the training loss has no second derivative")
        x, dlogits, ignored = ctx.saved_tensors
        scale = dloss.masked_fill(ignored, 0.0).div_(SHIFT.get(dlogits.dtype, 1.0)).unsqueeze(-1)  # [n, 1]
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _scaled(product(dlogits, ctx.weight.t()), scale)
        if ctx.needs_input_grad[1]:
            dweight = weight_gradient(ctx.weight, dlogits, _scaled(x, scale))
        return dx, dweight, None, None, None, None, None, None


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    return (x * scale).to(x.dtype)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _to_softmax(logits: Tensor, true_rows: int) -> Tensor:
    """Overwrites the logits by their softmax over this rank's rows, times `SHIFT`; returns the log-sum-exps [n]."""
    totals = logits.new_full(logits.shape[:1], -torch.inf, dtype=_wide(logits))
    shift = SHIFT.get(logits.dtype, 1.0)
    logits[:, true_rows:] = 0.0
    for rows in _chunks(logits) if true_rows else ():  # a rank may hold nothing but padding
        chunk = logits[rows, :true_rows]
        largest = chunk.amax(-1).to(totals.dtype)
        softmax = torch.softmax(chunk, -1, dtype=totals.dtype)
        totals[rows] = largest - softmax.amax(-1).log()  # the largest has the probability 1 / sum(exp(x - largest))
        chunk.copy_(softmax if shift == 1.0 else softmax.mul_(shift))
    return totals


def _log_sum_exp(logits: Tensor, true_rows: int) -> Tensor:
    """The same totals, and nothing else."""
    totals = logits.new_empty(len(logits), dtype=_wide(logits))
    for rows in _chunks(logits):
        totals[rows] = logits[rows, :true_rows].to(totals.dtype).logsumexp(-1)
    return totals


def _over_ranks(total: Tensor, target: Tensor, group: distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The log-sum-exps and the labels' logits of the whole vocabulary, from each rank's."""
    largest = total.clone()
    distributed.all_reduce(largest, distributed.ReduceOp.MAX, group)
    sums = torch.stack(((total - largest).exp_(), target))
    distributed.all_reduce(sums, distributed.ReduceOp.SUM, group)
    return largest + sums[0].log(), sums[1]


def _chunks(logits: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS.get(logits.device.type, OTHERWISE) // max(1, logits.shape[1]))
    return (slice(start, start + step) for start in range(0, len(logits), step))
