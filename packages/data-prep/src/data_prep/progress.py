"""What a run says while it works, and at its end."""

import sys
import time
from collections.abc import Callable
from typing import Any

from data_prep.chunks import Counts


class Progress:
    """A bar on a terminal; elsewhere a line each `log_interval` documents, if asked for.

    Args:
        total: Bytes to read.
        log_interval: Documents between two lines; 0 for none.
        say: Where lines go.
        begun: Bytes read, documents and tokens written by a run that this one continues.
    """

    def __init__(
        self, total: int, log_interval: int, say: Callable[[str], None], begun: tuple[int, int, int] = (0, 0, 0)
    ) -> None:
        self.counts = Counts()
        self._begun = begun
        self.documents = self.tokens = self.bytes = 0
        self._total, self._interval, self._say = total, log_interval, say
        self._begin = time.monotonic()
        self._next = log_interval
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            options = {"unit": "B", "unit_scale": True, "dynamic_ncols": True}
            self._bar = tqdm(total=total, desc="data-prep", file=sys.stderr, **options)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return max(time.monotonic() - self._begin, 1e-9)

    def at(self, done: int, documents: int, tokens: int) -> None:
        """Notes how far the run is: bytes read, documents and tokens written."""
        self.bytes = max(self.bytes, min(done, self._total))
        self.documents, self.tokens = documents, tokens
        if self._bar is not None:
            _, document_rate, token_rate = self._rates()
            self._bar.set_postfix_str(f"{document_rate:,.0f} doc/s, {token_rate:,.0f} tok/s", False)
            self._bar.update(self.bytes - self._bar.n)
        elif self._interval and documents >= self._next:
            self._next = documents - documents % self._interval + self._interval
            self._say(f"{documents:,} documents, {self.rates()}, {self._left()} left")

    def rates(self) -> str:
        """Documents, megabytes and tokens a second."""
        size, documents, tokens = self._rates()
        return f"{documents:,.0f} documents/s, {size / 1e6:,.1f} MB/s, {tokens:,.0f} tokens/s"

    def _rates(self) -> tuple[float, ...]:
        """Bytes, documents and tokens a second, of this run's own."""
        now = (self.bytes, self.documents, self.tokens)
        return tuple((total - before) / self.seconds for total, before in zip(now, self._begun, strict=True))

    def _left(self) -> str:
        seconds = round(self.seconds * (self._total - self.bytes) / max(self.bytes - self._begun[0], 1))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def cache(self) -> str:
        """How the cache of chunks did."""
        counts = self.counts
        if not counts.chunks:
            return "no chunk looked up"
        whole = f", {counts.bypassed_bytes / 1e6:,.1f} MB past it" if counts.bypassed_bytes else ""
        return f"cache hit rate {1 - counts.misses / counts.chunks:.2%} of {counts.chunks:,} chunks{whole}"

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
