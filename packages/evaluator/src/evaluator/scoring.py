"""Log-likelihoods of continuations: the results do not depend on how the requests are batched."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

Request = tuple[list[int], list[int]]
"""Ids of the context, and of the continuation that is scored."""


@torch.no_grad()
def loglikelihoods(model: Callable[..., Any], requests: Sequence[Request], batch_size: int = 32) -> list[list[float]]:
    """Each continuation token's log-probability in nats, in fp32.

    Args:
        model: Called with ids [b, s], gives logits [b, s, v], like LlamaModel. Rows are padded on the right: under
            causal attention nothing sees the padding.
        requests: Contexts are never empty.
        batch_size: Rows at a time.
    """
    order = sorted(range(len(requests)), key=lambda at: -len(requests[at][0]) - len(requests[at][1]))
    scores: list[list[float]] = [[] for _ in requests]
    where = next(model.parameters()).device if isinstance(model, torch.nn.Module) else torch.device("cpu")
    for begin in tqdm(range(0, len(order), batch_size), unit="batch", disable=None, file=sys.stderr):
        part = order[begin : begin + batch_size]
        rows = [[*requests[at][0], *requests[at][1]] for at in part]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = torch.tensor(row)
        logits = model(tokens.to(where))
        for number, at in enumerate(part):
            first, wanted = len(requests[at][0]), torch.tensor(requests[at][1], device=where)
            logprobs = logits[number, first - 1 : first - 1 + len(wanted)].float().log_softmax(-1)
            scores[at] = logprobs.gather(1, wanted[:, None])[:, 0].tolist()
    return scores
