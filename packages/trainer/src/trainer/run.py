"""A training run on disk: which file of its folder holds what, and reading them back."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError


@dataclass(frozen=True, slots=True)
class Run:
    """A run's folder.

    RUN/config.yaml                                   resolved, itself a valid --config
    RUN/metrics.jsonl                                 one object a step
    RUN/checkpoints/latest_checkpointed_iteration.txt
    RUN/checkpoints/iter_0000010/                     the engine's files, config.json, the tokenizer's files
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved options."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a step: see `trainer.metrics`."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints and the pointer to the latest lie."""
        return self.path / "checkpoints"

    @property
    def cache(self) -> Path:
        """Indices of the data's order, which can be made again."""
        return self.path / "cache"

    @property
    def tracker(self) -> Path:
        """Names the latest complete checkpoint's iteration, in Megatron's way."""
        return self.checkpoints / "latest_checkpointed_iteration.txt"

    def checkpoint(self, iteration: int) -> Path:
        """The folder of one checkpoint."""
        return self.checkpoints / f"iter_{iteration:07d}"

    def metrics(self) -> list[dict[str, Any]]:
        """Every step's record, in order.

        Raises:
            TrainerError: A line is no record of a step; the message names it. A torn last line, which a killed run
                leaves, is skipped.
        """
        return list(self._records())

    def _records(self) -> Iterator[dict[str, Any]]:
        lines = self.metrics_file.read_text("utf-8").split("\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):  # no newline at its end: it was being written
                    return
                raise TrainerError(f"{self.metrics_file}, line {number} is not JSON: {error}") from None
            if not isinstance(record, dict) or not {"step", "loss"} <= record.keys():
                raise TrainerError(f"{self.metrics_file}, line {number} is no record of a step")
            yield record


def open_run(path: Path) -> Run:
    """The run in `path`.

    Raises:
        TrainerError: `path` holds no run.
    """
    run = Run(Path(path))
    if not run.path.exists():
        raise TrainerError(f"no such run: {path}")
    if not run.metrics_file.exists():
        raise TrainerError(f"{path} is no training run: it holds no metrics.jsonl")
    return run
