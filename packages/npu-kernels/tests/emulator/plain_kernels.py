"""Host kernels of the plain aclnn ops that a small LLaMA needs to train and to write, most of them one line."""

from typing import Any

import torch
from torch import Tensor

from emulator.calls import kernel


@kernel("aclnnInplaceCopy", "out source")
def _copy(out: Tensor, source: Tensor) -> None:
    out.copy_(source)


@kernel("aclnnInplaceZero", "out")
def _zero(out: Tensor) -> None:
    out.zero_()


@kernel("aclnnInplaceOne", "out")
def _one(out: Tensor) -> None:
    out.fill_(1)


@kernel("aclnnInplaceFillScalar", "out value")
def _fill(out: Tensor, value: Any) -> None:
    out.fill_(value)


@kernel("aclnnAdd", "x other alpha out")
def _add(x: Tensor, other: Tensor, alpha: Any, out: Tensor) -> None:
    out.copy_(torch.add(x, other, alpha=alpha))


@kernel("aclnnMatmul", "x other out cube_math_type:int8")
def _matmul(x: Tensor, other: Tensor, out: Tensor, _type: int) -> None:
    out.copy_(x @ other)


@kernel("aclnnMm", "x other out cube_math_type:int8")
def _mm(x: Tensor, other: Tensor, out: Tensor, _type: int) -> None:
    out.copy_(x @ other)


@kernel("aclnnMul", "x other out")
def _mul(x: Tensor, other: Tensor, out: Tensor) -> None:
    out.copy_(x * other)


@kernel("aclnnMuls", "x value out")
def _muls(x: Tensor, value: Any, out: Tensor) -> None:
    out.copy_(x * value)


@kernel("aclnnInplaceMul", "out other")
def _mul_(out: Tensor, other: Tensor) -> None:
    out.mul_(other)


@kernel("aclnnInplaceMuls", "out value")
def _muls_(out: Tensor, value: Any) -> None:
    out.mul_(value)


@kernel("aclnnAdds", "x value alpha out")
def _adds(x: Tensor, value: Any, alpha: Any, out: Tensor) -> None:
    out.copy_(x + value * alpha)


@kernel("aclnnInplaceAdd", "out other alpha")
def _add_(out: Tensor, other: Tensor, alpha: Any) -> None:
    out.add_(other, alpha=alpha)


@kernel("aclnnInplaceAdds", "out value alpha")
def _adds_(out: Tensor, value: Any, alpha: Any) -> None:
    out.add_(value, alpha=alpha)


@kernel("aclnnDivs", "x value out")
def _divs(x: Tensor, value: Any, out: Tensor) -> None:
    out.copy_(x / value)


@kernel("aclnnDiv", "x other out")
def _div(x: Tensor, other: Tensor, out: Tensor) -> None:
    out.copy_(x / other)


@kernel("aclnnEmbedding", "weight indices out")
def _embedding(weight: Tensor, indices: Tensor, out: Tensor) -> None:
    out.copy_(weight[indices])


@kernel("aclnnEmbeddingDenseBackward", "grad indices num_weights:int padding_idx:int scale_grad_by_freq:bool out")
def _embedding_grad(grad: Tensor, indices: Tensor, _rows: int, _padding: int, _scale: bool, out: Tensor) -> None:
    out.zero_().index_add_(0, indices.flatten(), grad.flatten(0, -2).to(out.dtype))


@kernel("aclnnReduceSum", "x dims keep:bool dtype:int out")
def _sum(x: Tensor, dims: list[int], keep: bool, _dtype: int, out: Tensor) -> None:
    out.copy_(x.sum(dims, keepdim=keep, dtype=out.dtype))


@kernel("aclnnNorm", "x p dims keep:bool out")
def _norm(x: Tensor, p: Any, dims: list[int], keep: bool, out: Tensor) -> None:
    out.copy_(torch.linalg.vector_norm(x, p, dims or None, keep))


@kernel("aclnnStack", "tensors dim:int out")
def _stack(tensors: list[Tensor], dim: int, out: Tensor) -> None:
    out.copy_(torch.stack(tensors, dim))


@kernel("aclnnCat", "tensors dim:int out")
def _cat(tensors: list[Tensor], dim: int, out: Tensor) -> None:
    out.copy_(torch.cat(tensors, dim))


@kernel("aclnnClampMax", "x value out")
def _clamp_max(x: Tensor, value: Any, out: Tensor) -> None:
    out.copy_(x.clamp(max=value))


