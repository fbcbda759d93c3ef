"""The `ckpt-tools` command: convert, reshard, inspect, verify.

Nothing heavier than the parser is imported before a verb runs.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ckpt_tools import commandline

if TYPE_CHECKING:
    from ckpt_tools.writing import Summary

CHECK_FAILED = 3

Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Target = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
ModelPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
ConfigPath = Annotated[Path | None, tyro.conf.arg(metavar="HF_DIR")]


def convert(
    source: Source,
    target: Target,
    /,
    *,
    to: Literal["hf", "megatron-core"],
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    make_vocab_size_divisible_by: int = 1,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    config: ConfigPath = None,
    overwrite: bool = False,
    json: bool = False,
) -> int:
    """Writes a checkpoint in another format or layout, bit for bit.

    Example: ckpt-tools convert llama-2-7b-hf llama-2-7b-tp8 --to megatron-core --tensor-model-parallel-size 8

    Args:
        source: A Hugging Face folder, a Megatron checkpoint, or a training run (its latest checkpoint).
        target: The folder to write; it appears whole or not at all.
        to: The format to write.
        tensor_model_parallel_size: Tensor-parallel ranks to split over.
        pipeline_model_parallel_size: Pipeline stages to split over.
        make_vocab_size_divisible_by: Pad the vocabulary to a multiple of this times the tensor-parallel size.
        dtype: Cast every tensor; without it each stays as it is.
        config: A Hugging Face folder that states the architecture, for sources that do not.
        overwrite: Replace the target, if nothing lies in it but a checkpoint that ckpt-tools can have written.
        json: Print the result as JSON.
    """
    from ckpt_tools.conversion import convert as run

    summary = run(
        source,
        target,
        to=to,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        dtype=dtype,
        config=config,
        overwrite=overwrite,
        progress=True,
    )
    _print_summary(summary, as_json=json)
    return 0


def reshard(
    source: Source,
    target: Target,
    /,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    make_vocab_size_divisible_by: int = 1,
    config: ConfigPath = None,
    overwrite: bool = False,
    json: bool = False,
) -> int:
    """Writes a checkpoint in its own format, split over other ranks.

    Example: ckpt-tools reshard llama-2-70b-tp8-pp8 llama-2-70b-tp8 --tensor-model-parallel-size 8

    Args:
        source: A Megatron checkpoint.
        target: The folder to write; it appears whole or not at all.
        tensor_model_parallel_size: Tensor-parallel ranks to split over.
        pipeline_model_parallel_size: Pipeline stages to split over.
        make_vocab_size_divisible_by: Pad the vocabulary to a multiple of this times the tensor-parallel size.
        config: A Hugging Face folder that states the architecture, for sources that do not.
        overwrite: Replace the target, if nothing lies in it but a checkpoint that ckpt-tools can have written.
        json: Print the result as JSON.
    """
    from ckpt_tools.conversion import reshard as run

    summary = run(
        source,
        target,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        config=config,
        overwrite=overwrite,
        progress=True,
    )
    _print_summary(summary, as_json=json)
    return 0


def inspect(path: ModelPath, /, *, config: ConfigPath = None, json: bool = False) -> int:
    """Shows a checkpoint's format, architecture, layout, type and size.

    Args:
        path: Any checkpoint.
        config: A Hugging Face folder that states the architecture, for checkpoints that do not.
        json: Print the result as JSON.
    """
    from ckpt_tools.inspection import inspect as run

    found = run(path, config)
    if json:
        _print_json(found)
        return 0
    architecture = found.pop("config") or {"architecture": None}
    found["dtype"] = found["dtype"] or "mixed"
    for name, value in {**found, **architecture}.items():
        print(f"{name:29}{'unknown' if value is None else f'{value:,}' if type(value) is int else value}")
    return 0


def verify(
    a: ModelPath,
    b: ModelPath,
    /,
    *,
    tolerance: float = 0.0,
    config: ConfigPath = None,
    json: bool = False,
) -> int:
    """Compares two checkpoints tensor by tensor, across formats and layouts. Exit code 3 if they differ.

    Args:
        a: Any checkpoint.
        b: Another.
        tolerance: Largest absolute difference of an element that passes; 0 asks for the same bits.
        config: A Hugging Face folder that states the architecture, for checkpoints that do not.
        json: Print the result as JSON.
    """
    from dataclasses import asdict

    from ckpt_tools.verification import verify as run

    differences = run(a, b, tolerance=tolerance, config=config)
    if json:
        _print_json({"same": not differences, "differences": [asdict(difference) for difference in differences]})
    elif differences:
        print("\n".join(map(str, differences)))
    else:
        print("the same model")
    return CHECK_FAILED if differences else 0


def main() -> int:
    """The exit code of the `ckpt-tools` command."""
    with commandline.unwinding_on_sigterm():
        return commandline.run(
            "ckpt-tools",
            "Converts, reshards, inspects and compares LLaMA-2 checkpoints.",
            {"convert": convert, "reshard": reshard, "inspect": inspect, "verify": verify},
        )


def _print_summary(summary: "Summary", *, as_json: bool) -> None:
    if as_json:
        names = ("format", "tensors", "bytes", "seconds")
        _print_json({"path": str(summary.path), **{name: getattr(summary, name) for name in names}})
        return
    size, seconds = summary.bytes / 1e9, max(summary.seconds, 1e-9)
    print(
        f"{summary.path}: {summary.format}, {summary.tensors:,} tensors, {size:.3f} GB "
        f"in {seconds:.1f} s ({size / seconds:.2f} GB/s)"
    )


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))
