"""The `trainer` console script: its verbs, and nothing of what they do."""

import json as jsonlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from ckpt_tools import commandline

from trainer import launch
from trainer.config import Options, TrainConfig, partial_default, read_yaml
from trainer.errors import ConfigError

Runs = Annotated[list[Path], tyro.conf.Positional]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `trainer VERB ...`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        default = partial_default(_options_of_config_file(arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return commandline.USAGE
    for verb in (pretrain, finetune, describe):  # what --config says is what the flags default to
        verb.__kwdefaults__ = {**(verb.__kwdefaults__ or {}), "options": default}
    commands: dict[str, Callable[..., int]] = {
        "pretrain": pretrain,
        "finetune": finetune,
        "describe": describe,
        "report": report,
    }
    return commandline.run("trainer", "Pretrains and fine-tunes LLaMA-2 on megatron-core.", commands, arguments)


def _options_of_config_file(arguments: Sequence[str]) -> dict[str, Any]:
    """What the file of `--config` says, read before the flags are."""
    for at, argument in enumerate(arguments):
        if argument == "--config" and at + 1 < len(arguments):
            return read_yaml(Path(arguments[at + 1]))
        if argument.startswith("--config="):
            return read_yaml(Path(argument.removeprefix("--config=")))
    return {}


def pretrain(*, options: Options, config: Path | None = None, json: bool = False) -> int:
    """Trains on a text data set, with the loss of every token.

    Args:
        options: The run's options.
        config: YAML file of options; a flag wins over it.
        json: Print the result as JSON.
    """
    return _run_job(options, "pretrain", json)


def finetune(*, options: Options, config: Path | None = None, json: bool = False) -> int:
    """Trains on an instruction data set (data-prep's `_packed_` files), with the loss of the answers' tokens.

    Args:
        options: The run's options.
        config: YAML file of options; a flag wins over it.
        json: Print the result as JSON.
    """
    return _run_job(options, "finetune", json)


def _run_job(options: TrainConfig, kind: Literal["pretrain", "finetune"], json: bool) -> int:
    """Trains in this process, or starts the processes that do and waits for them."""
    if options.nproc_per_node > 1 and not launch.is_rank():
        _check_before_start(options, kind)
        return launch.start(sys.argv[1:], options.nproc_per_node)
    from trainer import report as reports
    from trainer.loop import train

    run = train(options, kind)
    if launch.is_first_rank():
        _print_runs([reports.summary(run)], json)
    return 0


def _check_before_start(options: TrainConfig, kind: str) -> None:
    """Refuses without torch, before any process is started, what can be refused so early."""
    from ckpt_tools import open_checkpoint

    from trainer import checkpoints
    from trainer.run import Run

    options.num_microbatches(options.nproc_per_node)
    with open_checkpoint(options.load_weights) as checkpoint:
        options.check_model(checkpoint.config)
    checkpoints.check_output(Run(options.output_dir), options.overwrite, (options.load_weights, options.data_path))


def describe(*, options: Options, config: Path | None = None, json: bool = False) -> int:
    """Shows what a run would be, and starts nothing: parameters, layout, tokens.

    Args:
        options: The run's options.
        config: YAML file of options; a flag wins over it.
        json: Print it as JSON.
    """
    from trainer.describe import describe as figures_of

    figures = figures_of(options, launch.world_size(options.nproc_per_node))
    if json:
        print(jsonlib.dumps(figures))
        return 0
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:,}")
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
