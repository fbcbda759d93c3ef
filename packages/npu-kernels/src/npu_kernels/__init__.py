"""Fused operations for LLaMA behind one signature each, and the one place that knows which accelerator there is.

Every op takes batch first: x [b, s, h], q [b, s, n, d], k and v [b, s, g, d], any strides. `PUNA_KERNELS=reference`
selects the plain PyTorch references, `PUNA_KERNELS=require-fused` turns a fallback on an accelerator into an error.
Names are imported on first use, so that `import npu_kernels` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from npu_kernels.devices import Device, device
    from npu_kernels.dispatch import backends, require_fused
    from npu_kernels.errors import KernelError
    from npu_kernels.ops.attention import attention
    from npu_kernels.ops.cross_entropy import cross_entropy
    from npu_kernels.ops.decode_attention import decode_attention
    from npu_kernels.ops.rms_norm import add_rms_norm, rms_norm
    from npu_kernels.ops.rotary_embedding import rotary_embedding
    from npu_kernels.ops.swiglu import swiglu

_HOME = {
    "Device": "devices",
    "KernelError": "errors",
    "add_rms_norm": "ops.rms_norm",
    "attention": "ops.attention",
    "backends": "dispatch",
    "cross_entropy": "ops.cross_entropy",
    "decode_attention": "ops.decode_attention",
    "device": "devices",
    "require_fused": "dispatch",
    "rms_norm": "ops.rms_norm",
    "rotary_embedding": "ops.rotary_embedding",
    "swiglu": "ops.swiglu",
}

__all__ = [
    "Device",
    "KernelError",
    "add_rms_norm",
    "attention",
    "backends",
    "cross_entropy",
    "decode_attention",
    "device",
    "require_fused",
    "rms_norm",
    "rotary_embedding",
    "swiglu",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'npu_kernels' has no attribute {name!r}")
    # Kept, so that an op is looked up once and not at every call of the network.
    found = globals()[name] = getattr(import_module(f"npu_kernels.{_HOME[name]}"), name)
    return found
