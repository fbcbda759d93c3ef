"""What is computed again in the backward pass instead of being kept from the forward pass: time for memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import checkpoint

from llama_model.errors import RequestError

Module = Literal["core_attn", "mlp"]
"""A part of a layer: attention proper, from queries, keys and values to heads; or the whole feed-forward network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompute:
    """Which activations are computed again, with Megatron's options and their meanings.

    Raises:
        RequestError: A value is not one of those allowed.
    """

    granularity: Literal["full", "selective"]
    """Whole layers, or the `modules` of every layer."""
    method: Literal["uniform", "block"] = "uniform"
    """Of full: "uniform" computes groups of `num_layers` layers again, each from the group's input; "block" the first
    `num_layers` layers of each model chunk, one by one, and keeps the others' activations."""
    num_layers: int = 1
    """Of full: layers of a group, or of a chunk."""
    modules: tuple[Module, ...] = ("core_attn",)
    """Of selective."""

    def __post_init__(self) -> None:
        _check("granularity", self.granularity, ("full", "selective"))
        _check("method", self.method, ("uniform", "block"))
        for module in self.modules:
            _check("module", module, get_args(Module))
        if self.num_layers < 1:
            raise RequestError(f"recompute: num_layers is {self.num_layers}: it must be positive")


def layer_groups(recompute: Recompute | None, count: int) -> list[tuple[range, Callable[..., Any]]]:
    """The `count` layers of a chunk in the groups that run together, each with how its function is called."""
    if recompute is None or recompute.granularity != "full":
        return [(range(count), plainly)]
    if recompute.method == "uniform":
        firsts = range(0, count, recompute.num_layers)
        return [(range(first, min(first + recompute.num_layers, count)), again) for first in firsts]
    first_kept = min(recompute.num_layers, count)
    return [*((range(n, n + 1), again) for n in range(first_kept)), (range(first_kept, count), plainly)]


def caller(recompute: Recompute | None, module: Module) -> Callable[..., Any]:
    """How the function of a layer's module is called."""
    asked = recompute is not None and recompute.granularity == "selective" and module in recompute.modules
    return again if asked else plainly


def plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The call itself."""
    return function(*args, **kwargs)


def again(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The call, of which only the arguments are kept: the backward pass calls once more."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    # Nothing in the network draws random numbers.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _check(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RequestError(f"recompute: no {what} {value!r}: choose from {', '.join(allowed)}")
