"""The scoring engine: log-likelihoods of continuations, the same however the requests are batched.

b rows of a batch, s tokens of the longest row, h hidden, v vocabulary, n scored tokens of a batch.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

Request = tuple[Sequence[int], Sequence[int]]
"""Ids of the context, and of the continuation that is scored; neither is empty."""

_POSITIONS = 512
"""Scored positions whose logits [n, v] exist at a time: 64 MB in fp32 for LLaMA-2's vocabulary."""


@torch.no_grad()
def loglikelihoods(
    model: Callable[..., Any], requests: Sequence[Request], *, batch_size: int = 32, progress: bool = True
) -> list[list[float]]:
    """The log-probability, in nats, of each token of each continuation, given all before it.

    Rows are padded on the right: under causal attention nothing sees the padding. Requests that feed the model the same
    ids share a row (the last token of a continuation is never fed), so four letters cost one row.

    Args:
        model: Called with ids int64 [b, s], gives logits [b, s, v], like LlamaModel: a sharded one, or another
            library's, is called the same way. Of a whole LlamaModel, only the logits that are scored are computed.
        requests: What to score.
        batch_size: Rows at a time. The results do not depend on it (within 1e-5 in fp32).
        progress: Show a bar on stderr, where that is a terminal.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(requests):
        rows.setdefault((*context, *continuation[:-1]), []).append(number)
    order = sorted(rows, key=len, reverse=True)  # what does not fit into memory fails at once
    scores: list[list[float]] = [[] for _ in requests]
    with tqdm(
        total=len(requests), unit="answer", desc="scoring", disable=None if progress else True, file=sys.stderr
    ) as bar:
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            numbers = [number for row in batch for number in rows[row]]
            places = [
                place for at, row in enumerate(batch) for number in rows[row] for place in _places(at, requests[number])
            ]
            found = iter(_logprobs(model, batch, places))
            for number in numbers:
                scores[number] = [next(found) for _ in requests[number][1]]
            bar.update(len(numbers))
    return scores


def _places(row: int, request: Request) -> list[tuple[int, int, int]]:
    """(row, position, the token that should follow it) of each scored token."""
    context, continuation = request
    return [(row, len(context) - 1 + at, token) for at, token in enumerate(continuation)]


def _logprobs(
    model: Callable[..., Any], rows: Sequence[Sequence[int]], places: Sequence[tuple[int, int, int]]
) -> list[float]:
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else torch.device("cpu")
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for number, ids in enumerate(rows):
        tokens[number, : len(ids)] = torch.tensor(ids)
    logits_at = _logits_at(model, tokens.to(device))
    found: list[float] = []
    for begin in range(0, len(places), _POSITIONS):
        row, position, target = torch.tensor(places[begin : begin + _POSITIONS], device=device).unbind(1)  # [n] each
        logprobs = logits_at(row, position).float().log_softmax(-1)  # [n, v]
        found += logprobs.gather(1, target[:, None])[:, 0].tolist()
    return found


def _logits_at(model: Callable[..., Any], tokens: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Rows and positions [n] to logits [n, v], after one pass over `tokens`."""
    if hasattr(model, "hidden_states") and getattr(model, "tensor_model_parallel_size", 1) == 1:
        hidden: Tensor = model.hidden_states(tokens)  # [s, b, h]
        head: Callable[[Tensor], Tensor] = model.logits  # type: ignore[attr-defined]
        return lambda rows, positions: head(hidden[positions, rows][:, None])[:, 0]
    logits: Tensor = model(tokens)  # [b, s, v]
    return lambda rows, positions: logits[rows, positions]
