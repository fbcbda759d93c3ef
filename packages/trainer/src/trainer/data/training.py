"""The data of one run of either kind: its samples, those of validation, and the order that a checkpoint keeps."""

from dataclasses import dataclass
from pathlib import Path

from ckpt_tools import LlamaConfig

from trainer.config import TrainConfig
from trainer.data.batches import Samples
from trainer.data.instruction import instruction_samples
from trainer.data.order import DataOrder
from trainer.data.pretraining import pretraining_samples
from trainer.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """What a run reads."""

    train: Samples
    valid: Samples | None
    """None where there is no validation."""
    order: DataOrder
    notes: tuple[str, ...]
    """What has to be said about it."""


def training_data(
    config: TrainConfig, kind: str, model: LlamaConfig, *, cache: Path, stored: DataOrder | None, num_samples: int
) -> TrainingData:
    """The data of a run of `kind` ("pretrain" or "finetune"). Needs an initialised process group.

    Args:
        config: The options.
        kind: Which of them count, and which files are read.
        model: Says which token ends a document.
        cache: Folder for the index cache.
        stored: The order of the run to go on from.
        num_samples: Training samples that the run reads in all, those before a checkpoint among them.

    Raises:
        ConfigError: No token that ends a document is known, or the data is not that of the run to go on from.
        TrainerError: The data set's files do not fit each other.
    """
    eod = config.eod_token_id if config.eod_token_id is not None else model.eos_token_id
    if eod is None:
        raise ConfigError("the model's config.json names no eos_token_id: give --eod-token-id")
    if kind == "pretrain":
        train, valid, order = pretraining_samples(
            config,
            vocab_size=model.vocab_size,
            eod_token_id=eod,
            cache=cache,
            order=stored,
            num_samples=num_samples,
        )
        return TrainingData(train=train, valid=valid, order=order, notes=())
    samples, order = instruction_samples(config, pad_token_id=eod, order=stored)
    cut = samples.num_cut
    notes = (f"{cut} of {len(samples)} rows are cut to --seq-length {config.seq_length}",) if cut else ()
    return TrainingData(train=samples, valid=None, order=order, notes=notes)
