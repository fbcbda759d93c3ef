"""megatron-core's layout: `mp_rank_TT[_PPP]/model_optim_rng.pt`, one file for each tensor and pipeline rank."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.checkpoint import Contents, Piece, closing_on_error, view_pieces
from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.formats.companions import TRACKER, stated_config, tokenizer_files
from ckpt_tools.formats.megatron_args import args_for, config_from_args
from ckpt_tools.layout import Layout, OutputFile, Planned
from ckpt_tools.shard_rules import (
    EMBEDDING,
    INPUT_NORM,
    MLP_NORM,
    ShardRule,
    check_layout,
    layer_name,
    sharding,
    stage_names,
)
from ckpt_tools.storage.files import DiskTensor, File
from ckpt_tools.storage.output import Slot
from ckpt_tools.storage.torch_read import read_torch
from ckpt_tools.storage.torch_write import TorchWriter
from ckpt_tools.storage.unpickle import Record, attributes

FORMAT = "megatron-core"
FILE = "model_optim_rng.pt"
WRITTEN = rf"{TRACKER}|iter_0000001(/mp_rank_\d+(_\d+)?(/{FILE})?)?"
"""The paths that `plan` gives to the tracker and to weights, and their folders."""

RANK_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": INPUT_NORM,
    "mlp.linear_fc1.layer_norm_weight": MLP_NORM,
}
"""What Transformer Engine's layers call the norms, which they fuse with the projections that follow."""


@dataclass(frozen=True, slots=True)
class _Rank:
    tp: int
    pp: int
    file: File
    tensors: Mapping[str, DiskTensor]
    args: Mapping[str, Any]


def recognise(folder: Path) -> bool:
    """Whether the folder holds one file for each rank."""
    return any(RANK_FOLDER.match(child.name) for child in folder.glob("mp_rank_*") if child.is_dir())


def open_megatron(folder: Path) -> Contents:
    """The contents of an `iter_…` or `release` folder.

    Raises:
        CheckpointError: A rank is missing or broken.
        UsageError: It is of a layout that is not read.
    """
    files: list[File] = []
    with closing_on_error(files):
        ranks = [_open_rank(tp, pp, path, files) for (tp, pp), path in sorted(_rank_files(folder).items())]
        tp_size, pp_size = _sizes(ranks)
        _check_ranks(ranks, tp_size, pp_size, folder)
        stated = stated_config(folder)
        from_args = config_from_args(ranks[0].args, folder) if ranks[0].args else None
        _check_agreement(stated, from_args, folder)
        layers = _layers_of_stages(ranks)

    def place(config: LlamaConfig) -> Iterator[tuple[str, Piece]]:
        if sum(map(len, layers)) != config.num_layers:
            raise CheckpointError(f"{folder} holds {sum(map(len, layers))} layers, expected {config.num_layers}")
        rules = sharding(config)
        for rank in ranks:
            yield from _place_rank(rank, config.vocab_size, rules, tp_size, layers)

    return Contents(
        format=FORMAT,
        config=stated or from_args,
        missing="has no config.json, and no args that state heads, eps, rotary base and true vocabulary size",
        files=files,
        tensors=[tensor for rank in ranks for tensor in rank.tensors.values()],
        place=place,
        tokenizer_files=tokenizer_files(folder),
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
    )


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    found = {}
    for child in sorted(folder.glob("mp_rank_*")):
        named = RANK_FOLDER.fullmatch(child.name)
        if not named:
            raise UsageError(f"{child}: expert parallelism is not read")
        found[int(named[1]), int(named[2] or 0)] = child / FILE
    return found


def _open_rank(tp: int, pp: int, path: Path, files: list[File]) -> _Rank:
    file = File(path)
    files.append(file)
    tree, tensors = read_torch(file)
    if type(tree) is not dict:
        raise CheckpointError(f"{path} is not a Megatron checkpoint: it holds a {type(tree).__name__}")
    if "model0" in tree:
        raise UsageError(f"{path} is of a virtual pipeline (model0, model1, …), which is not read yet")
    model = tree.get("model")
    if type(model) is not dict or not model:
        raise CheckpointError(f"{path} has no `model`")
    if "language_model" in model or "lm_head.lm_head.weight" in model or not _has_core_names(model):
        raise UsageError(f"{path} is not in megatron-core's naming: AscendSpeed's layouts are not read yet")
    args = attributes(tree["args"], "Namespace") if type(tree.get("args")) is Record else {}
    weights = {name: tensor for (where, name, *rest), tensor in _pairs(tensors) if where == "model" and not rest}
    return _Rank(tp, pp, file, weights, args)


