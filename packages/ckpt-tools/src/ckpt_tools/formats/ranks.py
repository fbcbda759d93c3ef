"""What all layouts have in common that keep a file for each rank: which rank holds what, read and planned."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_tools.checkpoint import Contents, Piece, view_pieces
from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.formats.companions import stated_config, tokenizer_files
from ckpt_tools.formats.megatron_args import check_against_args, config_from_args
from ckpt_tools.formats.naming import LAYER, NO_WEIGHT, KeyPath, Naming, Stored, naming_of
from ckpt_tools.layout import Layout
from ckpt_tools.planning import OutputFile
from ckpt_tools.shard_rules import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LAYER_TENSORS,
    QKV,
    ShardRule,
    View,
    ascendspeed_qkv_view,
    check_tensor_parallel,
    layer_name,
    sharding,
)
from ckpt_tools.storage.files import Array, DiskTensor, File
from ckpt_tools.storage.output import Slot
from ckpt_tools.storage.torch_read import read_torch
from ckpt_tools.storage.torch_write import TorchWriter
from ckpt_tools.storage.unpickle import Record, attributes

UNSTATED = "has no config.json, and no args that state heads, eps, rotary base and true vocabulary size"


@dataclass(frozen=True, slots=True)
class Rank:
    """An open file of one rank."""

    tp: int
    pp: int
    file: File
    chunks: Sequence[Mapping[str, DiskTensor]]
    """The weights of each chunk of the model (of several in a virtual pipeline), by their joined paths."""
    args: Mapping[str, Any]
    """Megatron's, where the file has any."""


def open_rank(tp: int, pp: int, path: Path, files: list[File], roots: Callable[[Mapping[Any, Any]], list[str]]) -> Rank:
    """The rank's file, which is added to `files` as it is opened.

    Args:
        tp: Tensor-parallel rank.
        pp: Pipeline stage.
        path: The file.
        files: Those to close.
        roots: The keys of the file's dictionary that hold the chunks of the model.

    Raises:
        CheckpointError: Missing, broken, or without a model.
    """
    file = File(path)
    files.append(file)
    tree, tensors = read_torch(file)
    if type(tree) is not dict:
        raise CheckpointError(f"{path} is not a checkpoint's file of a rank: it holds a {type(tree).__name__}")
    chunks: dict[Any, dict[str, DiskTensor]] = {root: {} for root in roots(tree)}
    for root in chunks:
        if type(tree.get(root)) is not dict:
            raise CheckpointError(f"{path} has no `{root}`")
    for keys, tensor in tensors.items():
        root, name = keys[:1], ".".join(map(str, keys[1:]))
        if name and root[0] in chunks and not NO_WEIGHT.fullmatch(name):
            chunks[root[0]][name] = tensor
    empty = next((root for root, chunk in chunks.items() if not chunk), None)
    if empty is not None:
        raise CheckpointError(f"{path} has no weights in `{empty}`")
    args = attributes(tree["args"], "Namespace") if type(tree.get("args")) is Record else {}
    return Rank(tp, pp, file, list(chunks.values()), args)


