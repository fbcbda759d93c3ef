"""`convert`: a checkpoint of one format and layout into one of another."""

import sys
from pathlib import Path

from tqdm import tqdm

from ckpt_tools.checkpoint import Checkpoint
from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import UsageError
from ckpt_tools.formats import hf
from ckpt_tools.formats.companions import generation_config
from ckpt_tools.layout import Layout
from ckpt_tools.opening import open_checkpoint
from ckpt_tools.writing import PLANS, Summary, write_checkpoint


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    make_vocab_size_divisible_by: int = 1,
    dtype: str | None = None,
    config: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Summary:
    """What was written: the model of `source` as a new folder of another format or layout, bit for bit.

    Args:
        source: Anything that `open_checkpoint` opens.
        target: The folder to write; it appears whole or not at all.
        to: "hf" or "megatron-core".
        tensor_model_parallel_size: Tensor-parallel ranks to split over.
        pipeline_model_parallel_size: Pipeline stages to split over.
        make_vocab_size_divisible_by: Pads the vocabulary to a multiple of this times the tensor-parallel size.
        dtype: "float32", "float16" or "bfloat16" to cast; default: tensors stay as they are.
        config: A Hugging Face folder that states the architecture, for sources that do not.
        overwrite: Replace the target, if nothing lies in it but a checkpoint that ckpt-tools can have written.
        progress: Show a bar on stderr, if that is a terminal.

    Raises:
        CheckpointError: The source is broken, or the target exists.
        UsageError: The model does not divide into the layout, or the architecture is not known.
    """
    layout = Layout(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
    )
    known = LlamaConfig.from_hf(config) if config else None
    with open_checkpoint(source, known) as checkpoint:
        _refuse_the_source(checkpoint, Path(target))
        files = (*checkpoint.tokenizer_files, *generation_config(checkpoint.path))
        hidden = not (progress and sys.stderr.isatty())
        with tqdm(unit="B", unit_scale=True, disable=hidden, desc=to, leave=False) as bar:
            return write_checkpoint(
                target,
                checkpoint.config,
                checkpoint,
                to,
                layout,
                dtype=dtype,
                files=files,
                overwrite=overwrite,
                progress=bar,
            )


def reshard(
    source: str | Path,
    target: str | Path,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    make_vocab_size_divisible_by: int = 1,
    config: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Summary:
    """What was written: the checkpoint in its own format, split over other ranks. Arguments are those of `convert`."""
    with open_checkpoint(source, LlamaConfig.from_hf(config) if config else None) as checkpoint:
        own = checkpoint.format
    if own not in PLANS or own == hf.FORMAT:
        raise UsageError(f"{source} is of the format {own}, which is not written in ranks: use convert --to")
    return convert(
        source,
        target,
        to=own,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        config=config,
        overwrite=overwrite,
        progress=progress,
    )


def _refuse_the_source(checkpoint: Checkpoint, target: Path) -> None:
    place, source = target.resolve(), checkpoint.path.resolve()
    if place == source or place in source.parents:
        raise UsageError(f"{target} holds the source: choose another target")
