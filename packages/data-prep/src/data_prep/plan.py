"""What a run is asked for, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UsageError
from data_prep.handlers import HandlerOptions, check_handler
from data_prep.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `prepare` is asked for; its parameters say what each field is."""

    inputs: tuple[Path, ...]
    output_prefix: str
    tokenizer: Path
    handler_name: str = "GeneralPretrainHandler"
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    prompt_type: str | None = None
    map_keys: Mapping[str, Any] | None = None
    input_weights: tuple[float, ...] = ()
    special_tokens_in_text: str = "match"
    dtype: str = "int32"
    pack_length: int | None = None
    skip_bad_records: bool = False
    num_shards: int = 1
    shard_index: int = 0

    def __post_init__(self) -> None:
        check_handler(self.handler_name, self.options)
        if not self.inputs:
            raise UsageError("--input names no file and no folder")
        if not self.output_prefix or self.output_prefix.endswith(("/", "/.", "/..")):
            raise UsageError(f"--output-prefix {self.output_prefix!r} is a folder: end it with a name for the data set")
        if self.special_tokens_in_text not in ("match", "ignore"):
            raise UsageError(f"--special-tokens-in-text {self.special_tokens_in_text}: match or ignore")
        if self.dtype not in ("int32", "uint16"):
            raise UsageError(f"--dtype {self.dtype}: int32, or uint16 for pretraining data")
        if self.pack_length is not None and self.pack_length < 1:
            raise UsageError(f"--seq-length {self.pack_length}: give the tokens of a pack")
        if self.pack_length and self.num_shards > 1:
            raise UsageError("--pack with --num-shards: a pack would end with its shard, and the bytes would differ")
        if not 0 <= self.shard_index < self.num_shards:
            raise UsageError(f"--shard-index {self.shard_index} is none of the {self.num_shards} from 0 on")

    @property
    def options(self) -> HandlerOptions:
        """What the handler is told."""
        return HandlerOptions(
            json_keys=self.json_keys,
            append_eod=self.append_eod,
            prompt_type=self.prompt_type,
            map_keys=dict(self.map_keys or {}),
        )

    @property
    def recipe(self) -> Recipe:
        """What every process of the run knows."""
        return Recipe(
            tokenizer=self.tokenizer,
            handler_name=self.handler_name,
            options=self.options,
            special_tokens=self.special_tokens_in_text == "match",
            skip_bad=self.skip_bad_records,
        )

    @property
    def prefix(self) -> str:
        """The prefix of what is written: a shard's has its number."""
        if self.num_shards == 1:
            return self.output_prefix
        return f"{self.output_prefix}-{self.shard_index:05}-of-{self.num_shards:05}"

    @property
    def facts(self) -> dict[str, Any]:
        """What the ids depend on besides inputs, tokenizer and handler, where it is not the default."""
        default = Plan(inputs=self.inputs, output_prefix="x", tokenizer=self.tokenizer)
        names = ("json_keys", "prompt_type", "map_keys", "input_weights", "special_tokens_in_text", "pack_length")
        asked = {name: value for name in names if (value := getattr(self, name)) != getattr(default, name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asked.items()}
