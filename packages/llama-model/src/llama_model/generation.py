"""Generation: an iterator of tokens over a key-value cache, any number of prompts of any lengths at a time.

b prompts still running, s tokens of the longest prompt, v vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llama_model.errors import ModelError, RequestError
from llama_model.model import LlamaModel

Decoding = Literal["greedy", "sample"]


@dataclass(frozen=True, slots=True)
class Step:
    """One new token of every prompt that is still running, in the order of `rows`."""

    rows: tuple[int, ...]
    """The prompts' numbers, from 0."""
    tokens: tuple[int, ...]
    """Their new tokens; one that equals `eos_token_id` is its prompt's last."""
    logprobs: tuple[float, ...]
    """Log-probabilities of these tokens under the model itself: before temperature, top-k and top-p. Units: nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn: logits over temperature, then the `top_k` likeliest, then the smallest set of the likeliest
    whose probability reaches `top_p`, then at random by what is left.
    """

    temperature: float = 1.0
    """Above 0."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    """Above 0; 1: all."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RequestError(f"temperature {self.temperature}: it must be above 0 (greedy decoding is its limit)")
        if self.top_k < 0:
            raise RequestError(f"top_k {self.top_k}: it must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p {self.top_p}: it must be above 0 and at most 1")


def generate(
    model: LlamaModel,
    prompts: Sequence[Sequence[int]],
    *,
    decoding: Decoding = "greedy",
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | None = None,
    seed: int | None = None,
) -> Iterator[Step]:
    """Steps of one token for every prompt, until each has met `eos_token_id` or has `max_new_tokens`.

    Every prompt is continued as it would be alone: those of a batch see nothing of each other, and prompt i draws from
    a generator of its own, seeded with `seed` + i. Stop iterating to stop early.

    Args:
        model: On one device, or every tensor-parallel rank's part (all ranks call this alike).
        prompts: Token ids, begin token included where the model wants one.
        decoding: "greedy" takes the likeliest token, "sample" draws one.
        max_new_tokens: For each prompt.
        temperature: Of sampling, as in `Sampling`.
        top_k: Of sampling.
        top_p: Of sampling.
        eos_token_id: Ends a prompt's continuation; None: nothing does.
        seed: Of sampling; None: another one each time (under tensor parallelism give one).

    Raises:
        RequestError: At once, not at the first step: an empty prompt, ids outside the vocabulary, more tokens than the
            model has positions, or a setting out of its range.
        ModelError: At a step whose logits are no numbers.
    """
    rule = None
    if decoding == "sample":
        rule = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    elif decoding != "greedy":
        raise RequestError(f"no decoding is called {decoding!r}: choose from greedy, sample")
    _check(model, prompts, max_new_tokens, seed)
    return _steps(model, prompts, rule, max_new_tokens, eos_token_id, seed)


def _check(model: LlamaModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int | None) -> None:
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens {max_new_tokens}: it must be 1 or more")
    positions, vocab = model.architecture.max_position_embeddings, model.architecture.vocab_size
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise RequestError(f"prompt {number} is empty: it needs one token at least (the begin token, say)")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise RequestError(f"prompt {number} holds token ids outside the vocabulary of {vocab} entries")
        if len(prompt) + max_new_tokens > positions:
            raise RequestError(
                f"prompt {number} has {len(prompt)} tokens: with {max_new_tokens} new ones it exceeds the model's "
                f"{positions} positions"
            )
    if seed is not None and not 0 <= seed < 2**63 - len(prompts):
        raise RequestError(f"seed {seed}: it must be 0 or more, and below 2**63 - {len(prompts)}")


@torch.inference_mode()
def _steps(
    model: LlamaModel,
    prompts: Sequence[Sequence[int]],
    rule: Sampling | None,
    max_new_tokens: int,
    eos_token_id: int | None,
    seed: int | None,
) -> Iterator[Step]:
    if not prompts:
        return
    generators = [_generator(seed, row) for row in range(len(prompts))] if rule is not None else []
    rows = list(range(len(prompts)))
    lengths = [len(prompt) for prompt in prompts]
    cache = model.new_cache(len(prompts), max(lengths) + max_new_tokens)
    device = cache.lengths.device
    # Shorter prompts are padded on the right, where no true token sees it; the cache then forgets the padding.
    padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
    x = model.hidden_states(torch.tensor(padded, device=device), cache=cache)  # [s, b, h]
    cache.truncate(lengths)
    last = cache.lengths - 1
    x = x[last, torch.arange(len(prompts), device=device)][None]  # [1, b, h]
    for left in range(max_new_tokens - 1, -1, -1):
        logits = model.logits(x)[0].float()  # [b, v]
        tokens = logits.argmax(-1) if rule is None else _draw(logits, rule, [generators[row] for row in rows])
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]  # [b]
        step = Step(tuple(rows), tuple(tokens.tolist()), tuple(logprobs.tolist()))
        if not all(map(math.isfinite, step.logprobs)):
            raise ModelError("the logits are no numbers: the weights hold NaN or overflow their type (try float32)")
        yield step
        running = [at for at, token in enumerate(step.tokens) if token != eos_token_id]
        if not running or not left:
            return
        if len(running) < len(rows):
            rows = [rows[at] for at in running]
            cache.keep(running)
            tokens = tokens[torch.tensor(running, device=device)]
        x = model.hidden_states(tokens[:, None], cache=cache)  # [1, b, h]


def _generator(seed: int | None, row: int) -> torch.Generator:
    """On the CPU, so that a seed means the same on every device."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed + row)


def _draw(logits: Tensor, rule: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row, [b], by inverting the cumulative distribution of the likeliest tokens at a random point."""
    points = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
    ordered, ids = (logits / rule.temperature).sort(stable=True, dim=-1, descending=True)  # [b, v] each
    if rule.top_k:
        ordered, ids = ordered[:, : rule.top_k], ids[:, : rule.top_k]
    mass = ordered.double().softmax(-1).cumsum(-1)  # [b, k]
    # The set ends with the token that reaches top_p; what is drawn lies below its mass.
    ends = (mass < rule.top_p).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)  # [b, 1]
    targets = points.to(logits.device)[:, None] * mass.gather(-1, ends)  # [b, 1]
    chosen = torch.minimum((mass <= targets).sum(-1, keepdim=True), ends)
    drawn: Tensor = ids.gather(-1, chosen)[:, 0]
    return drawn
