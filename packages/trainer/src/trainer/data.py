"""From data sets on disk to the micro-batches of a step. Which samples a step sees depends on the seed and on the
number of samples asked for alone, never on the layout: every tensor-parallel rank of a data-parallel group reads the
same ones.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from data_prep import IndexedDataset, read_manifest

from trainer.config import TrainConfig
from trainer.errors import ConfigError, TrainerError

IGNORED = -100
"""The label of a position that carries no loss: PyTorch's and Hugging Face's ignore index."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one process.

    `tokens` [b, s] int64, and `labels` [b, s] int64, already shifted by one (the label at a position is the token that
    follows it) and `IGNORED` where there is no loss.
    """

    tokens: torch.Tensor
    labels: torch.Tensor

    @property
    def loss_tokens(self) -> torch.Tensor:
        """Positions that carry loss: an int64 scalar tensor, still on the batch's device."""
        return (self.labels != IGNORED).sum()


class Samples(Protocol):
    """What training asks of a data set: a pair of (tokens [s], labels [s]) int64 arrays per sample number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Deals the samples of a step to the data-parallel ranks: cut into micro-batches in order, given out in turn."""

    samples: Samples
    vocab_size: int
    micro_batch_size: int
    num_microbatches: int
    dp_rank: int
    dp_size: int

    def step(self, first: int) -> Iterator[Batch]:
        """This rank's micro-batches of the step that begins at sample number `first`.

        Raises:
            TrainerError: A token id is not in the vocabulary. (A vocabulary-parallel embedding would read zeros there
                and say nothing.)
        """
        for number in range(self.num_microbatches):
            begin = first + (number * self.dp_size + self.dp_rank) * self.micro_batch_size
            pairs = [self.samples[index] for index in range(begin, begin + self.micro_batch_size)]
            batch = Batch(torch.stack([tokens for tokens, _ in pairs]), torch.stack([labels for _, labels in pairs]))
            largest = max(int(batch.tokens.max()), int(batch.labels.max()))
            if largest >= self.vocab_size:
                raise TrainerError(
                    f"sample {begin} or one of the {self.micro_batch_size - 1} after it holds the token id {largest}, "
                    f"but the model's vocabulary has {self.vocab_size} entries: was the data made with its tokenizer?"
                )
            yield batch


# --- pretraining --------------------------------------------------------------------------------------------


class _Special:
    """What megatron-core's datasets ask of a tokenizer: the id that ends a document, and an identity for the cache."""

    pad = -1  # no id: nothing in a pretraining sample is padding

    def __init__(self, eod: int, vocab_size: int) -> None:
        self.eod, self.vocab_size = eod, vocab_size
        self.unique_identifiers = {"class": "puna", "eod": eod}


class PretrainingSamples:
    """Samples of `seq_length` tokens cut from the concatenated, shuffled documents, by megatron-core's GPTDataset."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        item = self._dataset[index]
        return item["tokens"], item["labels"].masked_fill(item["loss_mask"] == 0, IGNORED)


def pretraining_samples(
    config: TrainConfig, *, vocab_size: int, eod_token_id: int, cache: Path
) -> tuple[PretrainingSamples, PretrainingSamples | None]:
    """Training and validation samples of `config.data_path`; validation is None where it is switched off.

    The index cache goes to `cache`, in the run's folder: the data may be read-only. Needs an initialised process group,
    whose rank 0 builds the cache for the others.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    num_train, num_valid = config.train_iters * config.global_batch_size, _num_valid(config)
    options = GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.seq_length,
        blend=([str(_pretraining_prefix(config.data_path))], None),
        split=config.split,
        path_to_cache=str(cache),
        tokenizer=_Special(eod_token_id, vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train_share, valid_share, _ = options.split_matrix
    options.split_matrix = [train_share, valid_share if num_valid else None, None]  # nothing reads the test share
    with _quiet():
        builder = BlendedMegatronDatasetBuilder(GPTDataset, [num_train, num_valid, 0], lambda: True, options)
        train, valid, _ = builder.build()
    return PretrainingSamples(train), None if valid is None else PretrainingSamples(valid)


def _num_valid(config: TrainConfig) -> int:
    """Validation samples of the whole run."""
    evaluations = config.train_iters // config.eval_interval + 1 if config.eval_interval else 1
    return evaluations * config.eval_iters * config.global_batch_size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps megatron-core's progress prints out of stdout, which is for results."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pretraining_prefix(path: Path) -> Path:
    """`P` means `P_text_document`, the data set of data-prep's default key."""
    if not path.with_name(path.name + ".idx").exists():
        full = path.with_name(path.name + "_text_document")
        if full.with_name(full.name + ".idx").exists():
            return full
    return path


# --- fine-tuning --------------------------------------------------------------------------------------------


class InstructionSamples:
    """One conversation a sample, padded to `seq_length`, the loss where the labels of the `_packed_` data set have it.

    Sample number i is row `order[i mod rows]` of epoch `i div rows`, each epoch shuffled by (seed, epoch).
    """

    def __init__(self, prefix: Path, seq_length: int, pad_token_id: int, seed: int) -> None:
        self._ids = IndexedDataset(f"{prefix}_packed_input_ids_document")
        self._labels = IndexedDataset(f"{prefix}_packed_labels_document")
        if len(self._ids) != len(self._labels):
            raise TrainerError(f"{prefix}: {len(self._ids)} rows of input_ids but {len(self._labels)} of labels")
        if not len(self._ids):
            raise TrainerError(f"{prefix}: the data set is empty")
        self._seq_length, self._pad, self._seed = seq_length, pad_token_id, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def num_cut(self) -> int:
        """Rows that lose their end to `seq_length`; the last token of a row is only ever a label."""
        return int((np.asarray(self._ids.sequence_lengths) > self._seq_length + 1).sum())

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = self._row(index)
        ids = torch.from_numpy(np.asarray(self._ids[row], np.int64))
        follows = torch.from_numpy(np.asarray(self._labels[row], np.int64))[1:]
        tokens = torch.full((self._seq_length,), self._pad)
        labels = torch.full((self._seq_length,), IGNORED)
        length = min(len(ids) - 1, self._seq_length)
        tokens[:length], labels[:length] = ids[:length], follows[:length]
        return tokens, labels

    def _row(self, index: int) -> int:
        epoch, at = divmod(index, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self))
        return int(self._order[at])


