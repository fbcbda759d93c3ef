"""`convert`: a checkpoint of one format and layout into one of another."""

import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ckpt_tools.checkpoint import Checkpoint, QkvOrder
from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import UsageError
from ckpt_tools.formats import deepspeed, hf
from ckpt_tools.formats.companions import generation_config
from ckpt_tools.formats.naming import MEGATRON_CORE
from ckpt_tools.layout import Layout
from ckpt_tools.opening import open_checkpoint
from ckpt_tools.storage.files import refuse_stand_in
from ckpt_tools.writing import PLANS, Summary, write_checkpoint


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    layout: Layout | None = None,
    dtype: str | None = None,
    config: str | Path | None = None,
    qkv_order: QkvOrder | None = None,
    reference: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Summary:
    """What was written: the model of `source` as a new folder of another format or layout, bit for bit.

    Args:
        source: Anything that `open_checkpoint` opens.
        target: The folder to write; it appears whole or not at all.
        to: "hf", "megatron-core", "ascendspeed", "ascendspeed-flat" or "deepspeed".
        layout: How to split the model over ranks; default: not at all.
        dtype: "float32", "float16" or "bfloat16" to cast; default: tensors stay as they are.
        config: A Hugging Face folder that states the architecture, for sources that do not.
        qkv_order: See `open_checkpoint`.
        reference: See `open_checkpoint`.
        overwrite: Replace the target, if nothing lies in it but a checkpoint that ckpt-tools can have written.
        progress: Show a bar on stderr, if that is a terminal.

    Raises:
        CheckpointError: The source is broken, or the target exists.
        UsageError: The model does not divide into the layout, or the architecture is not known.
    """
    known = LlamaConfig.from_hf(config) if config else None
    with open_checkpoint(source, known, qkv_order=qkv_order, reference=reference) as checkpoint:
        _refuse_sources(checkpoint, Path(target), (config, reference))
        files = (*checkpoint.tokenizer_files, *generation_config(checkpoint.path))
        for file in files:
            refuse_stand_in(file)
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
    layout: Layout,
    *,
    config: str | Path | None = None,
    qkv_order: QkvOrder | None = None,
    reference: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Summary:
    """What was written: the checkpoint in its own format, split over other ranks.

    Arguments are those of `convert`; the names of the tensors, and whether gate and up projection are merged, stay as
    they are.

    Raises:
        UsageError: As for `convert`; also where `layout` asks for other names.
    """
    with open_checkpoint(source, LlamaConfig.from_hf(config) if config else None) as checkpoint:
        own, found = checkpoint.format, checkpoint.layout
    if own not in PLANS or own == hf.FORMAT:
        raise UsageError(f"{source} is of the format {own}, which is not written in ranks: use convert --to")
    if layout.merge_mlp and not found.merge_mlp and found.naming != MEGATRON_CORE.label:
        raise UsageError(f"{source} has gate and up projection apart: use convert --to {own} --merge-mlp to merge them")
    if layout.naming not in (None, found.naming):
        raise UsageError(f"{source} has the names of {found.naming}, not of {layout.naming}: use convert --to {own}")
    naming = found.naming if own == deepspeed.FORMAT else None
    return convert(
        source,
        target,
        to=own,
        layout=replace(layout, merge_mlp=found.merge_mlp, naming=naming),
        config=config,
        qkv_order=qkv_order,
        reference=reference,
        overwrite=overwrite,
        progress=progress,
    )


def _refuse_sources(checkpoint: Checkpoint, target: Path, others: Iterable[str | Path | None]) -> None:
    """Refuses a target that holds something that is read, or lies in the source's own folder.

    Raises:
        UsageError: Naming what it would replace.
    """
    place = Path(os.path.realpath(target))
    folder = Path(os.path.realpath(checkpoint.path))
    given = [Path(path) for path in others if path is not None]
    for path in (folder, *checkpoint.file_paths, *checkpoint.tokenizer_files, *given):
        source = Path(os.path.realpath(path))
        if place == source or place in source.parents:
            raise UsageError(f"{target} holds {source}, which is read: choose another target")
    if folder in place.parents:
        raise UsageError(f"{target} lies in the source's folder {folder}: choose another target")
