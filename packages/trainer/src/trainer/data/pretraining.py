"""Pretraining: samples of megatron-core's GPTDataset, blended by its BlendedDataset, in an order that a run keeps.

megatron-core puts samples in order by the seed and by *how many are asked for*: where more epochs are needed, all of
them are shuffled anew. So a data set here is a chain of segments, each a GPTDataset of its own: the first is built for
what the run asks at its beginning, and where a resumed run needs more than it holds, another one is put behind it. The
first samples stay what they were.
"""

import bisect
import contextlib
import dataclasses
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import TrainConfig
from trainer.data.batches import Sample
from trainer.data.checks import num_valid, pretraining_prefix
from trainer.data.order import DataOrder, Segment, source
from trainer.errors import ConfigError


class PretrainingSamples:
    """Samples of `seq_length` tokens cut from shuffled documents that follow one another.

    A document is what the data set's index calls a sequence: megatron-core shuffles these. Where one ends says the
    index, never a token. As in Megatron, the label of a document's last token is the first one of the document that
    follows, and carries loss, whether documents see each other or not.
    """

    def __init__(self, chains: Sequence["_Chain"], blend: Any, config: TrainConfig) -> None:
        self._chains, self._blend = chains, blend
        self.reset_attention_mask, self.reset_position_ids = config.reset_attention_mask, config.reset_position_ids

    @property
    def segments(self) -> list[tuple[Segment, ...]]:
        """Of each data set."""
        return [chain.segments for chain in self._chains]

    def __len__(self) -> int:
        return len(self._chains[0] if self._blend is None else self._blend)

    def __getitem__(self, index: int) -> Sample:
        chain = self._chains[0]
        if self._blend is not None:
            chain = self._chains[self._blend.dataset_index[index]]
            index = int(self._blend.dataset_sample_index[index])
        dataset, index = chain.find(index)
        item = dataset[index]
        return Sample(item["tokens"], item["labels"], _document_lengths(dataset, index))


def pretraining_samples(
    config: TrainConfig,
    *,
    vocab_size: int,
    eod_token_id: int,
    cache: Path,
    order: DataOrder | None = None,
    num_samples: int | None = None,
) -> tuple[PretrainingSamples, PretrainingSamples | None, DataOrder]:
    """Training samples, validation samples, and the order of the training samples.

    Validation is None where it is switched off; it reads the same samples each time, which do not depend on
    `train_iters`. Needs an initialised process group, whose rank 0 builds the index cache for the others.

    Args:
        config: The options.
        vocab_size: Of the model.
        eod_token_id: What megatron-core is told to end a document; no sample depends on it.
        cache: Folder of the index cache, made if need be; the data may be read-only.
        order: Of the run to go on from: the samples that it had come first, as they were.
        num_samples: How many training samples are asked for: `train_iters` times `global_batch_size` unless given.

    Raises:
        ConfigError: The options and the data are not those of `order`.
    """
    if num_samples is None:
        num_samples = config.train_iters * config.global_batch_size
    blend = [(weight, pretraining_prefix(prefix)) for weight, prefix in config.blend]
    now = DataOrder(
        kind="pretrain",
        seed=config.seed,
        seq_length=config.seq_length,
        split=config.split,
        reset_attention_mask=config.reset_attention_mask,
        reset_position_ids=config.reset_position_ids,
        sources=tuple(source(prefix, weight) for weight, prefix in blend),
    )
    if order is not None:
        order.check(now)
    builder = _Builder(config, blend, _Special(eod_token_id, vocab_size), cache)
    before = [each.segments for each in (order or now).sources]
    train = builder.build(0, num_samples, before)
    valid = builder.build(1, num_valid(config), [()] * len(blend)) if num_valid(config) else None
    sources = [
        dataclasses.replace(each, segments=segments) for each, segments in zip(now.sources, train.segments, strict=True)
    ]
    return train, valid, dataclasses.replace(now, sources=tuple(sources))


class _Special:
    """What megatron-core's datasets ask of a tokenizer: the id that ends a document, and an identity for the cache."""

    pad = -(2**62)  # no id: nothing in a pretraining sample is padding, and broken ids must not pass for it

    def __init__(self, eod: int, vocab_size: int) -> None:
        self.eod, self.vocab_size = eod, vocab_size
        self.unique_identifiers = {"class": "puna", "eod": eod}


