"""Reading what all layouts have in common that keep a file for each rank: which rank holds what."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.checkpoint import Contents, Piece, QkvOrder, view_pieces
from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.formats.companions import stated_config, tokenizer_files
from ckpt_tools.formats.megatron_args import config_from_args, contradiction, refuse_other_networks, says_the_same
from ckpt_tools.formats.naming import LAYER, MEGATRON_CORE, NO_WEIGHT, QKV_ORDER, Naming, naming_of, renumbered
from ckpt_tools.layout import Layout
from ckpt_tools.shard_rules import (
    QKV,
    ShardRule,
    ascendspeed_qkv_view,
    check_tensor_parallel,
    sharding,
)
from ckpt_tools.storage.files import DiskTensor, File
from ckpt_tools.storage.torch_read import read_torch
from ckpt_tools.storage.unpickle import PickleError, Record, attributes

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
    qkv_order: Any
    """What the file says of it, if anything."""


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
    tree, tensors = read_torch(file, roots=roots)
    if type(tree) is not dict:
        raise CheckpointError(f"{path} is not a checkpoint's file of a rank: it holds a {type(tree).__name__}")
    chunks: dict[Any, dict[str, DiskTensor]] = {root: {} for root in roots(tree)}
    for root in chunks:
        if type(tree.get(root)) is not dict:
            raise CheckpointError(f"{path} has no `{root}`")
    for (root, *keys), tensor in tensors.items():
        name = ".".join(map(str, keys))
        if not NO_WEIGHT.fullmatch(name):
            chunks[root][name] = tensor
    empty = next((root for root, chunk in chunks.items() if not chunk), None)
    if empty is not None:
        raise CheckpointError(f"{path} has no weights in `{empty}`")
    try:
        args = attributes(tree["args"], "Namespace") if type(tree.get("args")) is Record else {}
    except PickleError as error:
        raise CheckpointError(f"{path}: its args are unknown: {error}") from None
    return Rank(tp, pp, file, list(chunks.values()), args, tree.get(QKV_ORDER))


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
        name = next(iter(ranks[0].chunks[0]))
        raise CheckpointError(
            f"{ranks[0].file.path} holds no tensors by names of megatron-core or AscendSpeed, but {name}"
        )
    tp_size, pp_size = _sizes(ranks)
    _check_ranks(ranks, tp_size, pp_size, folder)
    _check_alike(ranks)
    args, stated = ranks[0].args, stated_config(folder)
    if naming is MEGATRON_CORE:
        refuse_other_networks(args, folder)
    from_args = config_from_args(args, folder) if args else None
    if stated and (found := contradiction(stated, args)):
        raise CheckpointError(f"{folder}: {found[0]} is {found[1]} in its config.json, {found[2]} in its args")
    split = _Split(folder, ranks, naming, tp_size, _layers(ranks, naming))
    return Contents(
        format=format or naming.label,
        config=stated or from_args,
        missing=UNSTATED,
        files=files,
        tensors=[tensor for rank in ranks for chunk in rank.chunks for tensor in chunk.values()],
        place=split.place,
        tokenizer_files=tokenizer_files(folder),
        layout=split.layout(),
        qkv_is_ambiguous=split.qkv_is_ambiguous,
        qkv_order="megatron" if all(rank.qkv_order == "megatron" for rank in ranks) else None,
    )


@dataclass(frozen=True, slots=True)
class _Split:
    """All ranks of a checkpoint, and how the model is split over them."""

    folder: Path
    ranks: Sequence[Rank]
    naming: Naming
    tp_size: int
    layers: Sequence[Sequence[range]]
    """Of each chunk: [stage][chunk]."""

    def place(self, config: LlamaConfig, qkv_order: QkvOrder) -> Iterator[tuple[str, Piece]]:
        """Where each stored tensor belongs: see `Contents`."""
        if found := contradiction(config, self.ranks[0].args):
            raise UsageError(
                f"{found[0]} is {found[1]} in the configuration given, {found[2]} in the args of {self.folder}"
            )
        check_tensor_parallel(config, self.tp_size, whole_groups=self.naming.mixes_groups)
        count = sum(len(chunk) for stage in self.layers for chunk in stage)
        if count != config.num_layers:
            raise CheckpointError(f"{self.folder} holds {count} layers, expected {config.num_layers}")
        rules = sharding(config)
        for rank in self.ranks:
            for chunk, layers in zip(rank.chunks, self.layers[rank.pp], strict=True):
                for joined, tensor in chunk.items():
                    name, part = self._canonical(joined, tensor, layers, rules)
                    if name.endswith(QKV) and qkv_order == "ascendspeed":
                        view = ascendspeed_qkv_view(config, rank.tp, self.tp_size)
                    else:
                        view = rules[name].view(rank.tp, self.tp_size, self._padded(tensor, rules[name]), part=part)
                    pieces = view_pieces(tensor, view)  # checks the shape
                    if rank.tp == 0 or rules[name].split_dim is not None:  # the first one's, of what all repeat
                        yield from ((name, piece) for piece in pieces)

    def _canonical(
        self, joined: str, tensor: DiskTensor, layers: range, rules: Mapping[str, ShardRule]
    ) -> tuple[str, int | None]:
        """A tensor's canonical name, with layers numbered over the whole model, and the fused part that it is of it."""
        stored = self.naming.stored(joined)
        name = renumbered(stored.name, layers.start) if stored else ""
        if stored is None or name not in rules:
            raise CheckpointError(f"{tensor.where} is none of a LLaMA-2's tensors")
        return name, stored.part

    def _padded(self, tensor: DiskTensor, rule: ShardRule) -> int | None:
        """Rows of a vocabulary's table on all ranks together."""
        if not rule.vocab:
            return None
        padded, entries = (*tensor.shape, 0)[0] * self.tp_size, rule.shape[0]
        if padded < entries:
            raise CheckpointError(f"{tensor.where} has room for {padded} of {entries} entries: is a rank missing?")
        return padded

    def qkv_is_ambiguous(self, config: LlamaConfig) -> bool:
        """Whether the query heads of several KV heads on a rank may stand in the order of AscendSpeed's converter."""
        grouped = config.num_query_groups != config.num_attention_heads
        return self.naming.mixes_groups and grouped and config.num_query_groups > self.tp_size

    def layout(self) -> Layout:
        """How the files are split, and whose names they have."""
        counts = tuple(sum(map(len, stage)) for stage in self.layers)
        stages, is_virtual = len(counts), len(self.layers[0]) > 1
        chunk = len(self.layers[0][0]) if is_virtual and stages > 1 else 0
        parts = {stored.part for chunk in self.ranks[0].chunks for stored in map(self.naming.stored, chunk) if stored}
        return Layout(
            tensor_model_parallel_size=self.tp_size,
            pipeline_model_parallel_size=stages,
            num_layers_per_virtual_pipeline_stage=chunk or None,
            num_layer_list=counts if len(set(counts)) > 1 and all(counts) and not is_virtual else None,
            merge_mlp=self.naming.gate_and_up is not None and 0 not in parts,
            naming=self.naming.label,
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


def _check_alike(ranks: Sequence[Rank]) -> None:
    """Ranks have equally many chunks and the same args, those of a stage the same tensors."""
    stages = {rank.pp: rank for rank in ranks if rank.tp == 0}
    for rank in ranks:
        if len(rank.chunks) != len(ranks[0].chunks):
            counts = len(rank.chunks), len(ranks[0].chunks)
            raise CheckpointError(f"{rank.file.path} holds {counts[0]} chunks of the model, the first rank {counts[1]}")
        if not says_the_same(rank.args, ranks[0].args):
            raise CheckpointError(f"{rank.file.path} has other args than {ranks[0].file.path}")
        for mine, first in zip(rank.chunks, stages[rank.pp].chunks, strict=True):
            lost = next((name for name in first if name not in mine), None)
            if lost is not None:
                raise CheckpointError(f"{rank.file.path} lacks {lost}, which the first rank of its stage has")


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
