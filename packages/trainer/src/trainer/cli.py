"""The `trainer` console script: its verbs, and nothing of what they do."""

import json as jsonlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from ckpt_tools import commandline

from trainer import launch
from trainer.config import TrainConfig
from trainer.config_file import Options, options_of_run, partial_default, read_yaml, without_restated_flags
from trainer.errors import ConfigError, TrainerError

Runs = Annotated[list[Path], tyro.conf.Positional]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `trainer VERB ...`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if launch.is_rank():
        launch.end_with_parent()
    try:
        given = _options_of_config_file(arguments)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for verb in (pretrain, finetune, describe):  # what --config says is what the flags default to
        needless = _NEEDLESS_TO_DESCRIBE if verb is describe else {}
        verb.__kwdefaults__ = {**(verb.__kwdefaults__ or {}), "options": partial_default({**needless, **given})}
    commands: dict[str, Callable[..., int]] = {
        "pretrain": pretrain,
        "finetune": finetune,
        "describe": describe,
        "report": report,
    }
    summary = "Pretrains and fine-tunes LLaMA-2 on megatron-core."
    return commandline.run("trainer", summary, commands, without_restated_flags(arguments, partial_default(given)))


_NEEDLESS_TO_DESCRIBE = {"data_path": (Path("-"),), "output_dir": Path("-")}
"""Options that a run must have and its description makes no use of."""


def _options_of_config_file(arguments: Sequence[str]) -> dict[str, Any]:
    """What the file of `--config` says, or the run of `--resume`, read before the flags are."""
    if config := _value_of("--config", arguments):
        return read_yaml(Path(config))
    if resume := _value_of("--resume", arguments):
        return options_of_run(Path(resume), _value_of("--mode", arguments))
    return {}


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    for at, argument in enumerate(arguments):
        if argument == flag and at + 1 < len(arguments):
            return arguments[at + 1]
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None


def pretrain(*, options: Options, config: Path | None = None, dry_run: bool = False, json: bool = False) -> int:
    """Trains on a text data set, with the loss of every token.

    Args:
        options: The run's options.
        config: YAML file of options; a flag wins over it.
        dry_run: Show what `trainer describe` shows, and start and write nothing.
        json: Print the result as JSON.
    """
    return _show(options, json) if dry_run else _run_job(options, "pretrain", json)


def finetune(*, options: Options, config: Path | None = None, dry_run: bool = False, json: bool = False) -> int:
    """Trains on an instruction data set (data-prep's `_packed_` files), with the loss of the answers' tokens.

    Args:
        options: The run's options.
        config: YAML file of options; a flag wins over it.
        dry_run: Show what `trainer describe` shows, and start and write nothing.
        json: Print the result as JSON.
    """
    return _show(options, json) if dry_run else _run_job(options, "finetune", json)


def _run_job(options: TrainConfig, kind: Literal["pretrain", "finetune"], json: bool) -> int:
    """Trains in this process, or starts the processes that do and waits for them."""
    if options.nproc_per_node > 1 and not launch.is_rank():
        _check_before_start(options, kind)
        return launch.start(sys.argv[1:], options.nproc_per_node)
    from trainer import lost
    from trainer import report as reports
    from trainer.loop import train

    with lost.named(options):
        run = train(options, kind)
    if launch.is_first_rank():
        _print_runs([reports.summary(run)], json)
    return 0


def _check_before_start(options: TrainConfig, kind: str) -> None:
    """Refuses without torch, before any process is started, what can be refused so early."""
    from trainer import output
    from trainer.start import begin, check_processes

    check_processes(options, options.nproc_per_node)
    with begin(options, kind):
        output.check_output(options)


def describe(
    *,
    options: Options,
    config: Path | None = None,
    device: str | None = None,
    nnodes: int = 1,
    json: bool = False,
) -> int:
    """Shows what a run would be, and starts nothing: layout, memory of each rank, communication, FLOPs.

    Args:
        options: The run's options; the data and the output may be left out.
        config: YAML file of options; a flag wins over it.
        device: A chip as its driver names it ("NVIDIA H100 80GB HBM3", "Ascend910B3"): adds how long a step takes at
            its peak, and whether a rank fits its memory.
        nnodes: Machines, each with `nproc_per_node` processes.
        json: Print it as JSON.
    """
    if nnodes < 1:
        raise ConfigError(f"--nnodes {nnodes} must be at least 1")
    return _show(options, json, nnodes, device)


def _show(options: TrainConfig, json: bool, nnodes: int = 1, device: str | None = None) -> int:
    """Prints the description of a run, once."""
    from trainer import description
    from trainer.describe import describe as figures_of

    if launch.is_first_rank():
        figures = figures_of(options, launch.world_size(nnodes * options.nproc_per_node), device)
        print(jsonlib.dumps(figures) if json else description.text(figures))
    return 0


def report(*, runs: Runs, json: bool = False) -> int:
    """Prints the runs' figures and draws each one's loss curve as RUN/loss-curve.png.

    Args:
        runs: Run folders.
        json: Print the figures as JSON.
    """
    from trainer import report as reports
    from trainer.run import open_run

    if not runs:
        raise ConfigError("name at least one run's folder")
    opened = [open_run(path) for path in runs]
    rows = [reports.summary(run) for run in opened]
    for run, row in zip(opened, rows, strict=True):
        picture = run.path / "loss-curve.png"
        reports.plot(run, picture)
        row["loss_curve"] = str(picture)
    _print_runs(rows, json)
    return 0


def _print_runs(rows: list[dict[str, Any]], as_json: bool) -> None:
    from trainer import report as reports

    print(jsonlib.dumps({"runs": rows}) if as_json else reports.table(rows))