def contents(folder: Path, files: Sequence[File], ranks: Sequence[Rank], format: str | None = None) -> Contents:
    """What the ranks' files hold together.

    Args:
        folder: The folder of the files.
        files: The open files.
        ranks: One for each of them, in the order of (tensor rank, pipeline stage).
        format: The format's name; default: that of the names that its tensors have.

    Raises:
        CheckpointError: A rank is missing, or the names are of no known layout.
    """
    naming = naming_of(name for rank in ranks for chunk in rank.chunks for name in chunk)
    if naming is None:
        raise CheckpointError(f"{ranks[0].file.path} holds no tensors by names of megatron-core or AscendSpeed")
    tp_size, pp_size = _sizes(ranks)
    _check_ranks(ranks, tp_size, pp_size, folder)
    layers = _layers(ranks, naming)
    stated = stated_config(folder)
    args = ranks[0].args
    from_args = config_from_args(args, folder) if args else None
    if stated:
        check_against_args(stated, args, folder, CheckpointError)

    def place(config: LlamaConfig, qkv_order: str) -> Iterator[tuple[str, Piece]]:
        check_against_args(config, args, folder, UsageError)
        check_tensor_parallel(config, tp_size, whole_groups=naming.mixes_groups)
        count = sum(len(chunk) for stage in layers for chunk in stage)
        if count != config.num_layers:
            raise CheckpointError(f"{folder} holds {count} layers, expected {config.num_layers}")
        rules = sharding(config)
        for rank in ranks:
            for chunk, numbers in zip(rank.chunks, layers[rank.pp], strict=True):
                for name, stored, tensor in _placed(chunk, numbers, naming, rules):
                    if rank.tp == 0 or rules[name].split_dim is not None:  # the first one's, of what all repeat
                        view = _view(name, stored, tensor, config, rules[name], rank.tp, tp_size, qkv_order)
                        yield from ((name, piece) for piece in view_pieces(tensor, view))

    def qkv_is_ambiguous(config: LlamaConfig) -> bool:
        grouped = config.num_query_groups != config.num_attention_heads
        return naming.mixes_groups and grouped and config.num_query_groups > tp_size

    return Contents(
        format=format or naming.label,
        config=stated or from_args,
        missing=UNSTATED,
        files=files,
        tensors=[tensor for rank in ranks for chunk in rank.chunks for tensor in chunk.values()],
        place=place,
        tokenizer_files=tokenizer_files(folder),
        layout=_layout(layers, tp_size, ranks[0], naming),
        qkv_is_ambiguous=qkv_is_ambiguous,
    )