# --- what can be checked before anything is built -----------------------------------------------------------------


def data_files(config: TrainConfig, kind: str) -> list[Path]:
    """The prefixes that a run of `kind` ("pretrain" or "finetune") reads.

    Raises:
        ConfigError: One of their files is missing; the message names it and says how to make it.
    """
    if kind == "finetune":
        names = [config.data_path.name + f"_packed_{key}_document" for key in ("input_ids", "labels")]
        prefixes = [config.data_path.with_name(name) for name in names]
        fix = "data-prep run --handler-name GeneralInstructionHandler"
    else:
        prefixes, fix = [_pretraining_prefix(config.data_path)], "data-prep run"
    for prefix in prefixes:
        for suffix in (".idx", ".bin"):
            if not (file := prefix.with_name(prefix.name + suffix)).exists():
                raise ConfigError(f"no such data set: {file} (--data-path {config.data_path}; make it with `{fix}`)")
    return prefixes


def check_split(config: TrainConfig, prefix: Path) -> None:
    """Refuses a share of the text data set `prefix` without a token: megatron-core would count its epochs for ever.

    Raises:
        ConfigError: Training, or validation where it is asked for, would read such a share.
    """
    lengths = IndexedDataset(prefix).sequence_lengths
    shares = np.array(config.split.split(","), float)
    train, valid, _ = (round(border * len(lengths)) for border in np.cumsum(shares / shares.sum()))  # as megatron-core
    if not lengths[:train].any():
        kind, way_out = "training", "give it a larger share"
    elif shares[1] and _num_valid(config) and not lengths[train:valid].any():
        kind, way_out = "validation", "give it a larger share, or 0 and no validation"
    else:
        return
    raise ConfigError(
        f"--split {config.split} leaves no text for {kind} of the {len(lengths)} documents of {prefix}: {way_out}"
    )


def check_vocabulary(prefix: Path, vocab_size: int, vocab_sha256: str | None) -> str | None:
    """Refuses a data set whose vocabulary differs from the model's; where one side names none, the warning to show.

    Raises:
        ConfigError: The fingerprints (`vocab_sha256` of data-prep's manifest) differ; both are named.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return f"{prefix} has no manifest (foreign data): its vocabulary cannot be compared with the model's"
    if vocab_sha256 is None:
        return f"the model has no tokenizer files: the vocabulary of {prefix} cannot be compared with the model's"
    if manifest.vocab_sha256 != vocab_sha256:
        raise ConfigError(
            f"the data set {prefix} was made with another vocabulary ({manifest.vocab_size} pieces, sha256 "
            f"{manifest.vocab_sha256[:12]}) than the model's ({vocab_size} rows, sha256 {vocab_sha256[:12]}): "
            "tokenize it with the model's own tokenizer"
        )
    return None
