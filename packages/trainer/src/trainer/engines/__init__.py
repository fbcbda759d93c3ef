"""What the loop asks of an engine; one file here per engine, each over a library's own training machinery."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llama_model import LlamaModel
from torch import nn

from trainer.data import Batch

Fill = Callable[[LlamaModel, Iterable[tuple[str, nn.Parameter]]], None]
"""Gives a chunk of the model its weights, one of the named parameters after the other: an engine may hold no more than
one of them whole.
"""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did, the same on every rank."""

    loss: float
    """Nats a token: summed over the global batch's labelled tokens, divided by their number."""
    loss_tokens: int
    """Labelled tokens of the global batch."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping; no finite number where the step was skipped."""
    lr: float
    """Learning rate that this step used."""
    loss_scale: float
    skipped: bool
    """True where a float16 overflow made the optimizer leave the weights alone."""
    bad_microbatch: int | None = None
    """Where the loss is no number: the first micro-batch of the global batch whose own loss is none."""
    stop_asked: bool = False
    """Whether any rank was asked to stop before the step."""


class Writing(Protocol):
    """A checkpoint that is being written."""

    def finished(self, *, wait: bool) -> bool:
        """Whether every rank has written all of it; called by all ranks together.

        Raises:
            TrainerError: A rank could not write its part.
        """


class Engine(Protocol):
    """One model on its devices with its optimizer and schedule. Every method is called by all ranks together."""

    def train_step(self, batches: Iterable[Batch], stop_asked: bool) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step.

        `stop_asked` says whether this rank was asked to stop; the result tells all of them whether any was.
        """

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """The summed loss and the number of labelled tokens of this rank's micro-batches, over all ranks."""

    def has_finite_weights(self) -> bool:
        """Whether every weight is a number: what is not must not be saved."""

    def write(self, folder: Path, *, in_background: bool) -> Writing:
        """Begins to write weights, and the optimizer unless it is not to be saved, into the existing, empty `folder` in
        the engine's own format. Beside its files each rank leaves their hashes, for `checkpoints.commit`.
        """

    def load(self, folder: Path) -> None:
        """Takes what the optimizer keeps of each parameter from a checkpoint of any engine in any layout. Weights are
        read here only where `trainer.start` has left them out for `Fill`.
        """

    def state(self) -> dict[str, Any]:
        """What else goes on from a checkpoint, as JSON that every engine takes: how far the schedule, the optimizer's
        bias correction and the loss scale have come.

        `schedule_samples`; `optimizer_steps`; `loss_scaler`: None, or `scale`, `growth` (it doubles after
        `loss_scale_window` less so many steps without an overflow) and `hysteresis` (it halves at that overflow, from
        1 on).
        """

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave."""

    def close(self) -> None:
        """Ends the engine: what it keeps of the process groups is let go of, so that their threads can end.

        Python's collector does not see all of it, through the hooks in autograd's graph.
        """
