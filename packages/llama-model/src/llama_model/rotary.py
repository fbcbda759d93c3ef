"""The tables of the rotary embedding, in fp32 whatever the model's type.

b batch, s sequence, d channels of a head, p positions of the table.
"""

import torch
from torch import Tensor


class RotaryTables:
    """Cosines and sines of every position's angles.

    No buffer of the model: `model.to(torch.bfloat16)` would round it, and at position 4095 a bf16 angle is off by whole
    turns. Built on first use, on the device that asks; 4096 positions of 128 channels take 4 MiB.

    Args:
        channels: d.
        base: Theta of the angles' frequencies.
        length: p, the longest sequence.

    Source: Su et al., "RoFormer", https://arxiv.org/abs/2104.09864, section 3.2.2; frequencies and products rounded to
        fp32 as in transformers' LlamaRotaryEmbedding, so that both networks turn by the very same angles, also in
        fp64.
    """

    def __init__(self, channels: int, base: float, length: int) -> None:
        self.channels, self.base, self.length = channels, base, length
        self._tables: tuple[Tensor, Tensor] | None = None

    def first(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 to `count` - 1: fp32 [s, d] each."""
        cos, sin = self._on(device)
        return cos[:count], sin[:count]

    def at(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of any positions [b, s]: fp32 [b, s, d] each."""
        cos, sin = self._on(position_ids.device)
        return cos[position_ids], sin[position_ids]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._tables is None or self._tables[0].device != device:
            self._tables = self._build(device)
        return self._tables

    def _build(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # On the CPU, so that every device and every rank turns by the same bits.
        exponents = torch.arange(0, self.channels, 2, dtype=torch.float32, device="cpu") / self.channels
        frequencies = 1.0 / self.base**exponents  # [d / 2]
        positions = torch.arange(self.length, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, frequencies)  # [p, d / 2]
        angles = torch.cat((angles, angles), -1)  # [p, d]: channel i pairs with channel i + d / 2
        return angles.cos().to(device), angles.sin().to(device)
