"""The `ckpt-tools` command: convert, reshard, inspect, verify.

Nothing heavier than the parser is imported before a verb runs.
"""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ckpt_tools import commandline
from ckpt_tools.layout import Layout
from ckpt_tools.upstream import ConvertFlags, ModelFlags, ReshardFlags

if TYPE_CHECKING:
    from ckpt_tools.writing import Summary

CHECK_FAILED = 3

Source = Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Target = Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
ModelPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
ConfigPath = Annotated[Path | None, tyro.conf.arg(metavar="HF_DIR")]
QkvOrder = Literal["megatron", "ascendspeed"] | None

NOT_SPLIT_SO = ("num_layers_per_virtual_pipeline_stage", "num_layer_list")
"""Fields that `inspect` leaves empty where there is no virtual, and no uneven, pipeline."""

UNSPLIT, NO_CONVERT_FLAGS, NO_RESHARD_FLAGS = Layout(), ConvertFlags(), ReshardFlags()
"""Defaults of groups of options."""


def convert(
    source: Source = None,
    target: Target = None,
    /,
    *,
    to: Literal["hf", "megatron-core", "ascendspeed", "ascendspeed-flat", "deepspeed"] | None = None,
    layout: Layout = UNSPLIT,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    config: ConfigPath = None,
    qkv_order: QkvOrder = None,
    reference: ConfigPath = None,
    overwrite: bool = False,
    json: bool = False,
    ascendspeed: ConvertFlags = NO_CONVERT_FLAGS,
) -> int:
    """Writes a checkpoint in another format or layout, bit for bit.

    Example: ckpt-tools convert llama-2-7b-hf llama-2-7b-tp8 --to megatron-core --tensor-model-parallel-size 8

    Args:
        source: A Hugging Face folder, a Megatron or DeepSpeed checkpoint, or a training run (its latest checkpoint).
        target: The folder to write; it appears whole or not at all.
        to: The format to write.
        layout: How to split the model over ranks.
        dtype: Cast every tensor; without it each stays as it is.
        config: A Hugging Face folder that states the architecture, for sources that do not.
        qkv_order: The order of the query heads, for AscendSpeed's layouts with several KV heads on each rank.
        reference: A Hugging Face folder of the model that the source was made from: its weights decide that order.
        overwrite: Replace the target, if nothing lies in it but a checkpoint that ckpt-tools can have written.
        json: Print the result as JSON.
        ascendspeed: AscendSpeed's spelling of the same.
    """
    from ckpt_tools.conversion import convert as run

    source, target = ascendspeed.folders(source, target)
    to_format = ascendspeed.format(to)
    _check_model(ascendspeed, source, config)
    summary = run(
        source,
        target,
        to=to_format,
        layout=layout,
        dtype=dtype,
        config=config,
        qkv_order=qkv_order,
        reference=reference,
        overwrite=overwrite,
        progress=True,
    )
    _print_summary(summary, as_json=json)
    return 0


def reshard(
    source: Source = None,
    target: Target = None,
    /,
    *,
    layout: Layout = UNSPLIT,
    config: ConfigPath = None,
    qkv_order: QkvOrder = None,
    reference: ConfigPath = None,
    overwrite: bool = False,
    json: bool = False,
    ascendspeed: ReshardFlags = NO_RESHARD_FLAGS,
) -> int:
    """Writes a checkpoint in its own format, split over other ranks.

    Example: ckpt-tools reshard llama-2-70b-tp8-pp8 llama-2-70b-tp8 --tensor-model-parallel-size 8

    Args:
        source: A Megatron or DeepSpeed checkpoint.
        target: The folder to write; it appears whole or not at all.
        layout: How to split the model over ranks.
        config: A Hugging Face folder that states the architecture, for sources that do not.
        qkv_order: The order of the query heads, for AscendSpeed's layouts with several KV heads on each rank.
        reference: A Hugging Face folder of the model that the source was made from: its weights decide that order.
        overwrite: Replace the target, if nothing lies in it but a checkpoint that ckpt-tools can have written.
        json: Print the result as JSON.
        ascendspeed: AscendSpeed's spelling of the same.
    """
    from ckpt_tools.conversion import reshard as run

    source, target = ascendspeed.folders(source, target)
    _check_model(ascendspeed, source, config)
    summary = run(
        source,
        target,
        ascendspeed.layout(layout),
        config=config,
        qkv_order=qkv_order,
        reference=reference,
        overwrite=overwrite,
        progress=True,
    )
    _print_summary(summary, as_json=json)
    return 0


