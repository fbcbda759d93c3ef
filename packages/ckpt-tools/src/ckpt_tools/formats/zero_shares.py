"""The optimizer's state of DeepSpeed's ZeRO: flat fp32 shares in `[bf16_]zero_pp_rank_DD_mp_rank_TT_optim_states.pt`.

D counts the data-parallel ranks, T the tensor-parallel ones. A rank has a few flat tensors, one for each group of
parameters: the weights that it steps, and two more of the same length with their moments.

- Stages 1 and 2: a flat tensor is the rank's even share of the whole group. `param_slice_mappings` says where in it the
  elements of which parameters lie; those of one parameter continue from rank to rank.
- Stage 3: it holds an even share of each of the group's parameters, one behind the other, the last rank's padded. Their
  order and shapes stand as `param_shapes` in `zero_pp_rank_DD_mp_rank_TT_model_states.pt`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ckpt_tools.checkpoint import Contents, Part, Piece, QkvOrder
from ckpt_tools.config import LlamaConfig
from ckpt_tools.dtypes import ITEM_SIZE
from ckpt_tools.errors import CheckpointError
from ckpt_tools.formats.companions import stated_config, tokenizer_files
from ckpt_tools.formats.naming import Naming, naming_of
from ckpt_tools.formats.ranks import UNSTATED
from ckpt_tools.layout import Layout
from ckpt_tools.shard_rules import QKV, ShardRule, View, ascendspeed_qkv_view, sharding
from ckpt_tools.storage.files import DiskTensor, File
from ckpt_tools.storage.torch_read import read_torch
from ckpt_tools.storage.unpickle import PickleError, attributes

SHARE_FILE = re.compile(r"(bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
STATE = "optimizer_state_dict"


@dataclass(frozen=True, slots=True)
class _Elements:
    """Consecutive elements of a tensor-parallel rank's shard of a parameter."""

    name: str
    """As DeepSpeed's files call the parameter."""
    tp: int
    begin: int
    """The first one in the shard, in row-major order."""
    count: int
    flat: DiskTensor
    at: int
    """Where they begin in the flat tensor."""


@dataclass(frozen=True, slots=True)
class _File:
    """An open file of a rank's state."""

    dp: int
    tp: int
    file: File
    state: Mapping[str, Any]
    tensors: Mapping[tuple[Any, ...], DiskTensor]

    @property
    def is_stage_3(self) -> bool:
        return "fp32_flat_groups" in self.state

    @property
    def partition_count(self) -> int | None:
        """The data-parallel size, where the file says it."""
        stated = self.state.get("partition_count")
        count = stated[0] if type(stated) is list and stated else stated
        return count if type(count) is int and count > 0 else None

    def flat(self, group: int, part: Part) -> DiskTensor:
        """The flat tensor of a group of parameters."""
        if part == "main_weights":
            key = "fp32_flat_groups" if self.is_stage_3 else "single_partition_of_fp32_groups"
            path: tuple[Any, ...] = (STATE, key, group)
        else:
            path = (STATE, STATE if self.is_stage_3 else "base_optimizer_state", "state", group, part)
        if path not in self.tensors:
            raise CheckpointError(f"{self.file.path} has no {'.'.join(map(str, path))}: was it saved before a step?")
        return self.tensors[path]