class _Chain:
    """The segments of one data set, one after another. A BlendedDataset takes it for a GPTDataset."""

    def __init__(self, datasets: Sequence[Any], asked: Sequence[int]) -> None:
        self.segments = tuple(
            Segment(asked=count, length=len(dataset)) for count, dataset in zip(asked, datasets, strict=True)
        )
        self.index_split = datasets[0].index_split
        self.unique_identifiers = [dataset.unique_identifiers for dataset in datasets]
        self._datasets = datasets
        self._begins = np.cumsum([0, *(segment.length for segment in self.segments)]).tolist()

    def __len__(self) -> int:
        return int(self._begins[-1])

    def find(self, index: int) -> tuple[Any, int]:
        """The GPTDataset that holds sample `index` of the chain, and the sample's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect.bisect_right(self._begins, index) - 1
        return self._datasets[number], index - self._begins[number]


@dataclass(frozen=True, slots=True)
class _Builder:
    """Builds megatron-core's datasets for one share of the documents after another."""

    config: TrainConfig
    blend: Sequence[tuple[float, Path]]
    special: _Special
    cache: Path

    def build(self, share: int, asked: int, before: Sequence[tuple[Segment, ...]]) -> PretrainingSamples:
        """At least `asked` samples of share number `share` of `--split`; the segments `before` come first."""
        from megatron.core.datasets.blended_dataset import BlendedDataset
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

        if len(self.blend) == 1:
            return PretrainingSamples([self._chain(self.blend[0][1], share, asked, before[0])], None, self.config)
        chains = [
            self._chain(prefix, share, _with_surplus(asked * weight), segments)
            for (weight, prefix), segments in zip(self.blend, before, strict=True)
        ]
        weights, prefixes = zip(*self.blend, strict=True)
        options = self._options(prefixes, list(weights), share, self.config.seed)
        with _quiet():
            # Which data set a sample is of follows from the weights and the samples before it, not from their number.
            blended = BlendedMegatronDatasetBuilder.build_generic_dataset(
                BlendedDataset, lambda: True, True, chains, list(weights), asked, options
            )
        return PretrainingSamples(chains, blended, self.config)

    def _chain(self, prefix: Path, share: int, asked: int, before: tuple[Segment, ...]) -> _Chain:
        counts = [segment.asked for segment in before]
        if (missing := asked - sum(segment.length for segment in before)) > 0:
            counts.append(missing)
        datasets = [self._dataset(prefix, share, count, number) for number, count in enumerate(counts)]
        chain = _Chain(datasets, counts)
        for number, (then, now) in enumerate(zip(before, chain.segments, strict=False)):
            if then.length != now.length:
                raise ConfigError(
                    f"segment {number} of {prefix.name} has {now.length} samples, but {then.length} in the run to "
                    "resume: was that made by another megatron-core? Start a new run with --load-weights"
                )
        return chain

    def _dataset(self, prefix: Path, share: int, asked: int, number: int) -> Any:
        """The GPTDataset of segment `number`."""
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset

        options = self._options([prefix], None, share, self.config.seed + number)
        sizes = [asked if place == share else 0 for place in range(3)]
        with _quiet():
            return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, options).build()[share]

    def _options(self, prefixes: Sequence[Path], weights: list[float] | None, share: int, seed: int) -> Any:
        from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

        options = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=self.config.seq_length,
            blend=([str(prefix) for prefix in prefixes], weights),
            split=self.config.split,
            path_to_cache=str(self.cache),
            tokenizer=self.special,
            reset_position_ids=False,  # by a token, which need not be there: see `_document_lengths`
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        options.split_matrix = [part if place == share else None for place, part in enumerate(options.split_matrix)]
        return options


def _with_surplus(samples: float) -> int:
    """As many of a data set as megatron-core's builder asks for a blend: its BlendedDataset takes up to one more."""
    return math.ceil(math.ceil(samples) * 1.005)


def _document_lengths(dataset: Any, index: int) -> tuple[int, ...]:
    """The tokens of each document in sample `index` of a GPTDataset, which reads on from where its first one begins.

    A sample's place is given by its first token and by the one behind its last, which is only a label here.
    """
    place = dataset.shuffle_index[index]
    (first, begin), (last, end) = dataset.sample_index[place : place + 2].tolist()
    lengths = dataset.dataset.sequence_lengths[dataset.document_index[first : last + 1]].tolist()
    lengths[-1] = end
    lengths[0] -= begin
    return tuple(length for length in lengths if length)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps megatron-core's progress prints out of stdout, which is for results."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
