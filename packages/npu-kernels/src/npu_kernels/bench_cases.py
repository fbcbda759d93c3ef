"""What `npu-kernels bench` runs: each op at the shapes of LLaMA-2, and what its work is at least."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of one model, and of the work that is measured. Letters as in `npu_kernels.ops`."""

    name: str
    h: int
    n: int
    g: int
    d: int
    f: int
    v: int = 32000
    s: int = 4096
    decode_rows: int = 16
    slots: int = 4096

    def scaled_down(self) -> "Shape":
        """The same model over fewer tokens: seconds instead of minutes on a few CPU cores."""
        sizes = {"h": self.h, "n": self.n, "g": self.g, "d": self.d, "f": self.f, "v": self.v}
        return Shape(name=self.name, **sizes, s=512, decode_rows=2, slots=1024)


LLAMA_2 = {
    # config.json of meta-llama/Llama-2-7b-hf and Llama-2-70b-hf
    "7b": Shape(name="7b", h=4096, n=32, g=32, d=128, f=11008),
    "70b": Shape(name="70b", h=8192, n=64, g=8, d=128, f=28672),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op with its inputs, and the least that it must move and compute going forward.

    Units: bytes, FLOP. Backward moves as much again and reads the inputs once more; for attention it computes five
    products of matrices where forward computes two.
    """

    op: str
    inputs: tuple[Any, ...]
    in_bytes: int
    out_bytes: int
    flop: float | None = None
    """Of an op that is bound by computing; None: by memory."""
    leaves: int
    """How many of the inputs, from the first, have gradients in training; 0: the op has no backward there."""

    def work(self, backward: bool) -> float:
        """FLOP or bytes of a pass."""
        if self.flop is not None:
            return self.flop * (3.5 if backward else 1)
        return (3 * self.in_bytes + 2 * self.out_bytes) if backward else self.in_bytes + self.out_bytes


def cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every op at `shape`, its inputs on `device`."""

    def randn(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, dtype=torch.float32, device="cpu").to(device, dtype)

    item = dtype.itemsize
    s, h, n, g, d = shape.s, shape.h, shape.n, shape.g, shape.d
    x = s * h * item
    yield Case(op="rms_norm", inputs=(randn(s, h), randn(h), 1e-5), leaves=2, in_bytes=x, out_bytes=x)
    yield Case(
        op="add_rms_norm",
        inputs=(randn(s, h), randn(s, h), randn(h), 1e-5),
        leaves=3,
        in_bytes=2 * x,
        out_bytes=2 * x,
    )
    heads = s * (n + g) * d * item
    tables = tuple(randn(s, 1, d, dtype=torch.float32) for _ in range(2))
    yield Case(
        op="rotary_embedding",
        inputs=(randn(1, s, n, d), randn(1, s, g, d), *tables),
        leaves=2,
        in_bytes=heads,
        out_bytes=heads,
    )
    half = s * shape.f * item
    yield Case(op="swiglu", inputs=(randn(s, 2 * shape.f),), leaves=1, in_bytes=2 * half, out_bytes=half)
    yield Case(
        op="attention",
        inputs=(randn(1, s, n, d), randn(1, s, g, d), randn(1, s, g, d), True, None, 1 / math.sqrt(d), None),
        leaves=3,
        in_bytes=s * (n + 2 * g) * d * item,
        out_bytes=s * n * d * item,
        flop=2 * s * s * n * d,  # two products, half of each hidden
    )
    yield _decoding(shape, randn, item)
    labels = torch.randint(0, shape.v, (s,)).to(device)
    logits = s * shape.v * item
    loss = (randn(s, shape.v), labels, -100)
    yield Case(op="cross_entropy", inputs=loss, leaves=1, in_bytes=logits, out_bytes=4 * s)


def _decoding(shape: Shape, randn: Callable[..., Tensor], item: int) -> Case:
    rows, slots, g, d = shape.decode_rows, shape.slots, shape.g, shape.d
    lengths = tuple(slots - row for row in range(rows))
    cache = [randn(rows, slots, g, d) for _ in range(2)]
    q = randn(rows, 1, shape.n, d)
    at = torch.tensor(lengths).to(q.device)
    moved = 2 * sum(lengths) * g * d * item
    return Case(
        op="decode_attention",
        inputs=(q, *cache, at, lengths),
        leaves=0,
        in_bytes=moved,
        out_bytes=rows * shape.n * d * item,
    )
