"""Host kernels of the plain aclnn ops that a small LLaMA and the references need, most of them one line of PyTorch.

Source: CANN's operator reference for each op's arguments, and the calls in op-plugin, https://gitcode.com/ascend/op-plugin.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emulator.calls import kernel

RETURNING: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "aclnnAdd": ("x other alpha out", lambda x, other, alpha: torch.add(x, other, alpha=alpha)),
    "aclnnAdds": ("x value alpha out", lambda x, value, alpha: x + value * alpha),
    "aclnnSub": ("x other alpha out", lambda x, other, alpha: torch.sub(x, other, alpha=alpha)),
    "aclnnSubs": ("x value alpha out", lambda x, value, alpha: x - value * alpha),
    "aclnnRsubs": ("x value alpha out", lambda x, value, alpha: value - x * alpha),
    "aclnnMul": ("x other out", torch.mul),
    "aclnnMuls": ("x value out", torch.mul),
    "aclnnDiv": ("x other out", torch.div),
    "aclnnDivs": ("x value out", torch.div),
    "aclnnNeg": ("x out", torch.neg),
    "aclnnReciprocal": ("x out", torch.reciprocal),
    "aclnnRsqrt": ("x out", torch.rsqrt),
    "aclnnSigmoid": ("x out", torch.sigmoid),
    "aclnnSigmoidBackward": ("dy y out", lambda dy, y: dy * y * (1 - y)),
    "aclnnExp": ("x out", torch.exp),
    "aclnnLog": ("x out", torch.log),
    "aclnnSqrt": ("x out", torch.sqrt),
    "aclnnPowTensorScalar": ("x value out", torch.pow),
    "aclnnClamp": ("x low high out", torch.clamp),
    "aclnnBitwiseNot": ("x out", torch.bitwise_not),
    "aclnnBitwiseAndTensor": ("x other out", torch.bitwise_and),
    "aclnnLtTensor": ("x other out", torch.lt),
    "aclnnLeTensor": ("x other out", torch.le),
    "aclnnEqScalar": ("x value out", torch.eq),
    "aclnnNeScalar": ("x value out", torch.ne),
    "aclnnLtScalar": ("x value out", torch.lt),
    "aclnnGeScalar": ("x value out", torch.ge),
    "aclnnGtScalar": ("x value out", torch.gt),
    "aclnnBitwiseOrTensor": ("x other out", torch.bitwise_or),
    "aclnnLogicalOr": ("x other out", torch.logical_or),
    "aclnnLogicalNot": ("x out", torch.logical_not),
    "aclnnMatmul": ("x other out cube_math_type:int8", lambda x, other, _: x @ other),
    "aclnnMm": ("x other out cube_math_type:int8", lambda x, other, _: x @ other),
    "aclnnBatchMatMul": ("x other out cube_math_type:int8", lambda x, other, _: x @ other),
    "aclnnReduceSum": ("x dims keep:bool dtype:int out", lambda x, dims, keep, _: x.sum(dims, keep)),
    "aclnnMean": ("x dims keep:bool dtype:int out", lambda x, dims, keep, _: x.mean(dims, keep)),
    "aclnnCast": ("x dtype:int out", lambda x, _: x),
    "aclnnAmax": ("x dims keep:bool out", torch.amax),
    "aclnnFloor": ("x out", torch.floor),
    "aclnnExpm1": ("x out", torch.expm1),
    "aclnnSWhere": ("condition x other out", torch.where),
    "aclnnLogSumExp": ("x dims keep:bool out", torch.logsumexp),
    "aclnnLinalgVectorNorm": (
        "x p dims keep:bool dtype:int out",
        lambda x, p, dims, keep, _: torch.linalg.vector_norm(x, p, dims or None, keep),
    ),
    "aclnnSoftmax": ("x dim:int out", torch.softmax),
    "aclnnSoftmaxBackward": ("dy y dim:int out", lambda dy, y, dim: y * (dy - (dy * y).sum(dim, keepdim=True))),
    "aclnnLogSoftmax": ("x dim:int out", lambda x, dim: x.float().log_softmax(dim)),
    "aclnnArgMax": ("x dim:int keep:bool out", torch.argmax),
    "aclnnArange": ("start end step out", torch.arange),
    "aclnnTril": ("x diagonal:int out", torch.tril),
    "aclnnRepeatInterleaveIntWithDim": (
        "x repeats:int dim:int size:int out",
        lambda x, repeats, dim, _: x.repeat_interleave(repeats, dim),
    ),
    "aclnnConstantPadNd": ("x pad value out", lambda x, pad, value: torch.nn.functional.pad(x, pad, value=value)),
    "aclnnStack": ("tensors dim:int out", torch.stack),
    "aclnnCat": ("tensors dim:int out", torch.cat),
    "aclnnScatterAdd": ("x dim:int index source out", torch.scatter_add),
    "aclnnGather": ("x dim:int index out", torch.gather),
    "aclnnIndex": ("x indices out", lambda x, indices: x[tuple(indices)]),
    "aclnnEmbedding": ("weight indices out", lambda weight, indices: weight[indices]),
}
"""Ops to their arguments and the values of `out`, computed from the others."""

IN_PLACE: dict[str, tuple[str, Callable[..., object]]] = {
    "aclnnInplaceCopy": ("source", Tensor.copy_),
    "aclnnInplaceZero": ("", Tensor.zero_),
    "aclnnInplaceOne": ("", lambda x: x.fill_(1)),
    "aclnnInplaceFillScalar": ("value", Tensor.fill_),
    "aclnnInplaceAdd": ("other alpha", lambda x, other, alpha: x.add_(other, alpha=alpha)),
    "aclnnInplaceAdds": ("value alpha", lambda x, value, alpha: x.add_(value, alpha=alpha)),
    "aclnnInplaceSub": ("other alpha", lambda x, other, alpha: x.sub_(other, alpha=alpha)),
    "aclnnInplaceSubs": ("value alpha", lambda x, value, alpha: x.sub_(value, alpha=alpha)),
    "aclnnInplaceDiv": ("other", Tensor.div_),
    "aclnnInplaceDivs": ("value", Tensor.div_),
    "aclnnInplaceExp": ("", Tensor.exp_),
    "aclnnInplaceAddmm": (
        "a b beta alpha cube_math_type:int8",
        lambda x, a, b, beta, alpha, _: x.addmm_(a, b, beta=beta, alpha=alpha),
    ),
    "aclnnInplaceScatter": (
        "dim:int index source reduce:int",
        lambda x, dim, index, source, _: x.scatter_(dim, index, source),
    ),
    "aclnnInplaceMul": ("other", Tensor.mul_),
    "aclnnInplaceMuls": ("value", Tensor.mul_),
    "aclnnInplaceMaskedFillScalar": ("mask value", Tensor.masked_fill_),
    "aclnnInplaceNormal": (
        "mean:float32 std:float32 seed:int offset:int",
        lambda x, mean, std, seed, offset: x.normal_(mean, std, generator=torch.Generator().manual_seed(seed + offset)),
    ),
    "aclnnIndexPutImpl": (
        "indices values accumulate:bool unsafe:bool",
        lambda x, indices, values, accumulate, _: x.index_put_(tuple(indices), values, accumulate),
    ),
}
"""Ops that change their first argument to their other arguments, and the change."""

FOREACH: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "aclnnForeachNorm": ("p", torch.linalg.vector_norm),
    "aclnnForeachAddScalarV2": ("value", torch.add),
    "aclnnForeachMulScalarV2": ("value", torch.mul),
}
"""Ops on every tensor of a list: arguments between the list and the results' list, and one result's values."""


def _register() -> None:
    for op, (arguments, compute) in RETURNING.items():
        at = arguments.split().index("out")
        kernel(op, arguments)(
            lambda *given, at=at, compute=compute: given[at].copy_(compute(*given[:at], *given[at + 1 :]))
        )
    for op, (arguments, change) in IN_PLACE.items():
        kernel(op, f"out {arguments}")(change)
    for op, (arguments, compute) in FOREACH.items():
        kernel(op, f"tensors {arguments} outs")(
            lambda tensors, value, outs, compute=compute: [
                out.copy_(compute(x, value)) for x, out in zip(tensors, outs, strict=True)
            ]
        )


_register()


@kernel("aclnnMaxDim", "x dim:int keep:bool out indices")
def _max(x: Tensor, dim: int, keep: bool, out: Tensor, indices: Tensor) -> None:
    for target, values in zip((out, indices), x.max(dim, keep), strict=True):
        target.copy_(values)


@kernel("aclnnEmbeddingDenseBackward", "grad indices num_weights:int padding_idx:int scale_grad_by_freq:bool out")
def _embedding_grad(grad: Tensor, indices: Tensor, _rows: int, _padding: int, _scale: bool, out: Tensor) -> None:
    out.zero_().index_add_(0, indices.flatten(), grad.flatten(0, -2).to(out.dtype))


@kernel(
    "aclnnApplyAdamWV2",
    "weight m v max_grad_norm grad step lr:float32 beta1:float32 beta2:float32 weight_decay:float32 eps:float32 "
    "amsgrad:bool maximize:bool",
)
def _adam_w(weight, m, v, _norm, grad, step, lr, beta1, beta2, weight_decay, eps, amsgrad, maximize) -> Any:
    """PyTorch's AdamW; `step` counts the steps before this one."""
    assert not amsgrad
    assert not maximize
    t = step.item() + 1
    weight.mul_(1 - lr * weight_decay)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    weight.addcdiv_(m / (1 - beta1**t), (v / (1 - beta2**t)).sqrt() + eps, value=-lr)
