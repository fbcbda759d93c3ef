"""AscendSpeed's spelling of the converters' options, which its users' scripts have: what it means here.

What describes the model is not taken from the command line, as it was there, but compared with the files.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_tools.errors import UsageError
from ckpt_tools.layout import Layout

if TYPE_CHECKING:
    from ckpt_tools.checkpoint import Checkpoint

PRESETS = {
    "7B": {"num_layers": 32, "hidden_size": 4096, "num_heads": 32},
    "13B": {"num_layers": 40, "hidden_size": 5120, "num_heads": 40},
    "30B": {"num_layers": 60, "hidden_size": 6656, "num_heads": 52},
    "65B": {"num_layers": 80, "hidden_size": 8192, "num_heads": 64},
}
"""What AscendSpeed's `--type` says; any other value said nothing there, and says nothing here."""

FIELDS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_query_groups",
    "orig_vocab_size": "vocab_size",
}
"""AscendSpeed's option to the field of `LlamaConfig`."""

SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size")


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """AscendSpeed's options that name folders and describe the model."""

    input_model_dir: Path | None = None
    """SRC."""
    output_model_dir: Path | None = None
    """DST."""
    type: str | None = None
    """7B, 13B, 30B or 65B: compared with the files. Another value says nothing."""
    num_layers: int | None = None
    """Compared with the files."""
    num_heads: int | None = None
    """Compared with the files."""
    num_kv_heads: int | None = None
    """Compared with the files."""
    hidden_size: int | None = None
    """Compared with the files."""

    def folders(self, source: Path | None, target: Path | None) -> tuple[Path, Path]:
        """SRC and DST, however they were given.

        Raises:
            UsageError: One of them was given twice or not at all.
        """
        return (
            _once("SRC", source, "--input-model-dir", self.input_model_dir),
            _once("DST", target, "--output-model-dir", self.output_model_dir),
        )

    def describe_the_model(self) -> bool:
        """Whether any option says something that the files say too."""
        compared = ("type", *FIELDS, *(f"src_{name}" for name in SIZES))
        return any(getattr(self, name, None) is not None for name in compared)

    def check(self, checkpoint: "Checkpoint") -> None:
        """Compares what the options say with the files.

        Raises:
            UsageError: They contradict each other, naming both values.
        """
        for option, says, found in self._comparisons(checkpoint):
            if says is not None and says != found:
                raise UsageError(f"{option} says {says}, {checkpoint.path} {found}")

    def _comparisons(self, checkpoint: "Checkpoint") -> Iterator[tuple[str, Any, Any]]:
        """An option, what it says, what the files say."""
        preset = PRESETS.get(self.type or "", {})
        for name, field in FIELDS.items():
            found = getattr(checkpoint.config, field)
            yield f"--type {self.type} ({name})", preset.get(name), found
            yield _option(name), getattr(self, name, None), found


@dataclass(frozen=True, kw_only=True)
class ConvertFlags(ModelFlags):
    """Options of AscendSpeed's converter, for its users' scripts."""

    deepspeed: bool = False
    """--to deepspeed."""

    def format(self, to: str | None) -> str:
        """The format to write: AscendSpeed's converter, known by its --input-model-dir, wrote its own or DeepSpeed's.

        Raises:
            UsageError: None was asked for, or two.
        """
        if self.deepspeed and to not in (None, "deepspeed"):
            raise UsageError(f"--deepspeed is --to deepspeed, and --to {to} was given too")
        implied = "deepspeed" if self.deepspeed else "ascendspeed" if self.input_model_dir is not None else None
        chosen = to or implied
        if chosen is None:
            raise UsageError("give --to and the format to write")
        return chosen


@dataclass(frozen=True, kw_only=True)
class ReshardFlags(ModelFlags):
    """Options of AscendSpeed's tool for changing the parallel sizes, for its users' scripts."""

    src_tensor_model_parallel_size: int | None = None
    """Compared with the files."""
    src_pipeline_model_parallel_size: int | None = None
    """Compared with the files."""
    tgt_tensor_model_parallel_size: int | None = None
    """--tensor-model-parallel-size."""
    tgt_pipeline_model_parallel_size: int | None = None
    """--pipeline-model-parallel-size."""
    orig_vocab_size: int | None = None
    """Compared with the files."""

    def layout(self, layout: Layout) -> Layout:
        """`layout`, with the sizes that were given in AscendSpeed's spelling.

        Raises:
            UsageError: One was given in both, as two numbers.
        """
        for name in SIZES:
            given, spelled = getattr(layout, name), getattr(self, f"tgt_{name}")
            if spelled is not None and given not in (1, spelled):
                raise UsageError(f"{_option(name)} is {given}, {_option('tgt_' + name)} is {spelled}: give one of them")
        changes = {name: getattr(self, f"tgt_{name}") for name in SIZES}
        return replace(layout, **{name: value for name, value in changes.items() if value is not None})

    def _comparisons(self, checkpoint: "Checkpoint") -> Iterator[tuple[str, Any, Any]]:
        yield from super()._comparisons(checkpoint)
        for name in SIZES:
            yield _option("src_" + name), getattr(self, f"src_{name}"), getattr(checkpoint.layout, name)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _once(what: str, given: Path | None, option: str, spelled: Path | None) -> Path:
    if given is not None and spelled is not None:
        raise UsageError(f"{what} is {given}, and {option} is {spelled}: give one of them")
    chosen = given if given is not None else spelled
    if chosen is None:
        raise UsageError(f"give {what} (or {option})")
    return chosen
