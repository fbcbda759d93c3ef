"""A training step of ours beside Hugging Face's LlamaForCausalLM at its best and megatron-core's own GPTModel.

    python benchmarks/train_step.py [ROUNDS] [float32|bfloat16 ...]

20 M parameters, 4 rows of 256 tokens, one thread. Each subject lives in a process of its own; they take one step after
another in turn, so that a machine that slows down slows all of them. CPU time, as a neighbour on the machine stretches
wall time; forward with the loss, backward, and optimizer (gradients zeroed, clipped, AdamW) apart.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

V, H, L, HEADS, FFN, B, S = 8000, 384, 8, 6, 1024, 4, 256
PARTS = ("forward", "backward", "optimizer")
SUBJECTS = {
    "float32": ("Hugging Face", "GPTModel", "ours"),
    # Hugging Face in bf16 throughout keeps no fp32 weights or gradients, autocast does, as ours and GPTModel.
    "bfloat16": ("Hugging Face", "Hugging Face, autocast", "GPTModel", "ours"),
}
Step = Callable[[], tuple[float, list[float]]]
"""One step: its loss, and the CPU time at the start, after forward, after backward, at the end."""


def main() -> None:
    """Prints a table for each type."""
    if sys.argv[1:2] == ["worker"]:
        return work(*sys.argv[2:])
    rounds = int(sys.argv[1]) if sys.argv[1:] else 15
    for dtype in sys.argv[2:] or SUBJECTS:
        compare(dtype, rounds)
    return None


def compare(dtype: str, rounds: int) -> None:
    """Steps of every subject in turn, then the table."""
    workers = {name: Worker(name, dtype) for name in SUBJECTS[dtype]}
    costs: dict[str, list[list[float]]] = {name: [] for name in workers}
    peaks = []
    for _ in range(rounds):
        for name, worker in workers.items():
            costs[name].append(worker.ask("step"))
        peaks.append(workers["ours"].ask("matmul"))
    memory = {name: worker.ask("memory") for name, worker in workers.items()}
    report(dtype, costs, memory, max(peaks), {name: worker.loss for name, worker in workers.items()})


def report(
    dtype: str,
    costs: dict[str, list[list[float]]],
    memory: dict[str, list[float]],
    peak: float,
    losses: dict[str, float],
) -> None:
    """Medians, the best step, and what ours is of each."""
    from ckpt_tools import LlamaConfig
    from llama_model import flops

    sizes: dict[str, Any] = {"num_layers": L, "hidden_size": H, "ffn_hidden_size": FFN, "num_attention_heads": HEADS}
    config = LlamaConfig(**sizes, num_query_groups=HEADS, kv_channels=H // HEADS, vocab_size=V)
    step_flops = flops.model_flops_per_token(config, S) * B * S
    medians = {name: [statistics.median(part) for part in zip(*steps, strict=True)] for name, steps in costs.items()}
    totals = {name: statistics.median(map(sum, steps)) for name, steps in costs.items()}
    print(
        f"\n{dtype}: CPU ms a step, medians of {len(costs['ours'])}, and the best; MiB above what imports take, VmHWM\n"
    )
    rows: list[tuple[str, ...]] = [
        ("", *PARTS, "step", "best", "ours/it", "of peak", "MiB", "ours/it", "VmHWM", "ours/it", "loss")
    ]
    for name, total in totals.items():
        (above, high), (our_above, our_high) = memory[name], memory["ours"]
        times = (*medians[name], total, min(map(sum, costs[name])))
        shares = f"{totals['ours'] / total:.3f}", f"{step_flops / total / 1e6 / peak:.1%}"
        sizes_mib = f"{above:.0f}", f"{our_above / above:.2f}", f"{high:.0f}", f"{our_high / high:.2f}"
        rows.append((name, *(f"{ms:.0f}" for ms in times), *shares, *sizes_mib, f"{losses[name]:.3f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        print(name.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), sep="  ")
    print(
        f"{step_flops / 1e9:.1f} model GFLOP a step; the best product of two 2048 x 2048 matrices: {peak:.0f} GFLOP/s"
    )


class Worker:
    """A subject in its process; `loss` is that of its first step."""

    def __init__(self, name: str, dtype: str) -> None:
        command = [sys.executable, __file__, "worker", name, dtype]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loss = self._answer()

    def ask(self, what: str) -> Any:
        """What it says to a request."""
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args!r} has ended")
        return json.loads(line)


# --- in a subject's process ---------------------------------------------------------------------------------------


def work(name: str, dtype: str) -> None:
    """Answers requests until there are no more."""
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = torch.randint(0, V, (B, S + 1))
    tokens, labels = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    step = made(name, getattr(torch, dtype), tokens, labels)
    before = next(step)  # everything is imported, nothing built
    steps = next(step)
    loss, _ = steps()
    steps()
    print(json.dumps(loss), flush=True)
    for request in sys.stdin:
        print(json.dumps(answer(request.strip(), steps, dtype, before)), flush=True)


def answer(request: str, step: Step, dtype: str, before: float) -> Any:
    """Milliseconds of a step's parts, GFLOP/s of a product, or MiB."""
    if request == "step":
        at = step()[1]
        return [(end - start) * 1e3 for start, end in itertools.pairwise(at)]
    if request == "matmul":
        return matmul_peak(dtype)
    return [resident("VmHWM") - before, resident("VmHWM")]


