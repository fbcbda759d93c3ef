"""What a run begins from: weights of any format, fresh ones, or another run's checkpoint. Reads no tensor."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckpt_tools import Checkpoint, LlamaConfig, open_checkpoint, tokenizer_files
from data_prep import Tokenizer

from trainer import deepspeed_options
from trainer.config import TrainConfig
from trainer.errors import TrainerError
from trainer.progress import Progress, check_same_run
from trainer.run import locate


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The architecture and the tokenizer of a run, and where its first weights come from."""

    path: Path
    """The folder or file that says so."""
    model: LlamaConfig
    tokenizer: dict[str, bytes]
    """The tokenizer's files by name. (Where they lie may be deleted during the run: an old checkpoint of it.)"""
    vocab_sha256: str | None
    """Fingerprint of the vocabulary, where a tokenizer is there."""
    checkpoint: Checkpoint | None = None
    """Weights to load before the optimizer is made; None where they are fresh, or the engine's own files of the run
    that is resumed, which it reads itself."""
    progress: Progress | None = None
    """How far the run that is resumed has come."""


@contextmanager
def begin(config: TrainConfig, kind: str) -> Iterator[Start]:
    """What the run of `config` begins from, its files open.

    Raises:
        CheckpointError: There is no such model, or it is broken.
        TrainerError: There is nothing to resume from.
        ConfigError: The options do not fit the model, or the run to be resumed.
    """
    if config.resume is None and config.load_weights is None:
        start = _fresh(config)
        config.check_model(start.model)
        yield start
        return
    folder = _latest(config.resume) if config.resume else config.load_weights
    assert folder is not None
    with open_checkpoint(folder) as checkpoint:
        progress = Progress.read(folder) if config.resume else None
        if progress is not None:
            check_same_run(config, kind, progress, folder)
        config.check_model(checkpoint.config)
        yield Start(
            path=folder,
            model=checkpoint.config,
            **_tokenizer(folder, checkpoint.tokenizer_files),
            checkpoint=None if progress and _reads_itself(config, checkpoint) else checkpoint,
            progress=progress,
        )


def check_processes(config: TrainConfig, world_size: int, device_type: str | None = None) -> None:
    """Refuses what so many processes cannot do; on this device, once that is known.

    Raises:
        ConfigError: The batches do not divide, or DeepSpeed does not do it.
    """
    config.num_microbatches(world_size)
    if config.mode == "zero":
        deepspeed_options.check(config, world_size, device_type)


def _reads_itself(config: TrainConfig, checkpoint: Checkpoint) -> bool:
    """Whether the engine reads the weights with the optimizer's state."""
    return config.mode == "ptd" and checkpoint.format == "torch_dist"


def _fresh(config: TrainConfig) -> Start:
    path = config.model_config
    assert path is not None
    model = LlamaConfig.from_hf(path)
    if config.init_method_std is not None:
        model = replace(model, init_method_std=config.init_method_std)
    folder = path if path.is_dir() else path.parent
    return Start(path=path, model=model, **_tokenizer(folder, tokenizer_files(folder)))


def _tokenizer(folder: Path, files: Iterable[Path]) -> dict[str, Any]:
    """What a `Start` says of the tokenizer."""
    content = {file.name: file.read_bytes() for file in files}
    return {"tokenizer": content, "vocab_sha256": Tokenizer.find(folder).vocab_sha256 if content else None}


def _latest(path: Path) -> Path:
    """The checkpoint to resume from.

    Raises:
        TrainerError: There is none: a run is never started afresh in silence.
    """
    _, checkpoint = locate(path)
    if checkpoint is None:
        raise TrainerError(f"{path} has no finished checkpoint to resume from (--resume)")
    return checkpoint