@kernel("aclnnReciprocal", "x out")
def _reciprocal(x: Tensor, out: Tensor) -> None:
    out.copy_(x.reciprocal())


@kernel("aclnnForeachNorm", "tensors p outs")
def _foreach_norm(tensors: list[Tensor], p: Any, outs: list[Tensor]) -> None:
    for x, out in zip(tensors, outs, strict=True):
        out.copy_(torch.linalg.vector_norm(x, p))


@kernel("aclnnForeachMulList", "tensors others outs")
def _foreach_mul(tensors: list[Tensor], others: list[Tensor], outs: list[Tensor]) -> None:
    for x, other, out in zip(tensors, others, outs, strict=True):
        out.copy_(x * other)


@kernel(
    "aclnnApplyAdamWV2",
    "weight m v max_grad_norm grad step lr:float32 beta1:float32 beta2:float32 weight_decay:float32 eps:float32 "
    "amsgrad:bool maximize:bool",
)
def _adam_w(weight, m, v, _norm, grad, step, lr, beta1, beta2, weight_decay, eps, amsgrad, maximize) -> None:
    """PyTorch's AdamW; `step` counts the steps before this one."""
    assert not amsgrad
    assert not maximize
    t = step.item() + 1
    weight.mul_(1 - lr * weight_decay)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    weight.addcdiv_(m / (1 - beta1**t), (v / (1 - beta2**t)).sqrt() + eps, value=-lr)


@kernel("aclnnLinalgVectorNorm", "x p dims keep:bool dtype:int out")
def _vector_norm(x: Tensor, p: Any, dims: list[int], keep: bool, _dtype: int, out: Tensor) -> None:
    out.copy_(torch.linalg.vector_norm(x, p, dims or None, keep))


@kernel("aclnnClamp", "x low high out")
def _clamp(x: Tensor, low: Any, high: Any, out: Tensor) -> None:
    out.copy_(x.clamp(low, high))


@kernel("aclnnForeachAddScalarV2", "tensors value outs")
def _foreach_adds(tensors: list[Tensor], value: Any, outs: list[Tensor]) -> None:
    for x, out in zip(tensors, outs, strict=True):
        out.copy_(x + value)


@kernel("aclnnSubs", "x value alpha out")
def _subs(x: Tensor, value: Any, alpha: Any, out: Tensor) -> None:
    out.copy_(x - value * alpha)


@kernel("aclnnBitwiseNot", "x out")
def _bitwise_not(x: Tensor, out: Tensor) -> None:
    out.copy_(~x)


@kernel("aclnnTril", "x diagonal:int out")
def _tril(x: Tensor, diagonal: int, out: Tensor) -> None:
    out.copy_(x.tril(diagonal))


@kernel("aclnnBitwiseAndTensor", "x other out")
def _bitwise_and(x: Tensor, other: Tensor, out: Tensor) -> None:
    out.copy_(x & other)


@kernel("aclnnArange", "start end step out")
def _arange(start: Any, end: Any, step: Any, out: Tensor) -> None:
    out.copy_(torch.arange(start, end, step))


@kernel("aclnnLtTensor", "x other out")
def _less(x: Tensor, other: Tensor, out: Tensor) -> None:
    out.copy_(x < other)


@kernel("aclnnLeTensor", "x other out")
def _less_or_equal(x: Tensor, other: Tensor, out: Tensor) -> None:
    out.copy_(x <= other)


@kernel("aclnnIndex", "x indices out")
def _index(x: Tensor, indices: list[Tensor], out: Tensor) -> None:
    out.copy_(x[tuple(indices)])


@kernel("aclnnIndexPutImpl", "out indices values accumulate:bool unsafe:bool")
def _index_put(out: Tensor, indices: list[Tensor], values: Tensor, accumulate: bool, _unsafe: bool) -> None:
    out.index_put_(tuple(indices), values, accumulate)


@kernel("aclnnArgMax", "x dim:int keep:bool out")
def _argmax(x: Tensor, dim: int, keep: bool, out: Tensor) -> None:
    out.copy_(x.argmax(dim, keep))


@kernel("aclnnLogSoftmax", "x dim:int out")
def _log_softmax(x: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(x.float().log_softmax(dim))


@kernel("aclnnGather", "x dim:int index out")
def _gather(x: Tensor, dim: int, index: Tensor, out: Tensor) -> None:
    out.copy_(x.gather(dim, index))
