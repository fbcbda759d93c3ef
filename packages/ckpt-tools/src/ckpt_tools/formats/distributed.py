"""megatron-core's distributed format (`torch_dist`), the model's part: `.metadata`, `__R_N.distcp`, `common.pt`.

`.metadata` is a pickle that names, for each chunk of each tensor, a byte range of a `.distcp` file; that range is a
whole torch zip file with one tensor. Of the optimizer's tensors those are read that megatron-core writes as
"fully_reshardable", each under the key of its weight; objects such as `_extra_state` are left alone.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ckpt_tools.checkpoint import Contents, Part, Piece, closing_on_error
from ckpt_tools.config import LlamaConfig
from ckpt_tools.dtypes import ITEM_SIZE
from ckpt_tools.errors import CheckpointError
from ckpt_tools.formats.companions import stated_config, tokenizer_files
from ckpt_tools.formats.megatron_args import config_from_args, refuse_other_networks
from ckpt_tools.formats.naming import MEGATRON_CORE
from ckpt_tools.shard_rules import ShardRule, layer_name, sharding
from ckpt_tools.storage import torch_pickle
from ckpt_tools.storage.files import DiskTensor, File, plain_name
from ckpt_tools.storage.torch_read import MAX_PICKLE_BYTES, read_torch
from ckpt_tools.storage.unpickle import Global, PickleError, Record, attributes

FORMAT = "torch_dist"
METADATA, LAST_WRITTEN, COMMON = ".metadata", "metadata.json", "common.pt"
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
PREFIXES: Mapping[Part, str] = {
    "weights": "",
    "main_weights": "optimizer.state.param.",
    "exp_avg": "optimizer.state.exp_avg.",
    "exp_avg_sq": "optimizer.state.exp_avg_sq.",
}
"""What stands before a weight's key where the tensor is that part of its parameter."""
STACKED = re.compile(r"decoder\.layers\.(\D.*)")
"""A tensor of all layers at once: its first dimension counts them."""

_CHECKPOINT = "torch.distributed.checkpoint"
_NAMED = {
    f"{_CHECKPOINT}.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    f"{_CHECKPOINT}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    f"{_CHECKPOINT}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch": ("Size", *ITEM_SIZE),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),  # the same, from Python 3.13 on
}
METADATA_NAMES = frozenset(Global(module, name) for module, names in _NAMED.items() for name in names)
"""What a `.metadata` that torch or megatron-core wrote names: descriptions of tensors, and no function that does more
than return one.
"""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A rectangle of a stored tensor, of any number of dimensions."""

    key: str
    offsets: tuple[int, ...]
    tensor: DiskTensor


def recognise(folder: Path) -> bool:
    """Whether the folder is in this format."""
    return (folder / METADATA).is_file()


def check_distributed_metadata(folder: str | Path) -> None:
    """Makes sure that nothing but a description of tensors comes of the `.metadata` in `folder`.

    To be called before torch or megatron-core opens a folder that others may have written: they unpickle the file
    unguarded, and so run what it names.

    Raises:
        CheckpointError: It names something else, or is malformed, or not there.
    """
    metadata = Path(folder) / METADATA
    try:
        torch_pickle.loads(_read_whole(metadata), allowed=METADATA_NAMES)
    except PickleError as error:
        raise CheckpointError(f"{metadata}: {error}: it is not opened") from None


def open_distributed(folder: Path, part: Part = "weights") -> Contents:
    """The contents of a folder that `megatron.core.dist_checkpointing` saved.

    Raises:
        CheckpointError: The save did not finish, holds no such part, or something is missing or broken.
    """
    if not (folder / LAST_WRITTEN).is_file():
        raise CheckpointError(
            f"{folder} has no {LAST_WRITTEN}, which megatron-core writes last: the save did not finish, or was another "
            "tool's"
        )
    files: dict[str, File] = {}
    opened: list[File] = []
    with closing_on_error(opened):

        def file_named(name: object) -> File:
            path = plain_name(folder, name, folder / METADATA)
            if path.name not in files:
                files[path.name] = File(path)
                opened.append(files[path.name])
            return files[path.name]

        chunks = list(_chunks(folder, file_named, PREFIXES[part]))
        if not chunks and part != "weights":
            raise CheckpointError(f"{folder} holds no optimizer's state (keys {PREFIXES[part]}…)")
        config = stated_config(folder) or _config_of_common(folder)

    def place(config: LlamaConfig, _: str) -> Iterator[tuple[str, Piece]]:
        rules = sharding(config)
        for chunk in chunks:
            yield from _place(chunk, rules)

    return Contents(
        format=FORMAT,
        config=config,
        missing="has no config.json, and no args that state heads, eps, rotary base and true vocabulary size",
        files=opened,
        tensors=[chunk.tensor for chunk in chunks],
        place=place,
        tokenizer_files=tokenizer_files(folder),
    )


def _chunks(folder: Path, file_named: Callable[[object], File], prefix: str) -> Iterator[_Chunk]:
    """Every chunk of the model's tensors that `.metadata` names behind a prefix, located in its file."""
    metadata = folder / METADATA
    try:
        state = attributes(torch_pickle.loads(_read_whole(metadata)), "Metadata")
        places = dict(_places(state))
        for key, record in state["state_dict_metadata"].items():
            if type(record) is not Record or record.func.name != "TensorStorageMetadata":
                continue
            if not (type(key) is str and key.startswith(prefix) and _is_model(key.removeprefix(prefix))):
                continue
            tensor = attributes(record, "TensorStorageMetadata")
            for described in tensor["chunks"]:
                chunk = attributes(described, "ChunkStorageMetadata")
                offsets, sizes = tuple(chunk["offsets"]), tuple(chunk["sizes"])
                name, start, length = places[key, offsets]
                yield _Chunk(key.removeprefix(prefix), offsets, _locate(file_named(name), start, length, key, sizes))
    except PickleError as error:
        raise CheckpointError(f"{metadata}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{metadata} is malformed: {type(error).__name__}: {error}") from None


