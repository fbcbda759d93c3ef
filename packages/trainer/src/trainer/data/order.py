"""What fixes the order of a run's samples. A checkpoint keeps it, so that a resumed run goes on in the same order, or
says why it cannot.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from data_prep import IndexedDataset, read_manifest

from trainer.errors import ConfigError, TrainerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Samples of one data set that were put in order together, which for megatron-core depends on their number."""

    asked: int
    """Samples that were asked for."""
    length: int
    """Samples that it holds: whole epochs, so mostly more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One pair of files, `.bin` and `.idx`, as the order depends on it."""

    name: str
    """The last part of its prefix, for messages: data may be moved and renamed."""
    weight: float
    """Its share of the samples."""
    sequences: int
    tokens: int
    idx_sha256: str
    bin_sha256: str | None
    """As data-prep's manifest has it; None for foreign data."""
    segments: tuple[Segment, ...] = ()
    """Segment number n is shuffled by the seed + n. None of instruction data, whose order no number changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOrder:
    """What fixes which sample has which number, of the training samples of one run."""

    kind: str
    """ "pretrain" or "finetune"."""
    seed: int
    seq_length: int
    split: str | None
    """Pretraining only."""
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    sources: tuple[Source, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataOrder":
        """The order that `to_dict` wrote.

        Raises:
            TrainerError: The values are none.
        """
        try:
            sources = [
                Source(**source | {"segments": tuple(Segment(**each) for each in source["segments"])})
                for source in values["sources"]
            ]
            return cls(**{**values, "sources": tuple(sources)})
        except (AttributeError, KeyError, TypeError) as error:
            raise TrainerError(f"the checkpoint's order of the data is broken: {error}") from None

    def check(self, now: "DataOrder") -> None:
        """Compares this order, of a run that is to go on, with what the options and the data say now.

        Raises:
            ConfigError: The samples would be others; the message names the first thing that differs, both values.
        """
        for what, before, after in self._differences(now):
            if before != after:
                raise ConfigError(
                    f"the run to resume read its data by {what} {before}, not {after}: the order of its samples would "
                    "be another. Give it the same again, or start a new run with --load-weights"
                )

    def _differences(self, now: "DataOrder") -> Iterator[tuple[str, Any, Any]]:
        """What the order depends on: a name, the value here, the value there."""
        yield "the command", self.kind, now.kind
        yield "--seed", self.seed, now.seed
        yield "--seq-length", self.seq_length, now.seq_length
        yield "--split", self.split, now.split
        yield "--reset-attention-mask", self.reset_attention_mask, now.reset_attention_mask
        yield "--reset-position-ids", self.reset_position_ids, now.reset_position_ids
        yield "a --data-path of this many sets:", len(self.sources), len(now.sources)
        for before, after in zip(self.sources, now.sources, strict=True):
            name = before.name if before.name == after.name else f"{before.name} (now {after.name})"
            yield f"{name} with the weight", before.weight, after.weight
            yield f"{name} with sequences:", before.sequences, after.sequences
            yield f"{name} with tokens:", before.tokens, after.tokens
            yield f"{name} with an .idx of sha256", before.idx_sha256[:12], after.idx_sha256[:12]
            if before.bin_sha256 and after.bin_sha256:
                yield f"{name} with a .bin of sha256", before.bin_sha256[:12], after.bin_sha256[:12]


def source(prefix: Path, weight: float) -> Source:
    """The facts of the pair of files under the full prefix `prefix`.

    Raises:
        DataError: The files are broken.
    """
    lengths, manifest = IndexedDataset(prefix).sequence_lengths, read_manifest(prefix)
    return Source(
        name=prefix.name,
        weight=weight,
        sequences=len(lengths),
        tokens=int(lengths.sum(dtype=np.int64)),
        idx_sha256=_sha256(prefix.with_name(f"{prefix.name}.idx")),
        bin_sha256=manifest.bin_sha256 if manifest else None,
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
