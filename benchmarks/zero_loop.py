"""What the trainer's engine costs over a bare loop around `deepspeed.initialize`, on the same model.

    python benchmarks/zero_loop.py [ROUNDS] [STAGE ...]

20 M parameters, 2 micro-batches of 2 rows of 256 tokens, fp32, one process and one thread. Both loops live in it and
take one step after another in turn, so that a machine that slows down slows both. CPU time, as a neighbour on the
machine stretches wall time. The bare loop has a loss of plain means, counts no tokens and reports nothing.
"""

import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

V, H, L, HEADS, FFN, B, S, MICRO = 8000, 384, 8, 6, 1024, 2, 256, 2


def main() -> None:
    """Prints a line for each stage; each in a process of its own, as stage 3 changes torch's functions."""
    if sys.argv[1:2] == ["worker"]:
        compare(int(sys.argv[2]), int(sys.argv[3]))
        return
    rounds, stages = (sys.argv[1] if sys.argv[1:] else "15"), sys.argv[2:] or ["1", "2", "3"]
    print(f"CPU ms a step, medians of {rounds}")
    for stage in stages:
        subprocess.run([sys.executable, __file__, "worker", rounds, stage], check=True)


def compare(rounds: int, stage: int) -> None:
    """Steps of both in turn, then medians and the median of the ratios."""
    warnings.filterwarnings("ignore")
    import torch
    from ckpt_tools import LlamaConfig
    from llama_model import init_weights, parallel
    from npu_kernels import device
    from trainer import TrainConfig
    from trainer.data import Batch
    from trainer.engines.deepspeed import DeepSpeedEngine

    torch.set_num_threads(1)
    sizes: dict[str, Any] = {"num_layers": L, "hidden_size": H, "ffn_hidden_size": FFN, "kv_channels": H // HEADS}
    model = LlamaConfig(**sizes, num_attention_heads=HEADS, num_query_groups=HEADS, vocab_size=V)
    parallel.initialize()
    config = TrainConfig(
        mode="zero", zero_stage=stage, data_path=(Path("none"),), output_dir=Path("none"), model_config=Path("none"),
        train_iters=1000, seq_length=S, micro_batch_size=B, global_batch_size=B * MICRO, lr=1e-4, weight_decay=0.1,
    )  # fmt: skip
    ours = DeepSpeedEngine(config, model, device(), lambda chunk, named: init_weights(chunk, 1, named))
    bare: Any = bare_engine(model, stage)
    data = torch.randint(0, V, (MICRO, B, S + 1))
    batches = [Batch(tokens=rows[:, :-1].contiguous(), labels=rows[:, 1:].contiguous()) for rows in data]

    def bare_step() -> None:
        for batch in batches:
            bare.backward(bare(batch.tokens, labels=batch.labels).mean())
            bare.step()

    steps: dict[str, Any] = {"bare": bare_step, "ours": lambda: ours.train_step(batches, stop_asked=False)}
    costs: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if number >= 2:  # the first ones build what stays
                costs[name].append((time.process_time() - began) * 1e3)
    ratio = statistics.median(our / its for our, its in zip(costs["ours"], costs["bare"], strict=True))
    medians = {name: statistics.median(each) for name, each in costs.items()}
    print(f"stage {stage}: bare {medians['bare']:.0f}, ours {medians['ours']:.0f}, ours/bare {ratio:.3f}", flush=True)


def bare_engine(model: Any, stage: int) -> Any:
    """DeepSpeed as its documentation starts it, with the same optimizer."""
    import contextlib

    import deepspeed
    import torch
    from ckpt_tools import Layout
    from llama_model import init_weights, parallel

    (network,) = parallel.build_chunks(model, Layout(), transformer_options={"perform_initialization": False})
    init_weights(network, 1)
    adam = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    options = {
        "train_micro_batch_size_per_gpu": B,
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "steps_per_print": None,
    }
    with contextlib.redirect_stdout(None):
        return deepspeed.initialize(model=network, optimizer=adam, config=options)[0]


if __name__ == "__main__":
    main()