def _sizes(ranks: Sequence[_Rank]) -> tuple[int, int]:
    """Tensor and pipeline parallel sizes: what the folders' numbers show, or the args, where those say more."""
    shown = max(rank.tp for rank in ranks) + 1, max(rank.pp for rank in ranks) + 1
    stated = [ranks[0].args.get(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline")]
    tp_size, pp_size = (max(a, b) if type(b) is int else a for a, b in zip(shown, stated, strict=True))
    return tp_size, pp_size


def _check_ranks(ranks: Sequence[_Rank], tp_size: int, pp_size: int, folder: Path) -> None:
    """Names the first rank that is missing: its tensors would later be missed as rows of another size."""
    present = {(rank.tp, rank.pp) for rank in ranks}
    everyone = ((tp, pp) for tp in range(tp_size) for pp in range(pp_size))
    missing = next((rank for rank in everyone if rank not in present), None)
    if missing is not None:
        raise CheckpointError(
            f"{folder} lacks {_rank_folder(*missing, pp_size)}: it holds {len(ranks)} ranks of {tp_size} × {pp_size} "
            "(tensor × pipeline parallel size)"
        )


def _rank_folder(tp: int, pp: int, pp_size: int) -> str:
    return f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if pp_size > 1 else "")


def _pairs(tensors: Mapping[tuple[Any, ...], DiskTensor]) -> Iterator[tuple[tuple[Any, ...], DiskTensor]]:
    """Tensors that lie at least two keys deep, and are no state of Transformer Engine's."""
    return ((path, t) for path, t in tensors.items() if len(path) > 1 and not str(path[1]).endswith("_extra_state"))


def _has_core_names(model: Mapping[Any, Any]) -> bool:
    return any(type(name) is str and name.startswith(("embedding.", "decoder.", "output_layer.")) for name in model)


def _check_agreement(stated: LlamaConfig | None, from_args: LlamaConfig | None, folder: Path) -> None:
    if stated and from_args:
        for name, (ours, theirs) in stated.differences(from_args).items():
            raise CheckpointError(f"{folder}: {name} is {ours} in its config.json, {theirs} in its args")


def _layers_of_stages(ranks: Sequence[_Rank]) -> list[range]:
    """The layers of each pipeline stage, from how many each holds: stages need not be of one size."""
    stages: list[range] = []
    for rank in ranks:
        if rank.tp == 0:
            numbers = {int(named[1]) for name in rank.tensors if (named := LAYER.fullmatch(name))}
            if numbers != set(range(len(numbers))):
                raise CheckpointError(f"{rank.file.path}: its layers are not numbered from 0")
            first = stages[-1].stop if stages else 0
            stages.append(range(first, first + len(numbers)))
    return stages


def _place_rank(
    rank: _Rank, vocab_size: int, rules: Mapping[str, ShardRule], tp_size: int, layers: Sequence[range]
) -> Iterator[tuple[str, Piece]]:
    for stored, tensor in rank.tensors.items():
        name = canonical_name(stored, layers[rank.pp].start)
        if name not in rules:
            raise CheckpointError(f"{tensor.where} is none of a LLaMA-2's tensors")
        padded = (*tensor.shape, 0)[0] * tp_size if rules[name].vocab else None
        if padded is not None and padded < vocab_size:
            raise CheckpointError(f"{tensor.where} has room for {padded} of {vocab_size} entries")
        view = rules[name].view(rank.tp, tp_size, padded)
        pieces = view_pieces(tensor, view)
        if rank.tp == 0 or rules[name].split_dim is not None:  # what every rank repeats is read from the first
            yield from ((name, piece) for piece in pieces)


def canonical_name(stored: str, first_layer: int = 0) -> str:
    """The canonical name of a tensor of a stage whose first layer has this number over the whole model."""
    named = LAYER.fullmatch(stored)
    if not named:
        return stored
    return layer_name(first_layer + int(named[1]), FUSED_NORMS.get(named[2], named[2]))


def plan(config: LlamaConfig, layout: Layout, dtypes: Mapping[str, str]) -> Planned:
    """The files to write: a batch for each pipeline stage, in it a file for each tensor rank.

    Raises:
        UsageError: The model does not divide into the layout, or would be padding for the most part.
    """
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    check_layout(config, tp, pp)
    padded = _padded_vocab_size(config, layout)
    rules = sharding(config)
    args = args_for(config, tp, pp, layout.make_vocab_size_divisible_by, dtypes[EMBEDDING])
    batches = []
    for stage in range(pp):
        names = stage_names(config, stage, pp)
        batch = []
        for rank in range(tp):
            tensors = {stored: (name, rules[name].view(rank, tp, padded)) for stored, name in names.items()}
            path = f"iter_0000001/{_rank_folder(rank, stage, pp)}/{FILE}"
            batch.append(OutputFile(path, tensors, lambda path, slots: _writer(path, slots, args)))
        batches.append(batch)
    return Planned(batches, {TRACKER: b"1"})


def _padded_vocab_size(config: LlamaConfig, layout: Layout) -> int:
    """Rows of the vocabulary with padding, which is limited: a mistyped number would fill the disk with it.

    Small vocabularies may still be padded by Megatron's usual divisor, 128.
    """
    tp, divisible_by = layout.tensor_model_parallel_size, layout.make_vocab_size_divisible_by
    padded = config.padded_vocab_size(tp, divisible_by)
    if padded > max(2 * config.vocab_size, 128 * tp):
        raise UsageError(
            f"{config.vocab_size} vocabulary entries would be padded to {padded}: give a smaller "
            f"make_vocab_size_divisible_by than {divisible_by} (times {tp} tensor-parallel ranks)"
        )
    return padded


def _writer(path: Path, slots: Sequence[Slot], args: Any) -> TorchWriter:
    model = {slot.name: slot for slot in slots}
    return TorchWriter(path, {"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": model})
