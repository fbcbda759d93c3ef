"""Fine-tuning: rows of the `_packed_` files that data-prep's instruction handlers write, or upstream's."""

from pathlib import Path

import numpy as np
import torch
from data_prep import IndexedDataset

from trainer.config import TrainConfig
from trainer.data.batches import IGNORED, Sample
from trainer.data.checks import instruction_files
from trainer.data.order import DataOrder, source
from trainer.errors import TrainerError


class InstructionSamples:
    """One row a sample, padded to `seq_length`, the loss where the labels of the data set have it.

    A row is one conversation, or several packed ones, which its attention mask numbers. Then documents do not see each
    other, positions count from the beginning of each, no label crosses from one into the next, and padding is a
    document of its own. Whether a data set is packed says its mask: rows of nothing but ones are one document each.

    Sample number i is row `order[i mod rows]` of epoch `i div rows`, each epoch shuffled by (seed, epoch).
    """

    def __init__(self, prefix: Path, seq_length: int, pad_token_id: int, seed: int) -> None:
        files = instruction_files(prefix)
        self._ids, self._labels = IndexedDataset(files["input_ids"]), IndexedDataset(files["labels"])
        _check_rows(prefix, "labels", self._ids, self._labels)
        self._mask = None
        if "attention_mask" in files and _is_packed(mask := IndexedDataset(files["attention_mask"])):
            _check_rows(prefix, "attention_mask", self._ids, mask)
            self._mask = mask
        if not len(self._ids):
            raise TrainerError(f"{prefix}: the data set is empty")
        self._seq_length, self._pad, self._seed = seq_length, pad_token_id, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def reset_attention_mask(self) -> bool:
        """True of packed rows."""
        return self._mask is not None

    @property
    def reset_position_ids(self) -> bool:
        """True of packed rows."""
        return self._mask is not None

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def num_cut(self) -> int:
        """Rows that lose their end to `seq_length`; the last token of a row is only ever a label."""
        return int((np.asarray(self._ids.sequence_lengths) > self._seq_length + 1).sum())

    def __getitem__(self, index: int) -> Sample:
        row = self._row(index)
        length = max(min(len(self._ids[row]) - 1, self._seq_length), 0)
        tokens = np.full(self._seq_length, self._pad, np.int64)
        labels = np.full(self._seq_length, IGNORED, np.int64)
        tokens[:length] = self._ids[row][:length]
        labels[:length] = self._labels[row][1 : length + 1]
        lengths: tuple[int, ...] = (self._seq_length,)
        if self._mask is not None:
            numbers = self._mask[row][: length + 1]
            ends = np.flatnonzero(numbers[1:] != numbers[:-1]) + 1  # where documents end that others follow
            labels[ends - 1] = IGNORED
            bounds = np.unique([0, *ends, length, self._seq_length])
            lengths = tuple(np.diff(bounds).tolist())
        return Sample(torch.from_numpy(tokens), torch.from_numpy(labels), lengths)

    def _row(self, index: int) -> int:
        epoch, at = divmod(index, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self))
        return int(self._order[at])


def instruction_samples(
    config: TrainConfig, *, pad_token_id: int, order: DataOrder | None = None
) -> tuple[InstructionSamples, DataOrder]:
    """Samples without end, and their order.

    Args:
        config: The options.
        pad_token_id: Fills rows up; it carries no loss.
        order: Of the run to go on from.

    Raises:
        ConfigError: The options and the data are not those of `order`.
        TrainerError: The data set's files do not fit each other.
    """
    [(_, prefix)] = config.blend
    now = DataOrder(
        kind="finetune",
        seed=config.seed,
        seq_length=config.seq_length,
        split=None,
        sources=tuple(source(file, 1.0) for file in instruction_files(prefix).values()),
    )
    if order is not None:
        order.check(now)
    return InstructionSamples(prefix, config.seq_length, pad_token_id, config.seed), now


def _check_rows(prefix: Path, key: str, ids: IndexedDataset, others: IndexedDataset) -> None:
    if len(ids) != len(others):
        raise TrainerError(f"{prefix}: {len(ids)} rows of input_ids but {len(others)} of {key}")
    if (wrong := np.flatnonzero(ids.sequence_lengths != others.sequence_lengths)).size:
        row = int(wrong[0])
        raise TrainerError(f"{prefix}: row {row} has {len(ids[row])} input_ids but {len(others[row])} of {key}")


def _is_packed(mask: IndexedDataset) -> bool:
    """Whether any row has several documents: the first of them ends the search."""
    return any(bool((mask.span(begin, end) > 1).any()) for begin, end in mask.pieces())
