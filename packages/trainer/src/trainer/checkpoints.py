"""A run's checkpoints on disk: a kill at any moment leaves complete ones, and a tracker that names one."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.engines import Engine, Writing
from trainer.errors import TrainerError
from trainer.hashes import write_manifest
from trainer.run import Run, replace_text, sync


class Checkpoints:
    """Writes the checkpoints of a run, one at a time. Every method is called by all ranks together.

    Args:
        run: Whose they are.
        engine: What is written.
        keep_last: How many stay; 0 for all.
        in_background: Whether training goes on while the engine's files are written.
        is_first_rank: Whether this rank makes and renames the folders.
        barrier: Waits for all ranks.
    """

    def __init__(
        self,
        run: Run,
        engine: Engine,
        *,
        keep_last: int,
        in_background: bool,
        is_first_rank: bool,
        barrier: Callable[[], None],
    ) -> None:
        self._run, self._engine, self._keep_last, self._in_background = run, engine, keep_last, in_background
        self._first, self._barrier = is_first_rank, barrier
        self._pending: tuple[int, Writing] | None = None

    def begin(self, iteration: int, describe: Callable[[Path], None]) -> None:
        """Begins the checkpoint of `iteration`; the one before it has to be finished.

        Args:
            iteration: Its number.
            describe: Called by the first rank with the unfinished folder: adds config.json, the tokenizer's files and
                how far the run has come.

        Raises:
            TrainerError: A rank could not write its part.
        """
        assert self._pending is None, "finish the checkpoint before"
        unfinished = self._run.unfinished(iteration)
        if self._first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self._barrier()
        if not unfinished.is_dir():
            raise TrainerError(
                f"{unfinished} is not there for every rank: --output-dir must lie on a file system that all machines "
                "share"
            )
        self._pending = (iteration, self._engine.write(unfinished, in_background=self._in_background))
        if self._first:
            with _named(unfinished):
                describe(unfinished)

    def finish(self, *, wait: bool) -> Path | None:
        """The folder of the checkpoint that has just become whole; None where none is due, or not yet (`wait` waits).

        It appears under its name by one rename, after every rank has written its files and a manifest has their hashes.

        Raises:
            TrainerError: A rank could not write its part.
        """
        if self._pending is None:
            return None
        iteration, writing = self._pending
        final = self._run.checkpoint(iteration)
        if not writing.finished(wait=wait):
            return None
        self._pending = None
        self._barrier()
        if self._first:
            with _named(final):
                _commit(self._run, iteration)
            forget_old(self._run, self._keep_last)
        self._barrier()
        return final


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Errors of the system with the folder in them.

    Raises:
        TrainerError: In their place.
    """
    try:
        yield
    except OSError as error:
        raise TrainerError(f"rank 0 could not write its part of {folder}: {error.strerror or error}") from error


def _commit(run: Run, iteration: int) -> None:
    unfinished = run.unfinished(iteration)
    write_manifest(unfinished)
    for path in (*unfinished.rglob("*"), unfinished):
        sync(path)
    unfinished.rename(run.checkpoint(iteration))
    sync(run.checkpoints)
    replace_text(run.tracker, str(iteration))


def forget_old(run: Run, keep_last: int) -> None:
    """Deletes all checkpoints but the last `keep_last`; none where that is 0."""
    for iteration in run.iterations()[:-keep_last] if keep_last else ():
        aside = run.checkpoint(iteration).rename(run.unfinished(iteration))  # never half of one under its name
        shutil.rmtree(aside)
