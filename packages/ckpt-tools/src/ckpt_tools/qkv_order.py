"""Which of two orders the query heads of a checkpoint stand in, by the weights of the model that it was made from."""

from collections.abc import Mapping

import numpy as np

from ckpt_tools.checkpoint import Checkpoint, QkvOrder
from ckpt_tools.errors import UsageError
from ckpt_tools.shard_rules import QKV, layer_name

ORDERS: tuple[QkvOrder, ...] = ("megatron", "ascendspeed")
DECIDED_BELOW = 0.25
"""The right order's squared distance from the reference, as a share of the other's: none at all for a converted
model, little for one that was trained on, as much for a stranger."""


def decide(candidates: Mapping[QkvOrder, Checkpoint], reference: Checkpoint) -> QkvOrder:
    """The order in which the first layer's queries, keys and values are those of `reference`, or close to them.

    Args:
        candidates: The checkpoint, as each of the orders has it.
        reference: The model that it was made from.

    Raises:
        UsageError: The reference has another architecture, or neither order fits it better.
    """
    any_candidate = next(iter(candidates.values()))
    for name, (ours, theirs) in any_candidate.config.differences(reference.config).items():
        raise UsageError(f"{name} is {ours} in {any_candidate.path}, {theirs} in the reference {reference.path}")
    distances = {order: _distance(candidate, reference) for order, candidate in candidates.items()}
    nearest, other = sorted(distances, key=lambda order: distances[order])
    if distances[nearest] > DECIDED_BELOW * distances[other]:
        raise UsageError(
            f"{any_candidate.path} resembles the reference {reference.path} in neither order of its heads: "
            "give the model that it was made from, or --qkv-order"
        )
    return nearest


def _distance(candidate: Checkpoint, reference: Checkpoint) -> float:
    """Squared difference of the first layer's fused QKV, summed head by head."""
    name, height = layer_name(0, QKV), candidate.config.kv_channels
    total = 0.0
    for start in range(0, candidate.shape(name)[0], height):
        rows = (slice(start, start + height),)
        ours, theirs = (checkpoint.read(name, rows).astype(np.float64) for checkpoint in (candidate, reference))
        total += float(((ours - theirs) ** 2).sum())
    return total
