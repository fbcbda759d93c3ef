"""The `llama-model` console script: its verbs, and nothing of what they do."""

import json as jsonlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from ckpt_tools import commandline

if TYPE_CHECKING:
    from data_prep import Tokenizer

    from llama_model.model import LlamaModel

Model = Annotated[Path, tyro.conf.Positional]
Prompts = Annotated[list[str], tyro.conf.UseAppendAction]


def generate(
    model: Model,
    *,
    prompt: Prompts,
    prompt_template: Literal["none", "general-instruction"] = "none",
    decoding: tuple[Literal["greedy", "sample"], ...] = ("greedy",),
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1234,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    device: Literal["npu", "cuda", "cpu"] | None = None,
    tokenizer_name_or_path: Path | None = None,
    json: bool = False,
) -> int:
    """Continues prompts, in one or several decoding modes after one load.

    Example: llama-model generate llama-2-7b-hf --prompt "Llamas live in" --decoding greedy sample --top-p 0.9

    Args:
        model: A Hugging Face folder, a Megatron checkpoint, or a training run (its latest checkpoint).
        prompt: One or several texts.
        prompt_template: What stands around each: nothing, or the instruction template that fine-tuning data has.
        decoding: Modes to run, one after the other.
        max_new_tokens: Tokens to generate for each prompt.
        temperature: Of sampling; below 1 sharpens.
        top_k: Of sampling: draw from the so many likeliest tokens; 0 means all.
        top_p: Of sampling: draw from the likeliest tokens that have this probability together.
        seed: Of sampling; prompt number i draws with seed + i.
        dtype: Type to compute in; the checkpoint's unless given.
        device: Where to compute; the machine's accelerator unless given.
        tokenizer_name_or_path: A tokenizer's folder; the model's own unless given.
        json: Print the result as JSON.
    """
    from data_prep import templates

    from llama_model.errors import RequestError
    from llama_model.tokenizer import load_tokenizer

    if not prompt or not decoding:
        raise RequestError("nothing to do: give --prompt TEXT, once or several times, and at least one --decoding")
    tokenizer = load_tokenizer(model, tokenizer_name_or_path)  # what is no checkpoint is refused before anything slow
    from llama_model.loading import load_model

    texts = prompt if prompt_template == "none" else [templates.get(prompt_template).prompt(text) for text in prompt]
    network = load_model(model, device=device, dtype=dtype)
    options = {"max_new_tokens": max_new_tokens}
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    outputs = []
    for mode in decoding:
        chosen = options | sampling if mode == "sample" else options
        outputs += _continue(network, tokenizer, texts, mode, chosen)
    if json:
        print(jsonlib.dumps({"outputs": outputs}))
        return 0
    for number, output in enumerate(outputs):
        _show(texts[number % len(texts)], output)
    return 0


def _continue(
    model: "LlamaModel", tokenizer: "Tokenizer", texts: list[str], mode: Any, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """One output for each text, ready for JSON; tokens are the answer's only, the end token among them."""
    from llama_model.generation import generate as steps_of

    started = time.perf_counter()
    prompts = [tokenizer.encode(text) for text in texts]
    tokens: list[list[int]] = [[] for _ in texts]
    logprobs: list[list[float]] = [[] for _ in texts]
    for step in steps_of(model, prompts, decoding=mode, eos_token_id=tokenizer.eos_id, **options):
        for row, token, logprob in zip(step.rows, step.tokens, step.logprobs, strict=True):
            tokens[row].append(token)
            logprobs[row].append(logprob)
    elapsed_s = time.perf_counter() - started
    return [
        {
            "decoding": mode,
            "text": tokenizer.decode(answer),
            "tokens": answer,
            "logprobs": logprobs[row],
            "elapsed_s": elapsed_s,
        }
        for row, answer in enumerate(tokens)
    ]


def _show(prompt: str, output: dict[str, Any]) -> None:
    count, elapsed_s = len(output["tokens"]), output["elapsed_s"]
    print(f"--- {output['decoding']}, {count} tokens, {elapsed_s:.2f} s\n{prompt}\n>>>\n{output['text'].strip()}\n")


def main() -> int:
    """The exit code of the `llama-model` command."""
    return commandline.run(
        "llama-model",
        "The LLaMA-2 network: continues prompts.",
        {"generate": generate},
    )
