"""Our ops beside what a user of PyTorch and transformers would write, on this machine's CPU: forward and backward.

    python benchmarks/time_ops.py [TOKENS] [SECONDS]

Shapes of LLaMA-2 7B over fewer tokens. The two run in turn, so that a machine that slows down slows both; medians.
`npu-kernels bench` compares with our own references instead, and runs on accelerators too.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from npu_kernels import attention, cross_entropy, decode_attention, rms_norm, rotary_embedding, swiglu
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, repeat_kv

H, HEADS, D, FFN, VOCAB = 4096, 32, 128, 11008, 32000
Function = Callable[..., object]


def theirs_norm(x: Tensor, weight: Tensor) -> object:
    norm = LlamaRMSNorm(H, eps=1e-5)
    norm.weight = torch.nn.Parameter(weight)
    return norm(x)


def theirs_swiglu(x: Tensor) -> object:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def theirs_attention(q: Tensor, k: Tensor, v: Tensor) -> object:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def theirs_decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> object:
    """As transformers decodes: keys and values repeated for every query head."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (repeat_kv(x.transpose(1, 2), repeats) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)


def pairs(s: int, dtype: torch.dtype) -> dict[str, tuple[Function, Function, Sequence[Tensor]]]:
    """Op to ours, theirs and the inputs that have gradients."""

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes).to(dtype)

    angles = torch.outer(torch.arange(s), 10000.0 ** (-torch.arange(0, D, 2) / D)).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    labels = torch.randint(0, VOCAB, (s,))
    q = randn(1, s, HEADS, D)
    return {
        "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5), theirs_norm, [randn(s, H), randn(H)]),
        "rotary_embedding": (
            lambda q, k: rotary_embedding(q, k, cos, sin),
            lambda q, k: apply_rotary_pos_emb(q, k, cos[None].to(dtype), sin[None].to(dtype), unsqueeze_dim=2),
            [q, randn(1, s, HEADS, D)],
        ),
        "swiglu": (swiglu, theirs_swiglu, [randn(s, 2 * FFN)]),
        "attention": (attention, theirs_attention, [q, randn(1, s, HEADS, D), randn(1, s, HEADS, D)]),
        "cross_entropy": (
            lambda x: cross_entropy(x, labels),
            lambda x: F.cross_entropy(x.float(), labels, reduction="none"),
            [randn(s, VOCAB)],
        ),
    }


def decoding(groups: int, dtype: torch.dtype) -> tuple[Function, Function, Sequence[Tensor]]:
    rows, slots, lengths = 2, 1024, torch.tensor([1024, 700])
    mask = (torch.arange(slots) < lengths[:, None])[:, None, None]
    inputs = [torch.randn(rows, n, heads, D).to(dtype) for n, heads in ((1, HEADS), (slots, groups), (slots, groups))]
    return lambda q, k, v: decode_attention(q, k, v, lengths), lambda q, k, v: theirs_decode(q, k, v, mask), inputs


def cases(tokens: int, dtype: torch.dtype) -> dict[str, tuple[Function, Function, Sequence[Tensor], bool]]:
    """Row to what `compare` takes."""
    rows: dict[str, tuple[Function, Function, Sequence[Tensor], bool]] = {}
    for op, pair in pairs(tokens, dtype).items():
        rows |= {op: (*pair, False), f"{op} + backward": (*pair, True)}
    return rows | {f"decode_attention, {g} groups": (*decoding(g, dtype), False) for g in (HEADS, 8)}


def compare(ours: Function, theirs: Function, inputs: Sequence[Tensor], backward: bool, seconds: float) -> list[float]:
    """Median seconds of both."""
    runs = [_run(function, inputs, backward) for function in (ours, theirs)]
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for run, each in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            each.append(time.perf_counter() - begin)
    return [statistics.median(each[1:]) for each in times]


def _run(function: Function, inputs: Sequence[Tensor], backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(lambda: function(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]

    def step() -> object:
        out = function(*leaves)
        outputs = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(each) for each in outputs], allow_unused=True)

    return step


def main(tokens: int = 512, seconds: float = 2) -> None:
    print(
        f"{torch.get_num_threads()} threads, {tokens} tokens, torch {torch.__version__}; ms and how many times as fast"
    )
    print(f"{'':<30}{'float32: theirs':>16}{'ours':>8}{'x':>6}{'bfloat16: theirs':>18}{'ours':>8}{'x':>6}")
    per_dtype = [cases(tokens, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for name in per_dtype[0]:
        cells = []
        for known in per_dtype:
            ours, theirs = compare(*known[name], seconds)
            cells.append((theirs * 1e3, ours * 1e3, theirs / ours))
        shown = "".join(f"{a:>{w}.1f}{b:>8.1f}{x:>6.2f}" for (a, b, x), w in zip(cells, (16, 18), strict=True))
        print(f"{name:<30}{shown}")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
