"""Documents packed to a length: one after another, as many as fit, none of them cut."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_prep.indexed_writer import Block


@dataclass
class Packer:
    """Packs a stream of sequences; what it remembers of the open pack are two numbers, so that a run can be resumed.

    A pack of pretraining data is a document whose sequences are the packed ones. A pack of instruction data is one
    sequence, in whose attention mask each of the packed ones has its number, from 1 on (MindSpeed-LLM's neat packing).

    Attributes:
        seq_length: Tokens that fit. A longer sequence is a pack by itself.
        merge: Whether a pack is one sequence.
        open_tokens: Tokens of the pack that is not complete yet.
        open_count: Its sequences.
        too_long: Sequences that do not fit, so far.
    """

    seq_length: int
    merge: bool
    open_tokens: int = 0
    open_count: int = 0
    too_long: int = 0

    def pack(self, blocks: dict[str, Block]) -> dict[str, Block]:
        """The blocks with the bounds of the packs that are complete; their ids are all there."""
        first = next(iter(blocks.values()))
        sizes, numbers = self._bounds(first.lengths.tolist())
        if not self.merge:
            return {output: replace(block, documents=sizes[:, 0]) for output, block in blocks.items()}
        packed = {}
        for output, block in blocks.items():
            ids = np.repeat(numbers, first.lengths) if "_attention_mask_" in output else block.ids
            packed[output] = Block(ids, sizes[:, 1].astype(np.int32), np.ones(len(sizes), np.int64))
        return packed

    def _bounds(self, lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """[packs, 2] sequences and tokens of each pack that is complete, [sequences] the number of each in its pack."""
        complete: list[tuple[int, int]] = []
        numbers = []
        for length in lengths:
            if self.open_count and self.open_tokens + length > self.seq_length:
                complete.append((self.open_count, self.open_tokens))
                self.open_tokens = self.open_count = 0
            self.open_tokens += length
            self.open_count += 1
            self.too_long += length > self.seq_length
            numbers.append(self.open_count)
        return np.array(complete, np.int64).reshape(-1, 2), np.array(numbers, np.int32)

    def rest(self, outputs: Sequence[str]) -> dict[str, Block]:
        """The bounds of the last pack; nothing where there is none."""
        if not self.open_count:
            return {}
        lengths = np.array([self.open_tokens] if self.merge else [], np.int32)
        documents = np.array([1 if self.merge else self.open_count], np.int64)
        self.open_tokens = self.open_count = 0
        return {output: Block(np.empty(0, np.int32), lengths, documents) for output in outputs}
