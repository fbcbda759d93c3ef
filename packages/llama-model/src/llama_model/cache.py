"""A static key-value cache: room for every row's whole sequence, allocated once, filled at each row's own pace.

b batch, s new tokens, S slots, n query heads, g query groups (key and value heads), d channels of a head.
"""

from collections.abc import Sequence

import torch
from npu_kernels import attention, decode_attention
from torch import Tensor


class KeyValueCache:
    """Keys and values of the tokens seen so far; `LlamaModel.new_cache` makes one of the right shape.

    A row of the batch may be shorter than the others: `lengths` says how much of it counts. What lies behind is never
    attended to and is overwritten by the row's next tokens.

    Args:
        num_layers: Layers that store.
        shape: [b, S, g, d] of one layer's keys, g this rank's.
        dtype: Of the model.
        device: Where it computes.
    """

    lengths: Tensor
    """int64 [b]: tokens of each row."""

    def __init__(
        self, num_layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._rows = torch.arange(shape[0], device=device)[:, None]  # [b, 1]
        self.num_slots = shape[1]
        self.lengths = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self._host_lengths = [0] * shape[0]  # the same, known without asking the device

    @property
    def longest(self) -> int:
        """The most tokens that a row holds."""
        return max(self._host_lengths)

    def positions(self, count: int) -> Tensor:
        """Where each row's next `count` tokens stand: int64 [b, s].

        Raises:
            ValueError: There is no room for them.
        """
        if self.longest + count > self.num_slots:
            raise ValueError(f"{count} tokens after {self.longest} do not fit into a cache of {self.num_slots} slots")
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Stores the new tokens' keys and values and attends from the new queries to all that their rows hold.

        Args:
            layer: From 0 on this rank.
            q: [b, s, n, d].
            k: [b, s, g, d].
            v: [b, s, g, d].
            positions: What `positions` returned for these tokens.

        Returns:
            [b, s, n, d].
        """
        keys, values = self._keys[layer], self._values[layer]
        count = q.shape[1]
        if self.longest == 0:
            keys[:, :count], values[:, :count] = k, v
            return attention(q, k, v)
        keys[self._rows, positions], values[self._rows, positions] = k, v
        if count == 1:
            after = [length + 1 for length in self._host_lengths]
            return decode_attention(q, keys, values, self.lengths + 1, host_lengths=after)
        used = self.longest + count
        keys, values = keys[:, :used], values[:, :used]  # [b, S, g, d]
        seen = torch.arange(used, device=q.device) <= positions[:, None, :, None]  # [b, 1, s, S]
        return attention(q, keys, values, causal=False, mask=seen)

    def advance(self, count: int) -> None:
        """Counts `count` more tokens in every row; the model calls it when all layers have stored them."""
        self.lengths = self.lengths + count
        self._host_lengths = [length + count for length in self._host_lengths]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forgets what stands behind `lengths[i]` in row i: the padding of prompts shorter than the longest."""
        self.lengths = torch.tensor(lengths, device=self.lengths.device)
        self._host_lengths = list(lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Makes these rows the batch, in this order; one that is named twice, such as a prefix that several texts
        share, is copied.
        """
        index = torch.tensor(rows, device=self.lengths.device)
        self._keys = [keys[index] for keys in self._keys]
        self._values = [values[index] for values in self._values]
        self._rows = torch.arange(len(rows), device=index.device)[:, None]
        self.lengths = self.lengths[index]
        self._host_lengths = [self._host_lengths[row] for row in rows]
