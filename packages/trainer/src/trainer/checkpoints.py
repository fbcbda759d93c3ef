"""Writing a run's folder so that a kill at any moment leaves complete checkpoints and a tracker that names one."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.errors import ConfigError
from trainer.run import Run

BARRIER = Callable[[], None]


def check_output(run: Run, overwrite: bool) -> None:
    """Refuses a target that exists, and one that is no run's folder whatever `overwrite` says.

    Raises:
        ConfigError: Naming the folder and the way out.
    """
    if not run.path.exists():
        return
    if not run.path.is_dir():
        raise ConfigError(f"{run.path} is a file: choose another --output-dir")
    if not any(run.path.iterdir()):
        return
    if not run.config_file.exists():
        raise ConfigError(f"{run.path} exists and is no training run: choose another --output-dir")
    if not overwrite:
        raise ConfigError(f"{run.path} holds a run: give --overwrite to replace it, or choose another --output-dir")


def create(run: Run) -> None:
    """An empty run folder. What `check_output` allowed to be replaced is moved aside first, then deleted."""
    if run.path.exists():
        aside = run.path.with_name(f".{run.path.name}.replaced-{os.getpid()}")
        run.path.rename(aside)
        shutil.rmtree(aside)
    run.checkpoints.mkdir(parents=True)


def commit(
    run: Run,
    iteration: int,
    write: Callable[[Path], None],
    extras: Callable[[Path], None],
    *,
    is_first_rank: bool,
    barrier: BARRIER,
) -> Path:
    """The folder of a checkpoint that all ranks have written: it appears under its name by one rename, then the tracker
    names it.

    Args:
        run: Whose checkpoint it is.
        iteration: Its number.
        write: Called by every rank with the unfinished folder.
        extras: Called by the first rank after every rank is done: config.json and the tokenizer's files.
        is_first_rank: Whether this rank makes and renames the folder.
        barrier: Waits for all ranks.
    """
    final = run.checkpoint(iteration)
    unfinished = run.checkpoints / f".{final.name}.unfinished"
    if is_first_rank:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    barrier()
    write(unfinished)
    barrier()
    if is_first_rank:
        extras(unfinished)
        _sync_tree(unfinished)
        unfinished.rename(final)
        _sync(run.checkpoints)
        replace_text(run.tracker, str(iteration))
    barrier()
    return final


def copy_files(files: Sequence[Path], folder: Path) -> None:
    """Copies the tokenizer's files beside the weights, so that the checkpoint is a whole MODEL."""
    for file in files:
        shutil.copyfile(file, folder / file.name)


def replace_text(path: Path, text: str) -> None:
    """`path` holds `text`: the old content or the new at any moment."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, "utf-8")
    _sync(part)
    part.replace(path)
    _sync(path.parent)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