def _sizes(ranks: Sequence[Rank]) -> tuple[int, int]:
    """Tensor and pipeline parallel sizes: what the files' numbers show, or the args, where those say more."""
    shown = max(rank.tp for rank in ranks) + 1, max(rank.pp for rank in ranks) + 1
    stated = [ranks[0].args.get(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline")]
    tp_size, pp_size = (max(a, b) if type(b) is int else a for a, b in zip(shown, stated, strict=True))
    return tp_size, pp_size


def _check_ranks(ranks: Sequence[Rank], tp_size: int, pp_size: int, folder: Path) -> None:
    """Names the first rank that is missing: its tensors would later be missed as rows of another size."""
    present = {(rank.tp, rank.pp) for rank in ranks}
    everyone = ((tp, pp) for tp in range(tp_size) for pp in range(pp_size))
    missing = next((rank for rank in everyone if rank not in present), None)
    if missing is not None:
        raise CheckpointError(
            f"{folder} lacks {rank_name(*missing, pp_size)}: it holds {len(ranks)} ranks of {tp_size} × {pp_size} "
            "(tensor × pipeline parallel size)"
        )
    chunks = len(ranks[0].chunks)
    other = next((rank for rank in ranks if len(rank.chunks) != chunks), None)
    if other is not None:
        raise CheckpointError(
            f"{other.file.path} holds {len(other.chunks)} chunks of the model, the first rank {chunks}"
        )


def rank_name(tp_rank: int, pp_rank: int, pp_size: int) -> str:
    """Megatron's name of a rank; the stage is told where there are several."""
    return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp_size > 1 else "")


def _layers(ranks: Sequence[Rank], naming: Naming) -> list[list[range]]:
    """The layers of each chunk, [stage][chunk], from how many each holds: they need not be equally many.

    The chunks of a virtual pipeline are dealt to the stages in turn.
    """
    stages = sorted((rank for rank in ranks if rank.tp == 0), key=lambda rank: rank.pp)
    layers: list[list[range]] = [[] for _ in stages]
    first = 0
    for turn in range(len(stages[0].chunks)):
        for rank in stages:
            found = filter(None, map(naming.stored, rank.chunks[turn]))
            numbers = {int(named[1]) for stored in found if (named := LAYER.fullmatch(stored.name))}
            if numbers != set(range(len(numbers))):
                raise CheckpointError(f"{rank.file.path}: its layers are not numbered from 0")
            layers[rank.pp].append(range(first, first + len(numbers)))
            first += len(numbers)
    return layers


def _layout(layers: Sequence[Sequence[range]], tp_size: int, rank: Rank, naming: Naming) -> Layout:
    counts = [sum(map(len, stage)) for stage in layers]
    is_virtual = len(layers[0]) > 1
    uneven = len(set(counts)) > 1 and all(counts)
    parts = {stored.part for chunk in rank.chunks for stored in map(naming.stored, chunk) if stored}
    return Layout(
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=len(layers),
        num_layers_per_virtual_pipeline_stage=len(layers[0][0]) or None if is_virtual and len(layers) > 1 else None,
        num_layer_list=tuple(counts) if uneven and not is_virtual else None,
        merge_mlp=naming.gate_and_up is not None and 0 not in parts,
        naming=naming.label,
    )


def _placed(
    chunk: Mapping[str, DiskTensor], layers: range, naming: Naming, rules: Mapping[str, ShardRule]
) -> Iterator[tuple[str, Stored, DiskTensor]]:
    """A chunk's tensors with their canonical names, layers numbered over the whole model."""
    for joined, tensor in chunk.items():
        stored = naming.stored(joined)
        if stored is None:
            raise CheckpointError(f"{tensor.where} is none of a LLaMA-2's tensors")
        in_layer = LAYER.fullmatch(stored.name)
        name = layer_name(layers.start + int(in_layer[1]), in_layer[2]) if in_layer else stored.name
        if name not in rules:
            raise CheckpointError(f"{tensor.where} is none of this model's tensors")
        yield name, stored, tensor


def _view(
    name: str,
    stored: Stored,
    tensor: DiskTensor,
    config: LlamaConfig,
    rule: ShardRule,
    tp_rank: int,
    tp_size: int,
    qkv_order: str,
) -> View:
    """The part of the canonical tensor that a rank's tensor holds."""
    if name.endswith(QKV) and qkv_order == "ascendspeed":
        return ascendspeed_qkv_view(config, tp_rank, tp_size)
    padded = (*tensor.shape, 0)[0] * tp_size if rule.vocab else None
    if padded is not None and padded < config.vocab_size:
        raise CheckpointError(f"{tensor.where} has room for {padded} of {config.vocab_size} entries")
    return rule.view(tp_rank, tp_size, padded, part=stored.part)


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
    batches = []
    for stage, chunks in enumerate(layout.chunks(config.num_layers)):
        if files.naming.inv_freq and len(chunks) > 1:
            raise UsageError(f"the format {files.naming.label} has no virtual pipelines")
        paths = _paths_of_stage(config, chunks, files, layout.merge_mlp)
        constants = _constants(config, chunks, files)
        batch = []
        for rank in range(tp_size):
            tensors = {
                ".".join(path): (name, rules[name].view(rank, tp_size, padded, part=part))
                for path, (name, part) in paths.items()
            }
            skeletons = _skeletons(chunks, files)
            opener = partial(_open_writer, head=files.head, skeletons=skeletons, paths=[*paths, *constants])
            named = {".".join(path): values for path, values in constants.items()}
            batch.append(OutputFile(files.path(rank, stage), tensors, opener, named))
        batches.append(batch)
    return batches


def order_notes(config: LlamaConfig, layout: Layout, naming: Naming) -> tuple[str, ...]:
    """A warning where AscendSpeed's own converter would have written, and its readers may expect, other QKV rows."""
    groups = config.num_query_groups // layout.tensor_model_parallel_size
    if not naming.mixes_groups or config.num_query_groups == config.num_attention_heads or groups <= 1:
        return ()
    return (
        f"the query heads of {groups} KV heads on each rank stand in Megatron's order, which AscendSpeed's network "
        "computes with; its own converter mixes them up. No file shows the order: read this one with "
        "--qkv-order megatron",
    )


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
            in_layer = LAYER.fullmatch(stored.name)
            name = layer_name(layers.start + int(in_layer[1]), in_layer[2]) if in_layer else stored.name
            paths[root, *path] = Stored(name, stored.part)
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
