"""Writing a run's folder so that a kill at any moment leaves complete checkpoints and a tracker that names one."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.errors import ConfigError
from trainer.run import Run

BARRIER = Callable[[], None]


def check_output(run: Run, overwrite: bool, reads: Sequence[Path]) -> None:
    """Refuses a target that exists, and, whatever `overwrite` says, one that is no run or holds what the run `reads`.

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
    for path in reads:
        if path.resolve().is_relative_to(run.path.resolve()):
            raise ConfigError(f"{path} lies in {run.path}, which the run would replace: choose another --output-dir")


def replaced(run: Run) -> Path:
    """Where the run that this one replaces waits until this one has a checkpoint."""
    home = run.path.resolve()
    return home.with_name(f"{home.name}.replaced")


def create(run: Run) -> None:
    """An empty run folder. What `check_output` allowed to be replaced is moved aside; see `forget_replaced`."""
    home, aside = Run(run.path.resolve()), replaced(run)  # a link stays a link
    if aside.exists() and home.path.exists():  # a run that replaced another ended early, or is ours to replace too
        shutil.rmtree(aside if home.tracker.exists() else home.path)
    if home.path.exists() and any(home.path.iterdir()):
        home.path.rename(aside)
    home.checkpoints.mkdir(parents=True)


def forget_replaced(run: Run) -> None:
    """Deletes the run that this one replaced: to be called once this one has a checkpoint."""
    shutil.rmtree(replaced(run), ignore_errors=True)


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
