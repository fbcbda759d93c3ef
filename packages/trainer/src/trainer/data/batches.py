"""Samples, and the micro-batches that they become.

b samples of a micro-batch, s tokens of a sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from trainer.errors import TrainerError

IGNORED = -100
"""The label of a position that carries no loss: PyTorch's and Hugging Face's ignore index."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a data set.

    Attributes:
        tokens: int64 [s].
        labels: int64 [s], already shifted: the label at a position is the token that follows it; `IGNORED`: no loss.
        lengths: Tokens of each document or part of one in it, in their order; they add up to s.
    """

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]


class Samples(Protocol):
    """What training asks of a data set."""

    @property
    def reset_attention_mask(self) -> bool:
        """Whether documents of a sample do not see each other."""

    @property
    def reset_position_ids(self) -> bool:
        """Whether positions count from the beginning of each document, instead of each sample."""

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`, from 0."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one process, on the CPU.

    Samples are rows. Where documents do not see each other, all samples stand one after another in a single row
    instead, and `cu_seqlens` says where in it each document begins: no mask of s x s is ever made.

    Attributes:
        tokens: int64 [b, s], or [1, b * s] with `cu_seqlens`.
        labels: int64, shaped as `tokens`, and shifted as a sample's.
        position_ids: int64, shaped as `tokens`; None where every row counts from 0.
        cu_seqlens: int32 [documents + 1], from 0 to b * s; every sample's beginning is among them.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def loss_tokens(self) -> Tensor:
        """Positions that carry loss: an int64 scalar tensor, still on the batch's device."""
        return (self.labels != IGNORED).sum()


def batch_of(samples: Sequence[Sample], *, reset_attention_mask: bool, reset_position_ids: bool) -> Batch:
    """The micro-batch of samples of one length; see `Samples` for the two options."""
    tokens = torch.stack([sample.tokens for sample in samples])
    labels = torch.stack([sample.labels for sample in samples])
    if not reset_attention_mask and not reset_position_ids:
        return Batch(tokens, labels)
    documents = [length for sample in samples for length in sample.lengths]
    counts = documents if reset_position_ids else [tokens.shape[1]] * len(samples)
    position_ids = torch.cat([torch.arange(count) for count in counts])
    if not reset_attention_mask:
        return Batch(tokens, labels, position_ids.view_as(tokens))
    cu_seqlens = torch.tensor([0, *accumulate(documents)], dtype=torch.int32)
    return Batch(tokens.view(1, -1), labels.view(1, -1), position_ids.view(1, -1), cu_seqlens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Deals the samples of a step to the data-parallel ranks: cut into micro-batches in order, given out in turn.

    It remembers nothing: what a step reads follows from the number of samples before it.
    """

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
            batch = batch_of(
                [self.samples[index] for index in range(begin, begin + self.micro_batch_size)],
                reset_attention_mask=self.samples.reset_attention_mask,
                reset_position_ids=self.samples.reset_position_ids,
            )
            if (stranger := _stranger(batch, self.vocab_size)) is not None:
                raise TrainerError(
                    f"{sample_numbers(begin, self.micro_batch_size)} hold the token id {stranger}, but the model's "
                    f"vocabulary has {self.vocab_size} entries: was the data made with its tokenizer?"
                )
            yield batch

    def names(self, first: int) -> str:
        """The numbers of the samples of the step that begins at `first`, over all ranks, for a message."""
        return sample_numbers(first, self.num_microbatches * self.dp_size * self.micro_batch_size)


def sample_numbers(first: int, count: int) -> str:
    """`count` samples from number `first` on, for a message."""
    return f"sample {first}" if count == 1 else f"samples {first} to {first + count - 1}"


def _stranger(batch: Batch, vocab_size: int) -> int | None:
    """A token id of `batch` that is none of the vocabulary; None where there is none."""
    bounds = [*batch.tokens.aminmax(), *batch.labels.aminmax()]
    smallest, largest, smallest_label, largest_label = (int(bound) for bound in bounds)
    if max(largest, largest_label) >= vocab_size:
        return max(largest, largest_label)
    if smallest < 0:
        return smallest
    if smallest_label < 0:  # most often IGNORED, and nothing else
        strange = batch.labels[(batch.labels < 0) & (batch.labels != IGNORED)]
        return int(strange[0]) if len(strange) else None
    return None
