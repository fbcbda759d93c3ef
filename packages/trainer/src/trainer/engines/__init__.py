"""What the loop asks of an engine; one file here per engine, each over a library's own training machinery."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trainer.data import Batch


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did, the same on every rank."""

    loss: float
    """Nats a token: summed over the global batch's labelled tokens, divided by their number."""
    loss_tokens: int
    """Labelled tokens of the global batch."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    lr: float
    """Learning rate that this step used."""
    loss_scale: float
    skipped: bool
    """True where a float16 overflow made the optimizer leave the weights alone."""


class Engine(Protocol):
    """One model on its devices with its optimizer and schedule. Every method is called by all ranks together."""

    def train_step(self, batches: Iterable[Batch]) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step."""

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """The summed loss and the number of labelled tokens of this rank's micro-batches, over all ranks."""

    def save(self, folder: Path) -> None:
        """Writes the model into the existing, empty `folder` in the engine's own format."""
