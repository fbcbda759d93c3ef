"""What the numbers of a run mean, defined once. metrics.jsonl is the truth, the console a view of it.

One object a step:

    step                             1 for the first
    consumed_samples                 after the step
    loss                             nats a token, over the global batch's labelled tokens; null where it overflowed
    loss_tokens                      how many those are
    lr, grad_norm, loss_scale        used by the step; grad_norm before clipping
    skipped                          true where a float16 overflow left the weights alone
    step_time_s                      wall seconds from data to updated weights, the device synchronised
    tokens_per_second_per_device     seq_length * global_batch_size / step_time_s / devices: positions computed, padding
                                     of fine-tuning rows among them
    samples_per_second               global_batch_size / step_time_s, over all devices
    model_tflops_per_device          tokens_per_second_per_device * model FLOPs a token / 1e12; the forward and backward
                                     pass of the network without recomputation (llama_model.flops has the formula)
    mfu                              model_tflops_per_device over the device's peak; only where the peak is known
    max_memory_bytes                 of the fullest device so far; only where the device counts it
    valid_loss                       nats a token on the validation split; only on steps that validated
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from trainer.engines import StepResult
from trainer.errors import TrainerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Turns a step's wall time into rates.

    Args:
        seq_length: Positions of a sample.
        global_batch_size: Samples of a step, over all devices.
        num_devices: Processes of the run; each has one device.
        flops_per_token: Model FLOPs of one position, forward and backward.
        peak_flops: Peak FLOP/s of one device in the run's dtype, None where unknown.
    """

    seq_length: int
    global_batch_size: int
    num_devices: int
    flops_per_token: float
    peak_flops: float | None

    def rates(self, step_time_s: float) -> dict[str, float]:
        """The rates of a step that took `step_time_s` wall seconds."""
        tokens = self.seq_length * self.global_batch_size / step_time_s / self.num_devices
        rates = {
            "step_time_s": step_time_s,
            "tokens_per_second_per_device": tokens,
            "samples_per_second": self.global_batch_size / step_time_s,
            "model_tflops_per_device": tokens * self.flops_per_token / 1e12,
        }
        if self.peak_flops:
            rates["mfu"] = tokens * self.flops_per_token / self.peak_flops
        return rates


def record(step: int, consumed_samples: int, result: StepResult, rates: dict[str, float]) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    return {
        "step": step,
        "consumed_samples": consumed_samples,
        "loss": _number(result.loss),
        "loss_tokens": result.loss_tokens,
        "lr": result.lr,
        "grad_norm": _number(result.grad_norm),
        "loss_scale": result.loss_scale,
        "skipped": result.skipped,
        **rates,
    }


def _number(value: float) -> float | None:
    """JSON has no infinity: what a float16 overflow leaves becomes null."""
    return value if math.isfinite(value) else None


def perplexity(loss: float) -> float:
    """E to the loss in nats a token; infinite where that is no float any more."""
    return math.exp(loss) if loss < 700 else math.inf


class Sinks:
    """Where records go: metrics.jsonl, and TensorBoard where it is asked for."""

    def __init__(self, file: TextIO | None, board: Any | None) -> None:
        self._file, self._board = file, board

    def write(self, line: dict[str, Any]) -> None:
        """Appends one record as strict JSON and hands it to the system, so that a killed run keeps it."""
        if self._file is not None:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, line["step"])


@contextmanager
def sinks(path: Path, tensorboard_dir: Path | None, is_first_rank: bool) -> Iterator[Sinks]:
    """The open sinks of a run; those of any but the first rank take records and keep none.

    Raises:
        TrainerError: TensorBoard is asked for and not installed.
    """
    if not is_first_rank:
        yield Sinks(None, None)
        return
    board = None if tensorboard_dir is None else _board(tensorboard_dir)
    with path.open("a", encoding="utf-8") as file:
        try:
            yield Sinks(file, board)
        finally:
            if board is not None:
                board.close()


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainerError(
            "--tensorboard-dir needs TensorBoard: pip install 'puna-trainer[tensorboard]' and its siblings"
        ) from None
    return SummaryWriter(str(folder))


def console_line(line: dict[str, Any], train_iters: int, eta_s: float) -> str:
    """One aligned line of a step: always the same columns in the same order."""
    parts = [
        f"step {line['step']:>{len(str(train_iters))}}/{train_iters}",
        "loss n/a" if line["loss"] is None else f"loss {line['loss']:.4f}",
        f"lr {line['lr']:.2e}",
        "grad n/a" if line["grad_norm"] is None else f"grad {line['grad_norm']:.3f}",
        f"scale {line['loss_scale']:g}",
        f"{line['step_time_s']:.3f} s",
        f"{line['tokens_per_second_per_device']:.0f} tok/s/dev",
        f"{line['model_tflops_per_device']:.3g} TFLOP/s/dev",
        f"mfu {line['mfu']:.1%}" if "mfu" in line else "mfu n/a",
    ]
    parts += [f"mem {line['max_memory_bytes'] / 2**30:.1f} GiB"] if "max_memory_bytes" in line else []
    parts += ["skipped"] if line["skipped"] else []
    return " | ".join([*parts, f"eta {_clock(eta_s)}"])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