def contents(folder: Path, files: list[File], format: str, part: Part) -> Contents:
    """What the shares hold together.

    Args:
        folder: The folder of the files.
        files: Those to close: opened ones are added.
        format: The format's name.
        part: Main weights or a moment.

    Raises:
        CheckpointError: There are none, a rank's is missing or broken, or the names are of no known layout.
    """
    opened = [_open(path, files) for path in sorted(folder.iterdir()) if SHARE_FILE.fullmatch(path.name)]
    if not opened:
        raise CheckpointError(f"{folder} holds no optimizer's state ([bf16_]zero_pp_rank_…_optim_states.pt)")
    opened.sort(key=lambda share: (share.tp, share.dp))
    dp_size = _check_ranks(folder, opened)
    try:
        elements = [found for share in opened for found in _elements(folder, share, dp_size, part, files)]
    except (PickleError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{folder}: the optimizer's state is malformed: {error}") from None
    if not opened[0].is_stage_3:
        elements = list(_continued(elements))
    naming = naming_of({element.name for element in elements})
    if naming is None:
        raise CheckpointError(f"{folder} holds no parameters by names of megatron-core or AscendSpeed")
    tp_size = opened[-1].tp + 1
    shares = _Shares(folder, elements, naming, tp_size)
    return Contents(
        format=format,
        config=stated_config(folder),
        missing=UNSTATED,
        files=files,
        tensors=list({id(element.flat): element.flat for element in elements}.values()),
        place=shares.place,
        tokenizer_files=tokenizer_files(folder),
        layout=Layout(tensor_model_parallel_size=tp_size, naming=naming.label),
        qkv_is_ambiguous=shares.qkv_is_ambiguous,
    )


def _open(path: Path, files: list[File]) -> _File:
    named = SHARE_FILE.fullmatch(path.name)
    assert named is not None
    tree, tensors = _read(path, files)
    state = tree.get(STATE) if type(tree) is dict else None
    if type(state) is not dict:
        raise CheckpointError(f"{path} has no `{STATE}`")
    return _File(int(named[2]), int(named[3]), files[-1], state, tensors)


def _read(path: Path, files: list[File]) -> tuple[Any, dict[tuple[Any, ...], DiskTensor]]:
    files.append(File(path))
    return read_torch(files[-1], roots=lambda _: [STATE])


def _check_ranks(folder: Path, opened: Sequence[_File]) -> int:
    """The data-parallel size, after a look for the first rank that is missing."""
    counts = {share.partition_count: share.file.path for share in opened}
    if len(counts) > 1:
        (one, file), (other, other_file), *_ = counts.items()
        raise CheckpointError(
            f"{file} is one of {one} shares, {other_file} one of {other}: they are of two checkpoints"
        )
    dp_size = opened[0].partition_count or max(share.dp for share in opened) + 1
    present = {(share.tp, share.dp) for share in opened}
    everyone = ((tp, dp) for tp in range(opened[-1].tp + 1) for dp in range(dp_size))
    missing = next((rank for rank in everyone if rank not in present), None)
    if missing is not None:
        tp, dp = missing
        raise CheckpointError(
            f"{folder} lacks the share of data-parallel rank {dp} of {dp_size}, tensor-parallel rank {tp}"
        )
    return dp_size


def _elements(folder: Path, share: _File, dp_size: int, part: Part, files: list[File]) -> Iterator[_Elements]:
    """A rank's elements of every parameter; of stages 1 and 2 as if they were each parameter's first ones."""
    if not share.is_stage_3:
        for group, mapping in enumerate(share.state["param_slice_mappings"]):
            for name, record in mapping.items():
                place = attributes(record, "fragment_address")
                yield _checked(_Elements(name, share.tp, 0, place["numel"], share.flat(group, part), place["start"]))
        return
    tree, _ = _read(folder / f"zero_pp_rank_{share.dp}_mp_rank_{share.tp:02d}_model_states.pt", files)
    for group, shapes in enumerate(tree["param_shapes"]):
        at = 0
        for name, shape in shapes.items():
            size = -(-prod(shape) // dp_size)
            begin = share.dp * size
            count = max(0, min(size, prod(shape) - begin))
            if count:
                yield _checked(_Elements(name, share.tp, begin, count, share.flat(group, part), at))
            at += size
        if (length := share.flat(group, part).shape) != (at,):
            raise CheckpointError(f"{share.file.path} holds {list(length)} elements of group {group}, expected [{at}]")


def _checked(elements: _Elements) -> _Elements:
    numbers = (elements.begin, elements.count, elements.at)
    if type(elements.name) is not str or any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError(f"{elements.flat.where}: it holds {elements.name!r} at {numbers}")
    if len(elements.flat.shape) != 1 or elements.at + elements.count > elements.flat.shape[0]:
        raise CheckpointError(f"{elements.flat.where} is too short for {elements.name}")
    return elements


def _continued(elements: Sequence[_Elements]) -> Iterator[_Elements]:
    """The elements of stages 1 and 2 where they belong: behind those of the ranks before."""
    done: dict[tuple[str, int], int] = {}
    for found in elements:
        begin = done.get((found.name, found.tp), 0)
        yield _Elements(found.name, found.tp, begin, found.count, found.flat, found.at)
        done[found.name, found.tp] = begin + found.count


@dataclass(frozen=True, slots=True)
class _Shares:
    """All ranks' elements, and whose names they have."""

    folder: Path
    elements: Sequence[_Elements]
    naming: Naming
    tp_size: int

    def place(self, config: LlamaConfig, qkv_order: QkvOrder) -> Iterator[tuple[str, Piece]]:
        """Where they belong: see `Contents`."""
        rules = sharding(config)
        sizes: dict[tuple[str, int], int] = {}
        for found in self.elements:
            sizes[found.name, found.tp] = found.begin + found.count
        for found in self.elements:
            stored = self.naming.stored(found.name)
            if stored is None or stored.name not in rules:
                raise CheckpointError(f"{self.folder}: {found.name} is none of a LLaMA-2's tensors")
            rule = rules[stored.name]
            if found.tp and rule.split_dim is None:
                continue  # every rank has the same
            size = sizes[found.name, found.tp]
            if stored.name.endswith(QKV) and qkv_order == "ascendspeed":
                view = ascendspeed_qkv_view(config, found.tp, self.tp_size)
            else:
                view = rule.view(found.tp, self.tp_size, self._padded(rule, size), part=stored.part)
            if prod(view.shape) != size:
                raise CheckpointError(
                    f"{self.folder} holds {size} elements of {found.name} on a rank, expected {list(view.shape)}"
                )
            yield from ((stored.name, piece) for piece in _pieces(found, view))

    def _padded(self, rule: ShardRule, size: int) -> int | None:
        """Rows of a vocabulary's table on all ranks together."""
        return max(size // rule.shape[1] * self.tp_size, rule.shape[0]) if rule.vocab else None

    def qkv_is_ambiguous(self, config: LlamaConfig) -> bool:
        """As for the weights in AscendSpeed's layouts."""
        grouped = config.num_query_groups != config.num_attention_heads
        return self.naming.mixes_groups and grouped and config.num_query_groups > self.tp_size


def _pieces(found: _Elements, view: View) -> Iterator[Piece]:
    """A range of a row-major matrix as rectangles of the canonical tensor; the vocabulary's padding belongs to none."""
    width = (*view.shape, 1)[1]
    left = view.columns[0] if view.columns else 0
    for (top, bottom), (first, last) in _rectangles(found.begin, found.begin + found.count, width):
        start = found.flat.start + (found.at + top * width + first - found.begin) * ITEM_SIZE[found.flat.dtype]
        shape = (bottom - top, last - first) if view.columns else (bottom - top,)
        tensor = DiskTensor(found.flat.file, start, found.flat.dtype, shape, found.name)
        at = 0
        for rows in view.between(top, bottom).rows:
            yield Piece(rows, (left + first, left + last), tensor, at)
            at += rows[1] - rows[0]


def _rectangles(begin: int, end: int, width: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Rows and columns of up to three rectangles: the rest of a row, whole rows, the beginning of a row."""
    first, last = begin // width, end // width
    if first == last:
        yield (first, first + 1), (begin % width, end % width)
        return
    if begin % width:
        yield (first, first + 1), (begin % width, width)
        first += 1
    if first < last:
        yield (first, last), (0, width)
    if end % width:
        yield (last, last + 1), (0, end % width)