def _check_model(flags: ModelFlags, source: Path, config: Path | None) -> None:
    """Compares what the command line says of the model, if anything, with the files, before any work."""
    if not flags.describe_the_model():
        return
    from ckpt_tools.config import LlamaConfig
    from ckpt_tools.opening import open_checkpoint

    with open_checkpoint(source, LlamaConfig.from_hf(config) if config else None) as checkpoint:
        flags.check(checkpoint)


def inspect(path: ModelPath, /, *, config: ConfigPath = None, tensors: bool = False, json: bool = False) -> int:
    """Shows a checkpoint's format, architecture, layout, type and size.

    Args:
        path: Any checkpoint.
        config: A Hugging Face folder that states the architecture, for checkpoints that do not.
        tensors: List every stored tensor: file, name, shape, type.
        json: Print the result as JSON.
    """
    from ckpt_tools.inspection import inspect as run

    found = run(path, config, tensors=tensors)
    if json:
        _print_json(found)
        return 0
    architecture = found.pop("config") or {"architecture": None}
    found["dtype"] = found["dtype"] or "mixed"
    table = found.pop("tensors", [])
    for name, value in {**found, **architecture}.items():
        missing = "none" if name in NOT_SPLIT_SO else "unknown"
        print(f"{name:39}{missing if value is None else f'{value:,}' if type(value) is int else value}")
    for row in table:
        print(f"{row['file']}  {row['name']}  {row['shape']}  {row['dtype']}")
    return 0


def verify(
    a: ModelPath,
    b: ModelPath,
    /,
    *,
    tolerance: float = 0.0,
    config: ConfigPath = None,
    qkv_order: QkvOrder = None,
    reference: ConfigPath = None,
    json: bool = False,
) -> int:
    """Compares two checkpoints tensor by tensor, across formats and layouts. Exit code 3 if they differ.

    Args:
        a: Any checkpoint.
        b: Another.
        tolerance: Largest absolute difference of an element that passes; 0 asks for the same bits.
        config: A Hugging Face folder that states the architecture, for checkpoints that do not.
        qkv_order: The order of the query heads, for AscendSpeed's layouts with several KV heads on each rank.
        reference: A Hugging Face folder of the model that such a checkpoint was made from: its weights decide it.
        json: Print the result as JSON.
    """
    from dataclasses import asdict

    from ckpt_tools.verification import verify as run

    differences = run(a, b, tolerance=tolerance, config=config, qkv_order=qkv_order, reference=reference, progress=True)
    if json:
        _print_json({"same": not differences, "differences": [_jsonable(asdict(found)) for found in differences]})
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
    for note in summary.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        names = ("format", "tensors", "bytes", "seconds", "peak_rss")
        _print_json({"path": str(summary.path), **{name: getattr(summary, name) for name in names}})
        return
    size, seconds = summary.bytes / 1e9, max(summary.seconds, 1e-9)
    print(
        f"{summary.path}: {summary.format}, {summary.tensors:,} tensors, {size:.3f} GB "
        f"in {seconds:.1f} s ({size / seconds:.2f} GB/s), {summary.peak_rss / 1e6:.0f} MB of memory at most"
    )


def _jsonable(found: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity, and no number that is none: they are spelled as strings."""
    strange = {name: str(x) for name, x in found.items() if type(x) is float and not math.isfinite(x)}
    return found | strange


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))
