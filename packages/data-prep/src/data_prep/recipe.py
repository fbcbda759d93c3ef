"""How batches become blocks: what a process needs to know for it, and what it hands back."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.batching import Batch
from data_prep.chunks import Counts
from data_prep.handlers import Handler, HandlerOptions, make_handler
from data_prep.indexed_writer import Block
from data_prep.rows import Bad, BadRecordsError, Rows
from data_prep.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What every process of a run knows."""

    tokenizer: Path
    handler_name: str
    options: HandlerOptions
    special_tokens: bool = True
    skip_bad: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """A batch, and the share of its records that is taken."""

    batch: Batch
    share: float


@dataclass(frozen=True, slots=True)
class Done:
    """What a batch became."""

    records: int
    blocks: dict[str, Block]
    """By output; none where no record was left."""
    bad: list[str]
    """What was left out, and why."""
    counts: Counts = field(default_factory=Counts)


class Worker:
    """Does the tasks of a run, one after another."""

    def __init__(self, recipe: Recipe) -> None:
        self._skip_bad = recipe.skip_bad
        self.tokenizer = Tokenizer(recipe.tokenizer, special_tokens=recipe.special_tokens)
        self.handler: Handler = make_handler(recipe.handler_name, self.tokenizer, recipe.options)

    def __call__(self, task: Task) -> Done:
        """What the batch of `task` becomes.

        Raises:
            DataError: A record cannot be used, and bad ones are not to be skipped; it is named.
        """
        rows = task.batch.rows(self._skip_bad)
        bad = list(rows.bad)
        if task.share < 1:
            rows = _spread(rows, task.share)
        blocks: dict[str, Block] = {}
        while len(rows):
            try:
                blocks = self.handler(rows)
                break
            except BadRecordsError as error:
                if not self._skip_bad:
                    raise
                bad += [each.message for each in error.bad]
                rows = rows.without(error.bad)
        counts = self.tokenizer.counts
        return Done(len(rows), blocks, bad, counts.take() if counts else Counts())


def _spread(rows: Rows, share: float) -> Rows:
    """A share of the records, evenly spread by their numbers: of a third, each third one, however they are batched."""
    numbers = np.asarray(rows.numbers, np.float64)
    tiny = 1e-9  # a third of three is one, whatever floats say
    keep = np.floor(numbers * share + tiny) > np.floor((numbers - 1) * share + tiny)
    return rows.without([Bad(int(at), "") for at in np.flatnonzero(~keep)])