def _is_model(key: str) -> bool:
    return key.startswith(MODEL_PREFIXES) and "_extra_state" not in key


def _places(state: Mapping[str, Any]) -> Iterator[tuple[tuple[str, tuple[int, ...]], tuple[object, int, int]]]:
    """Where each chunk lies: (key, offsets) to (file, first byte, length)."""
    for index, info in state["storage_data"].items():
        about, place = attributes(index, "MetadataIndex"), attributes(info, "_StorageInfo")
        if about.get("offset") is not None:
            start, length = place["offset"], place["length"]
            if any(type(n) is not int or n < 0 for n in (start, length)):
                raise PickleError(f"{about['fqn']} lies at {start!r}")
            yield (about["fqn"], tuple(about["offset"])), (place["relative_path"], start, length)


def _locate(file: File, start: int, length: int, key: str, sizes: tuple[int, ...]) -> DiskTensor:
    """The one tensor of the torch file in this byte range."""
    _, tensors = read_torch(file, start, length)
    stored = tensors.get(())
    if stored is None or stored.shape != sizes or stored.row_stride is not None:
        raise CheckpointError(f"{file.path} at {start} does not hold the chunk of {key} that {METADATA} describes")
    return DiskTensor(file, stored.start, stored.dtype, stored.shape, key)


def _place(chunk: _Chunk, rules: Mapping[str, ShardRule]) -> Iterator[tuple[str, Piece]]:
    """The chunk's pieces: one for each layer, where it holds several."""
    stacked = STACKED.fullmatch(chunk.key)
    if not stacked:
        stored = MEGATRON_CORE.stored(chunk.key)
        yield from _place_matrix(stored.name if stored else chunk.key, chunk.offsets, chunk.tensor, rules)
        return
    layers, *shape = chunk.tensor.shape
    layer_bytes = prod(shape) * ITEM_SIZE[chunk.tensor.dtype]
    suffix = MEGATRON_CORE.aliases.get(stacked[1], stacked[1])
    for n in range(layers):
        tensor = DiskTensor(
            chunk.tensor.file, chunk.tensor.start + n * layer_bytes, chunk.tensor.dtype, tuple(shape), chunk.key
        )
        yield from _place_matrix(layer_name(chunk.offsets[0] + n, suffix), chunk.offsets[1:], tensor, rules)


def _place_matrix(
    name: str, offsets: tuple[int, ...], tensor: DiskTensor, rules: Mapping[str, ShardRule]
) -> Iterator[tuple[str, Piece]]:
    rule = rules.get(name)
    if rule is None:
        raise CheckpointError(f"{tensor.where} is none of a LLaMA-2's tensors")
    if not len(rule.shape) == len(tensor.shape) == len(offsets):
        raise CheckpointError(f"{tensor.where} has the shape {list(tensor.shape)}, expected {list(rule.shape)}")
    rows = offsets[0], min(offsets[0] + tensor.shape[0], rule.shape[0])
    if not rule.vocab and offsets[0] + tensor.shape[0] > rule.shape[0]:
        raise CheckpointError(f"{tensor.where} reaches beyond the shape {list(rule.shape)}")
    columns = (offsets[1], offsets[1] + tensor.shape[1]) if len(rule.shape) > 1 else (0, 1)
    if columns[1] > (*rule.shape, 1)[1]:
        raise CheckpointError(f"{tensor.where} reaches beyond the shape {list(rule.shape)}")
    if rows[0] < rows[1]:  # a chunk of nothing but the vocabulary's padding belongs nowhere
        yield name, Piece(rows, columns, tensor, 0)


def _read_whole(path: Path) -> bytes:
    file = File(path)
    try:
        if file.size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_PICKLE_BYTES >> 20} MiB")
        return file.read(0, file.size)
    finally:
        file.close()


def _config_of_common(folder: Path) -> LlamaConfig | None:
    """The architecture from the args that Megatron-LM keeps in `common.pt`."""
    if not (folder / COMMON).is_file():
        return None
    file = File(folder / COMMON)
    try:
        tree, _ = read_torch(file)
    finally:
        file.close()
    args = tree.get("args") if type(tree) is dict else None
    if type(args) is not Record:
        return None
    stated = attributes(args, "Namespace")
    refuse_other_networks(stated, folder)
    return config_from_args(stated, folder)
