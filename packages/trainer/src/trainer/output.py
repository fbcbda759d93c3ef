"""The run's folder before the first step: whether it may be written, made new, or gone on with in place."""

import fcntl
import json
import os
import shutil
import socket
from pathlib import Path
from typing import TextIO

from ckpt_tools.opening import looks_like_checkpoint

from trainer.config import TrainConfig
from trainer.config_file import read_yaml, write_yaml
from trainer.errors import ConfigError, TrainerError
from trainer.run import Run, locate, replace_text

LOCK = ".lock"
"""A file in a run's folder that the process which writes the run keeps locked."""

MARK = ".replaced"
"""An empty file in a run that waits to be deleted: nothing without it ever is."""

BEGINNINGS = ("load_weights", "model_config", "resume")
"""Options that say what a run began from: a run that goes on in place keeps its own."""


def goes_on_in_place(config: TrainConfig) -> bool:
    """Whether the run is resumed in its own folder."""
    if config.resume is None:
        return False
    run, _ = locate(config.resume)
    return run.path.resolve() == config.output_dir.resolve()


def check_output(config: TrainConfig) -> None:
    """Refuses a target that exists, and, whatever `overwrite` says, one that is no run or holds what the run reads.

    Raises:
        ConfigError: Naming the folder and the way out.
    """
    _check_export(config)
    run = Run(config.output_dir)
    if goes_on_in_place(config):
        _check_is_latest(config, run)
        return
    if not run.path.exists():
        return
    if not run.path.is_dir():
        raise ConfigError(f"{run.path} is a file: choose another --output-dir")
    if _is_empty(run.path):
        return
    if not run.config_file.exists():
        raise ConfigError(f"{run.path} exists and is no training run: choose another --output-dir")
    if not config.overwrite and _has_begun(run):
        raise ConfigError(
            f"{run.path} holds a run: give --resume {run.path} to go on with it, --overwrite to replace it, or choose "
            "another --output-dir"
        )
    for path in config.reads:
        if path.resolve().is_relative_to(run.path.resolve()):
            raise ConfigError(f"{path} lies in {run.path}, which the run would replace: choose another --output-dir")
    aside = replaced(run)
    if aside.exists() and not (aside / MARK).exists():
        raise ConfigError(f"{aside} is in the way: the run that is replaced would wait there; move it away")


def _check_export(config: TrainConfig) -> None:
    target = config.export_hf
    if target is None:
        return
    for path in (*config.reads, config.output_dir):
        if path.resolve().is_relative_to(target.resolve()):
            raise ConfigError(f"--export-hf {target} would replace {path}, which the run needs: choose another folder")
    if target.exists() and not config.overwrite and (target.is_file() or any(target.iterdir())):
        way_out = "choose another folder, give --overwrite to replace it, or --export-hf None"
        raise ConfigError(f"{target} (--export-hf) exists: {way_out}")
    if target.exists() and not looks_like_checkpoint(target):
        raise ConfigError(f"{target} (--export-hf) is no model's folder: choose another")


def _is_empty(folder: Path) -> bool:
    return all(path.name == LOCK for path in folder.iterdir())


def _has_begun(run: Run) -> bool:
    """Whether there is a step or a checkpoint to lose, here or in a run that waits to be replaced."""
    has_steps = run.metrics_file.exists() and run.metrics_file.stat().st_size > 0
    return has_steps or bool(run.iterations()) or replaced(run).exists()


def _check_is_latest(config: TrainConfig, run: Run) -> None:
    """Going on from an earlier checkpoint in place would leave later ones of another history."""
    latest = run.latest()
    assert config.resume is not None
    _, asked = locate(config.resume)
    if latest is not None and asked is not None and asked.resolve() != latest.resolve():
        raise ConfigError(
            f"{run.path} has a later checkpoint, {latest.name}: resume from that, or choose another --output-dir"
        )


def replaced(run: Run) -> Path:
    """Where the run that this one replaces waits until this one has a checkpoint."""
    home = run.path.resolve()
    return home.with_name(f"{home.name}.replaced")


def take(config: TrainConfig, iteration: int) -> TextIO:
    """Makes the run's folder, or goes on in it after `iteration`; holds it until what is returned is closed.

    Raises:
        ConfigError: As for `check_output`.
        TrainerError: Another process writes a run there.
    """
    run = Run(config.output_dir)
    before = lock(run) if run.path.is_dir() else None
    check_output(config)  # once more: what was free at the start may have been taken meanwhile
    if before is not None and goes_on_in_place(config):
        go_on(config, iteration)
        return before
    create(config)
    held = lock(run)
    if before is not None:
        before.close()
    return held


def lock(run: Run) -> TextIO:
    """Holds a run's folder for this process.

    Raises:
        TrainerError: Another process has it.
    """
    file = (run.path / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise TrainerError(f"{run.path} is being written by another run ({holder}): wait for it, or end it") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def create(config: TrainConfig) -> None:
    """The run's folder with its config.yaml. What `check_output` allowed to be replaced is moved aside; see
    `forget_replaced`.
    """
    run = Run(config.output_dir)
    home, aside = Run(run.path.resolve()), replaced(run)  # a link stays a link
    if aside.exists() and home.path.exists():  # a run that replaced another ended early, or is ours to replace too
        shutil.rmtree(aside if home.tracker.exists() else home.path)
    if home.path.exists() and not _is_empty(home.path):
        (home.path / MARK).touch()
        home.path.rename(aside)
    home.checkpoints.mkdir(parents=True)
    write_yaml(config, home.config_file)


def go_on(config: TrainConfig, iteration: int) -> None:
    """Takes the folder of the run that goes on in place. Records after `iteration` are of steps to be done again."""
    run = Run(config.output_dir)
    for leftover in run.checkpoints.glob(".iter_*.unfinished"):
        shutil.rmtree(leftover)
    if run.metrics_file.exists():
        kept = [json.dumps(line, allow_nan=False) + "\n" for line in run.metrics() if line["step"] <= iteration]
        replace_text(run.metrics_file, "".join(kept))
    began = {name: path for name, path in read_yaml(run.config_file).items() if name in BEGINNINGS}
    part = run.path / ".config.yaml.part"
    write_yaml(config, part, began={name: began.get(name) for name in BEGINNINGS})
    part.replace(run.config_file)
    replace_text(run.tracker, str(iteration))


def forget_replaced(run: Run) -> None:
    """Deletes the run that this one replaced: to be called once this one has a checkpoint."""
    if (replaced(run) / MARK).exists():
        shutil.rmtree(replaced(run), ignore_errors=True)
