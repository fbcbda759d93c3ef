"""Trains LLaMA-2: `train(TrainConfig(...)) -> Run`, on megatron-core ("ptd" mode).

Public names: `TrainConfig` (every option of a run), `train` (runs it in this process, which may be one rank of many),
`Run` (what a run folder holds), `open_run` (reads one), `TrainerError`. They are imported on first use, so that
`import trainer` costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import TrainConfig as TrainConfig
    from trainer.errors import TrainerError as TrainerError
    from trainer.loop import train as train
    from trainer.run import Run as Run
    from trainer.run import open_run as open_run

__all__ = ["Run", "TrainConfig", "TrainerError", "open_run", "train"]

_HOME = {
    "Run": "run",
    "TrainConfig": "config",
    "TrainerError": "errors",
    "open_run": "run",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    return getattr(import_module(f"trainer.{_HOME[name]}"), name)
