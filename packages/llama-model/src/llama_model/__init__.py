"""The LLaMA-2 network: loads any checkpoint that ckpt-tools reads, generates, and trains on megatron-core's layers.

    model = load_model("llama-2-7b-hf")
    for step in generate(model, [[1, 15043]], max_new_tokens=32): ...

Public names: `LlamaModel` (the network), `Recompute` (what it computes again in the backward pass), `load_model`,
`load_weights` and `load_tokenizer` (from disk), `init_weights` (fresh ones), `generate` (an iterator of tokens) and its
`Step`, `KeyValueCache`, the modules `flops` and `parallel` (megatron-core's parallelism). They are imported on first
use, so that `import llama_model` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_model import flops, parallel
    from llama_model.cache import KeyValueCache
    from llama_model.errors import ModelError, RequestError
    from llama_model.generation import Step, generate
    from llama_model.initialization import init_weights
    from llama_model.loading import load_model, load_weights
    from llama_model.model import LlamaModel
    from llama_model.recompute import Recompute
    from llama_model.tokenizer import load_tokenizer

_HOME = {
    "KeyValueCache": "cache",
    "LlamaModel": "model",
    "ModelError": "errors",
    "Recompute": "recompute",
    "RequestError": "errors",
    "Step": "generation",
    "generate": "generation",
    "init_weights": "initialization",
    "load_model": "loading",
    "load_tokenizer": "tokenizer",
    "load_weights": "loading",
}

__all__ = [
    "KeyValueCache",
    "LlamaModel",
    "ModelError",
    "Recompute",
    "RequestError",
    "Step",
    "flops",
    "generate",
    "init_weights",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "parallel",
]


def __getattr__(name: str) -> object:
    if name in ("flops", "parallel"):
        return import_module(f"llama_model.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'llama_model' has no attribute {name!r}")
    return getattr(import_module(f"llama_model.{_HOME[name]}"), name)
