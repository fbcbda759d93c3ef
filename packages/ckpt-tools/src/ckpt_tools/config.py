"""The architecture of a LLaMA-2 model, and its spelling in Hugging Face's config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.files import read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """The architecture: untied head, rotate-half rotary embedding, RMSNorm, SwiGLU, grouped-query attention, no biases.

    Raises:
        ValueError: A size is not positive or above its limit, a number not finite, a token not of the vocabulary, or
            query heads do not divide among the groups.
    """

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the gate, and of the up projection."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key and value heads; a divisor of `num_attention_heads`."""
    kv_channels: int
    """Channels of one head."""
    vocab_size: int
    """Entries of the vocabulary, without padding."""
    max_position_embeddings: int = 4096
    """The longest sequence that the model was made for."""
    rotary_base: float = 10000.0
    """Theta of the rotary embedding."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm."""
    init_method_std: float = 0.02
    """Standard deviation of fresh weights."""
    bos_token_id: int | None = 1
    """The token that begins a text."""
    eos_token_id: int | None = 2
    """The token that ends a text."""

    def __post_init__(self) -> None:
        for name in (*SIZES, "max_position_embeddings"):
            _check_size(name, getattr(self, name))
        for name in (*CONSTANTS, "init_method_std"):
            object.__setattr__(self, name, _finite(name, getattr(self, name)))
        for name in CONSTANTS:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be positive")
        for name in ("bos_token_id", "eos_token_id"):
            _check_token(name, getattr(self, name), self.vocab_size)
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"{self.num_attention_heads} attention heads do not divide among {self.num_query_groups} query groups"
            )
        if self.kv_channels % 2:
            raise ValueError(f"kv_channels is {self.kv_channels}: the rotary embedding needs an even number")

    @classmethod
    def from_hf(cls, path: str | Path) -> "LlamaConfig":
        """The architecture that a Hugging Face config.json states.

        Args:
            path: A model's folder, or a config.json.

        Raises:
            CheckpointError: There is none, or it states something that this architecture is not.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        return cls.from_hf_dict(read_json(file), str(file))

    @classmethod
    def from_hf_dict(cls, stated: Mapping[str, Any], where: str) -> "LlamaConfig":
        """The architecture that the contents of a config.json state; `where` names them in errors."""
        _refuse_other_architectures(stated, where)
        missing = [key for key in _HF_NAMES if key not in stated]
        if missing:
            raise CheckpointError(f"{where} does not state {', '.join(missing)}")
        known = {ours: stated[theirs] for theirs, ours in _HF_NAMES.items()}
        heads = known["num_attention_heads"]
        known["num_query_groups"] = stated.get("num_key_value_heads") or heads
        try:
            known["kv_channels"] = stated.get("head_dim") or known["hidden_size"] // (heads or 1)
            known["rotary_base"] = _rope(stated, where).get("rope_theta", 10000.0)
            known["max_position_embeddings"] = stated.get("max_position_embeddings", 2048)
            known["layernorm_epsilon"] = stated.get("rms_norm_eps", 1e-6)  # the defaults here are transformers'
            known["init_method_std"] = stated.get("initializer_range", 0.02)
            known["bos_token_id"] = _first_token(stated.get("bos_token_id", 1))
            known["eos_token_id"] = _first_token(stated.get("eos_token_id", 2))
            return cls(**known)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{where}: {error}") from None

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The contents of a config.json that transformers loads as its LlamaConfig.

        Args:
            dtype: "float32", "float16" or "bfloat16": what the weights beside it have.
        """
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "head_dim": self.kv_channels,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.init_method_std,
            "intermediate_size": self.ffn_hidden_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_query_groups,
            "pretraining_tp": 1,
            "rms_norm_eps": self.layernorm_epsilon,
            "rope_scaling": None,
            "rope_theta": self.rotary_base,
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }

    def padded_vocab_size(self, tensor_model_parallel_size: int, divisible_by: int = 1, added: int = 0) -> int:
        """Rows of the embedding with padding: the next multiple of `divisible_by` times the tensor-parallel size.

        With room for `added` more tokens.
        """
        multiple = divisible_by * tensor_model_parallel_size
        return -(-(self.vocab_size + added) // multiple) * multiple

    def differences(self, other: "LlamaConfig") -> dict[str, tuple[Any, Any]]:
        """The fields that shape the function the network computes and differ: name to (this one's, the other's)."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in (*SIZES, *CONSTANTS)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
)
"""The fields that give the tensors their shapes."""

CONSTANTS = ("rotary_base", "layernorm_epsilon")
"""The fields that no tensor shows, but that every logit depends on."""

LIMITS = {"num_layers": 2**14, "num_attention_heads": 2**14, "max_position_embeddings": 2**24}
"""More than any real model has, less than what takes all time and memory before a tensor is seen to be missing."""

FIELDS = tuple(field.name for field in fields(LlamaConfig))

_HF_NAMES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}


def _refuse_other_architectures(stated: Mapping[str, Any], where: str) -> None:
    kind = stated.get("model_type")
    if kind != "llama":
        raise CheckpointError(f'{where} is of model_type {kind!r}: only "llama" is read')
    if stated.get("tie_word_embeddings"):
        raise CheckpointError(f"{where} ties the head to the embedding (tie_word_embeddings): LLaMA-2 does not")
    for key in ("attention_bias", "mlp_bias"):
        if stated.get(key):
            raise CheckpointError(f"{where} sets {key}: LLaMA-2 has no biases")
    if stated.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where} sets hidden_act to {stated['hidden_act']!r}: LLaMA-2 has silu")
    if stated.get("quantization_config"):
        raise CheckpointError(f"{where} states quantized weights (quantization_config): only float weights are read")
    rope = _rope(stated, where)
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{where} scales the rotary embedding ({scaling!r}): LLaMA-2 does not")


def _rope(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rotary embedding's settings: transformers 5 nests them in `rope_parameters`, 4 has two keys for them."""
    settings = {"rope_theta": stated["rope_theta"]} if stated.get("rope_theta") is not None else {}
    for key in ("rope_scaling", "rope_parameters"):
        nested = stated.get(key) or {}
        if not isinstance(nested, Mapping):
            raise CheckpointError(f"{where} sets {key} to {nested!r}: it must be an object or null")
        settings.update(nested)
    return settings


def _first_token(stated: Any) -> Any:
    """A token's id; where several are named (chat models stop at any of them), the first."""
    return stated[0] if isinstance(stated, list) and stated else stated


def _check_size(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}: it must be a positive whole number")
    if value > LIMITS.get(name, value):
        raise ValueError(f"{name} is {value}: it must be {LIMITS[name]} at most")


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}: it must be a number")
    try:
        number = float(value)
    except OverflowError:  # JSON's whole numbers have no end
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}: it must be finite")
    return number


def _check_token(name: str, value: Any, vocab_size: int) -> None:
    if value is not None and (type(value) is not int or not 0 <= value < vocab_size):
        raise ValueError(f"{name} is {value!r}: it must be null, or a token of the vocabulary (0 to {vocab_size - 1})")
