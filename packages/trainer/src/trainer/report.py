"""What a finished or running run shows people: a table of runs, and each run's loss curve as a picture."""

from pathlib import Path
from statistics import median
from typing import Any

from trainer.errors import TrainerError
from trainer.run import Run


def summary(run: Run) -> dict[str, Any]:
    """The figures of one run: losses at both ends, the last validation, median rates without the first step.

    Raises:
        TrainerError: The run has no steps yet.
    """
    lines = run.metrics()
    if not lines:
        raise TrainerError(f"{run.path} has no steps yet")
    steady = lines[1:] or lines  # the first step warms caches up
    valid = [line["valid_loss"] for line in lines if "valid_loss" in line]
    return {
        "run": str(run.path),
        "steps": lines[-1]["step"],
        "loss_first": lines[0]["loss"],
        "loss_last": lines[-1]["loss"],
        "valid_loss": valid[-1] if valid else None,
        "step_time_s": median(line["step_time_s"] for line in steady),
        "tokens_per_second_per_device": median(line["tokens_per_second_per_device"] for line in steady),
        "model_tflops_per_device": median(line["model_tflops_per_device"] for line in steady),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """`summary` rows as aligned text."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(run: Run, path: Path) -> None:
    """Writes the loss curve of `run` as a PNG: every step, their running mean, and the validation losses.

    Raises:
        TrainerError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TrainerError("a loss curve needs matplotlib: pip install 'puna-trainer[plot]'") from None
    lines = [line for line in run.metrics() if line["loss"] is not None]
    steps = [line["step"] for line in lines]
    losses = [line["loss"] for line in lines]
    valid = [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)", title=run.path.name)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(steps, _smooth(losses), color="tab:blue", label="running mean")
    if valid:
        axes.plot(*zip(*valid, strict=True), "o", color="tab:orange", label="validation")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=120)
    part.replace(path)


def _smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential running mean, unbiased at its start."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means
