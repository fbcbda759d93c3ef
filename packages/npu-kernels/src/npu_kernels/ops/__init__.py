"""One file per op: its signature, its reference (the semantics) and its backends.

Dimensions: b batch, s sequence (queries), t sequence (keys), S slots of a cache, h hidden, n query heads, g query
groups (key and value heads), r = n / g, d channels of a head, f feed-forward, v vocabulary.
"""

from importlib import import_module

MODULES = ("rms_norm", "rotary_embedding", "swiglu", "attention", "decode_attention", "cross_entropy")


def load_all() -> None:
    """Imports every op, so that `dispatch.OPS` has them all, in this order."""
    for module in MODULES:
        import_module(f"npu_kernels.ops.{module}")
