"""A training run on disk: which file of its folder holds what, and reading them back."""

import json
import os
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

    def unfinished(self, iteration: int) -> Path:
        """Where that checkpoint lies as long as it is being written, or once it is being deleted."""
        return self.checkpoints / f".{self.checkpoint(iteration).name}.unfinished"

    def iterations(self) -> list[int]:
        """The numbers of the finished checkpoints, from the first to the latest."""
        names = (path.name.removeprefix("iter_") for path in self.checkpoints.glob("iter_*") if path.is_dir())
        return sorted(int(name) for name in names if name.isdecimal())

    def latest(self) -> Path | None:
        """The folder of the latest finished checkpoint. A folder has its name only once it is finished."""
        found = self.iterations()
        return self.checkpoint(found[-1]) if found else None

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


def locate(path: Path) -> tuple[Run, Path | None]:
    """The run of a path, and the checkpoint that it names: RUN means its latest one, RUN/checkpoints/iter_… itself.

    None where the run has no finished checkpoint.

    Raises:
        TrainerError: There is no run.
    """
    if not path.exists():
        raise TrainerError(f"no such run: {path}")
    place = path.resolve()
    if place.name.startswith("iter_") and place.parent.name == "checkpoints":
        return Run(place.parent.parent), path
    if place.name == "checkpoints" and Run(place.parent).config_file.is_file():
        path = path.parent if path.name == "checkpoints" else place.parent
    run = Run(path)
    if not run.checkpoints.is_dir():
        raise TrainerError(f"{path} is no training run: it holds no checkpoints/")
    return run, run.latest()


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


def replace_text(path: Path, text: str) -> None:
    """`path` holds `text`: the old content or the new at any moment."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, "utf-8")
    sync(part)
    part.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns once the file, or the folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
