"""What `trainer pretrain` costs beside the model and the optimizer: reading data, adding up, reporting.

    python benchmarks/train_loop.py [STEPS] [float32|bfloat16 ...]

A run of 20 M parameters, 4 rows of 256 tokens a step, one thread, on a data set of random documents. Its parts are
timed where they stand, by CPU time: what a bare loop has too (megatron-core's schedule with the model in it, and its
optimizer), the reading of samples, and all the rest of the trainer.
"""

import contextlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

V, H, L, HEADS, FFN, B, S = 8000, 384, 8, 6, 1024, 4, 256
DOCUMENTS, TOKENS = 2000, 400
WARM_UP = 3


class Clock:
    """CPU seconds by part; time spent in a part within a part counts for the inner one."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._open: list[str] = ["rest"]
        self._since = time.process_time()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what runs within it."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, counted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def restart(self) -> None:
        """Forgets what was before."""
        self._turn()
        self.spent.clear()

    def _turn(self) -> None:
        now = time.process_time()
        self.spent[self._open[-1]] = self.spent.get(self._open[-1], 0.0) + now - self._since
        self._since = now


def main() -> None:
    """Prints a line for each type."""
    warnings.filterwarnings("ignore")
    steps = int(sys.argv[1]) if sys.argv[1:] else 30
    print(f"CPU ms a step, mean of {steps}      model + optimizer   data  share   rest  over a bare loop")
    for dtype in sys.argv[2:] or ("float32", "bfloat16"):
        spent = run(dtype, steps)
        bare, data, rest = (spent[name] / steps * 1e3 for name in ("model and optimizer", "data", "rest"))
        whole = bare + data + rest
        print(f"{dtype:<34}{bare:>12.1f}{data:>13.2f}{data / whole:>7.2%}{rest:>7.2f}{(data + rest) / bare:>11.2%}")


def run(dtype: str, steps: int) -> dict[str, float]:
    """CPU seconds of each part over the steps after the first few."""
    from trainer import TrainConfig, train

    with tempfile.TemporaryDirectory() as home:
        write_inputs(Path(home))
        config = TrainConfig(
            data_path=(Path(home, "text"),),
            model_config=Path(home, "config.json"),
            output_dir=Path(home, "run"),
            train_iters=WARM_UP + steps,
            seq_length=S,
            micro_batch_size=B,
            global_batch_size=B,
            lr=1e-4,
            bf16=dtype == "bfloat16",
            split="100,0,0",
            eod_token_id=2,
            log_interval=1,  # a line a step, as people watch a run
            save_optimizer=False,
        )
        clock = Clock()
        with instrumented(clock, WARM_UP + steps), contextlib.redirect_stderr(open(os.devnull, "w")):
            train(config)
        return clock.spent


def write_inputs(home: Path) -> None:
    """A model's config.json, and a data set of random tokens."""
    import json

    import torch
    from ckpt_tools import LlamaConfig
    from llama_model import parallel

    parallel.adapt()  # before the first import of megatron.core
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    config = LlamaConfig(
        num_layers=L, hidden_size=H, ffn_hidden_size=FFN, num_attention_heads=HEADS, num_query_groups=HEADS,
        kv_channels=H // HEADS, vocab_size=V,
    )  # fmt: skip
    (home / "config.json").write_text(json.dumps(config.to_hf("float32")), "utf-8")
    builder = IndexedDatasetBuilder(str(home / "text_text_document.bin"))
    for _ in range(DOCUMENTS):
        builder.add_document(torch.randint(3, V, (TOKENS,)), [TOKENS])
    builder.finalize(str(home / "text_text_document.idx"))


@contextlib.contextmanager
def instrumented(clock: Clock, last_step: int) -> Iterator[None]:
    """The trainer with its parts timed, between the end of the first steps and the end of the last."""
    from trainer import metrics
    from trainer.data import Loader
    from trainer.engines import megatron

    read, make, run_all, write = Loader.step, megatron._optimizer, megatron.MegatronEngine._run, metrics.Sinks.write

    def step(self: Any, first: int) -> Iterator[Any]:
        batches = read(self, first)
        while True:
            with clock.part("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def optimizer(*args: Any) -> Any:
        made = make(*args)
        made.step = clock.timed("model and optimizer", made.step)
        made.zero_grad = clock.timed("model and optimizer", made.zero_grad)
        return made

    def pass_over(*args: Any, **kwargs: Any) -> Any:
        from megatron.core import pipeline_parallel

        schedule = pipeline_parallel.get_forward_backward_func
        pipeline_parallel.get_forward_backward_func = lambda: clock.timed("model and optimizer", schedule())
        try:
            return run_all(*args, **kwargs)
        finally:
            pipeline_parallel.get_forward_backward_func = schedule

    kept: dict[str, float] = {}

    def written(self: Any, line: dict[str, Any]) -> None:
        write(self, line)
        if line["step"] == WARM_UP:
            clock.restart()
        if line["step"] == last_step:
            clock._turn()
            kept.update(clock.spent)

    Loader.step, megatron._optimizer = step, optimizer  # type: ignore[method-assign, assignment]
    megatron.MegatronEngine._run, metrics.Sinks.write = pass_over, written  # type: ignore[method-assign]
    try:
        yield
    finally:
        Loader.step, megatron._optimizer = read, make  # type: ignore[method-assign]
        megatron.MegatronEngine._run, metrics.Sinks.write = run_all, write  # type: ignore[method-assign]
        clock.spent = kept


if __name__ == "__main__":
    main()