def resident(field: str) -> float:
    """MiB of this process, by /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def matmul_peak(dtype: str) -> float:
    """GFLOP/s of CPU time."""
    import torch

    x = torch.ones(2048, 2048, dtype=getattr(torch, dtype))
    start = time.process_time()
    x @ x
    return 2 * 2048**3 / (time.process_time() - start) / 1e9


def made(name: str, dtype: Any, tokens: Any, labels: Any) -> Iterator[Any]:
    """Yields the MiB before anything is built, then the step."""
    if name.startswith("Hugging Face"):
        return hugging_face(dtype, tokens, labels, autocast="autocast" in name)
    return megatron(name, dtype, tokens, labels)


def hugging_face(dtype: Any, tokens: Any, labels: Any, autocast: bool) -> Iterator[Any]:
    """Fused attention, fused AdamW, all gradients clipped at once."""
    import torch
    import transformers

    hf: Any = transformers  # whose annotations do not fit its own use
    yield resident("VmRSS")
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=V, hidden_size=H, intermediate_size=FFN, num_hidden_layers=L, num_attention_heads=HEADS,
            num_key_value_heads=HEADS, tie_word_embeddings=False, attn_implementation="sdpa", use_cache=False,
        )
    ).to(torch.float32 if autocast else dtype)  # fmt: skip
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def step() -> tuple[float, list[float]]:
        at = [time.process_time()]
        with torch.autocast("cpu", dtype, enabled=autocast):
            logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        at.append(time.process_time())
        del logits
        loss.backward()  # type: ignore[no-untyped-call]
        at.append(time.process_time())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        adam.step()
        adam.zero_grad()
        at.append(time.process_time())
        return loss.item(), at

    yield step


def megatron(name: str, dtype: Any, tokens: Any, labels: Any) -> Iterator[Any]:
    """Ours and GPTModel within megatron-core's data-parallel wrapper, schedule and optimizer."""
    import torch
    from llama_model import parallel

    parallel.initialize()
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import gpt_layer_specs, gpt_model
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.transformer_config import TransformerConfig

    kinds = {"params_dtype": dtype, "bf16": dtype == torch.bfloat16}
    positions = torch.arange(S)[None].expand(B, S)
    model: Any
    if name == "ours":
        from ckpt_tools import LlamaConfig

        yield resident("VmRSS")
        sizes: dict[str, Any] = {"num_layers": L, "hidden_size": H, "ffn_hidden_size": FFN, "kv_channels": H // HEADS}
        config = LlamaConfig(**sizes, num_attention_heads=HEADS, num_query_groups=HEADS, vocab_size=V)
        model = parallel.build_model(config, transformer_options={"calculate_per_token_loss": True, **kinds})
        options = model.config
        inputs: tuple[Any, ...] = (tokens,)
    else:
        yield resident("VmRSS")
        options = TransformerConfig(
            num_layers=L, hidden_size=H, num_attention_heads=HEADS, ffn_hidden_size=FFN, normalization="RMSNorm",
            layernorm_epsilon=1e-5, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
            add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
            bias_activation_fusion=False, bias_dropout_fusion=False, gradient_accumulation_fusion=False,
            masked_softmax_fusion=False, persist_layer_norm=False, apply_rope_fusion=False,
            calculate_per_token_loss=True, cuda_graph_scope=[], **kinds,
        )  # fmt: skip
        model = gpt_model.GPTModel(
            options, gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm"), V, S,
            share_embeddings_and_output_weights=False, position_embedding_type="rope",
        ).to(dtype)  # fmt: skip
        inputs = (tokens, positions, None)
    wrapped = DistributedDataParallel(options, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    rules = OptimizerConfig(optimizer="adam", lr=1e-4, weight_decay=0.1, clip_grad=1.0, **kinds)
    optimizer = get_megatron_optimizer(rules, [wrapped])
    options.finalize_model_grads_func, options.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    schedule = get_forward_backward_func()
    at: list[float] = []

    def summed(loss: Any) -> tuple[Any, Any, dict[str, Any]]:
        total = loss.float().sum()
        at.append(time.process_time())
        return total, torch.tensor(labels.numel(), dtype=torch.int), {"loss": total.detach()}

    def forward(_: object, wrapped: Any) -> tuple[Any, Any]:
        return wrapped(*inputs, labels=labels), summed

    def step() -> tuple[float, list[float]]:
        at[:] = [time.process_time()]
        (said,) = schedule(
            forward_step_func=forward, data_iterator=None, model=wrapped, num_microbatches=1, seq_length=S,
            micro_batch_size=B,
        )  # fmt: skip
        at.append(time.process_time())
        optimizer.step()
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        at.append(time.process_time())
        return said["loss"].item() / labels.numel(), list(at)

    yield step


if __name__ == "__main__":
    main()
