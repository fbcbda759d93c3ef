"""Planning what all layouts have in common that keep a file for each rank: which rank gets what."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import UsageError
from ckpt_tools.formats.naming import QKV_ORDER, KeyPath, Naming, Stored, renumbered
from ckpt_tools.layout import Layout
from ckpt_tools.planning import OutputFile
from ckpt_tools.shard_rules import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LAYER_TENSORS,
    check_tensor_parallel,
    layer_name,
    sharding,
)
from ckpt_tools.storage.files import Array
from ckpt_tools.storage.output import Slot
from ckpt_tools.storage.torch_write import TorchWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFiles:
    """How a layout keeps its ranks' files."""

    naming: Naming
    path: Callable[[int, int], str]
    """The file of a tensor rank and a pipeline stage, relative to the target's folder."""
    root: str
    """The key of the model; its chunks in a virtual pipeline are numbered."""
    head: Mapping[str, Any]
    """What else the file's dictionary holds."""
    default_divisor: int
    """What the vocabulary is padded to multiples of, times the tensor-parallel size, unless told otherwise."""


def plan_files(config: LlamaConfig, layout: Layout, files: RankFiles) -> list[list[OutputFile]]:
    """The files to write: a batch for each pipeline stage, in it a file for each tensor rank.

    Raises:
        UsageError: The model does not divide into the layout, or would be padding for the most part.
    """
    tp_size = layout.tensor_model_parallel_size
    check_tensor_parallel(config, tp_size, whole_groups=files.naming.mixes_groups)
    padded = padded_vocab_size(config, layout, files.default_divisor)
    rules = sharding(config)
    head = {**files.head, QKV_ORDER: "megatron"} if _has_two_orders(config, layout, files.naming) else files.head
    batches = []
    for stage, chunks in enumerate(layout.chunks(config.num_layers)):
        if files.naming.inv_freq and len(chunks) > 1:
            raise UsageError(f"the format {files.naming.label} has no virtual pipelines")
        paths = _paths_of_stage(config, chunks, files, layout.merge_mlp)
        constants = _constants(config, chunks, files)
        batch = [
            OutputFile(
                path=files.path(rank, stage),
                tensors={
                    ".".join(path): (name, rules[name].view(rank, tp_size, padded, part=part))
                    for path, (name, part) in paths.items()
                },
                open=partial(_open_writer, head=head, skeletons=_skeletons(chunks, files), paths=[*paths, *constants]),
                constants={".".join(path): values for path, values in constants.items()},
            )
            for rank in range(tp_size)
        ]
        batches.append(batch)
    return batches


def order_notes(config: LlamaConfig, layout: Layout, naming: Naming) -> tuple[str, ...]:
    """A warning where AscendSpeed's own converter would have written, and its readers may expect, other QKV rows."""
    if not _has_two_orders(config, layout, naming):
        return ()
    groups = config.num_query_groups // layout.tensor_model_parallel_size
    return (
        f"the query heads of {groups} KV heads on each rank stand in Megatron's order, which AscendSpeed's network "
        "computes with; its own converter mixes them up. These files say so to ckpt-tools, those that AscendSpeed "
        "trains from them do not: they are read with --qkv-order megatron",
    )


def _has_two_orders(config: LlamaConfig, layout: Layout, naming: Naming) -> bool:
    """Whether AscendSpeed's converter would have written other QKV rows than its network computes with."""
    groups = config.num_query_groups // layout.tensor_model_parallel_size
    return naming.mixes_groups and config.num_query_groups != config.num_attention_heads and groups > 1


def padded_vocab_size(config: LlamaConfig, layout: Layout, default_divisor: int) -> int:
    """Rows of the vocabulary with padding, which is limited: a mistyped number would fill the disk with it.

    Small vocabularies may still be padded by Megatron's usual divisor, 128.

    Raises:
        UsageError: There would be more padding than vocabulary.
    """
    divisor = layout.make_vocab_size_divisible_by or default_divisor
    padded = config.padded_vocab_size(layout.tensor_model_parallel_size, divisor, layout.added_token_num)
    if padded > max(2 * config.vocab_size, 128 * layout.tensor_model_parallel_size):
        raise UsageError(
            f"{config.vocab_size} vocabulary entries would be padded to {padded}: give a smaller "
            f"make_vocab_size_divisible_by than {divisor} (times {layout.tensor_model_parallel_size} tensor-parallel "
            "ranks), or added_token_num"
        )
    return padded


def _root_of(files: RankFiles, chunks: Sequence[range], chunk: int) -> str:
    return files.root if len(chunks) == 1 else f"{files.root}{chunk}"


def _skeletons(chunks: Sequence[range], files: RankFiles) -> dict[str, Any]:
    return {_root_of(files, chunks, chunk): copy.deepcopy(files.naming.skeleton) for chunk in range(len(chunks))}


def _paths_of_stage(
    config: LlamaConfig, chunks: Sequence[range], files: RankFiles, merge_mlp: bool
) -> dict[KeyPath, Stored]:
    """Every tensor of a stage: the path of its keys in the file, to the canonical tensor and the part."""
    paths = {}
    for chunk, layers in enumerate(chunks):
        root = _root_of(files, chunks, chunk)
        for path, stored in files.naming.paths(_names_within(config, layers), merge_mlp=merge_mlp):
            paths[root, *path] = Stored(renumbered(stored.name, layers.start), stored.part)
    return paths


def _names_within(config: LlamaConfig, layers: range) -> Iterator[str]:
    """The parameters of a chunk, its layers numbered from 0: the first one has the embedding, the last one the head."""
    if layers.start == 0:
        yield EMBEDDING
    for number in range(len(layers)):
        yield from (layer_name(number, tensor) for tensor in LAYER_TENSORS)
    if layers.stop == config.num_layers:
        yield from (FINAL_NORM, HEAD)


def _constants(config: LlamaConfig, chunks: Sequence[range], files: RankFiles) -> dict[KeyPath, Array]:
    """The rotary embedding's frequencies, which layers of the flat layout hold copies of: base^(-2i/d), float32."""
    if files.naming.inv_freq is None:
        return {}
    powers = np.arange(0, config.kv_channels, 2) / config.kv_channels
    inv_freq = (1.0 / config.rotary_base**powers).astype(np.float32)
    return {
        (_root_of(files, chunks, chunk), *files.naming.in_layer(number, files.naming.inv_freq)): inv_freq
        for chunk, layers in enumerate(chunks)
        for number in range(len(layers))
    }


def _open_writer(
    path: Path,
    slots: Sequence[Slot],
    *,
    head: Mapping[str, Any],
    skeletons: Mapping[str, Any],
    paths: Sequence[KeyPath],
) -> TorchWriter:
    tree: dict[str, Any] = {**head, **skeletons}
    for (*inner, last), slot in zip(paths, slots, strict=True):
        place = tree
        for key in inner:
            place = place[key]
        place[last] = slot
    return TorchWriter(path, tree)
