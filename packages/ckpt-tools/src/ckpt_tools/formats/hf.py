"""Hugging Face's folder: config.json, the tokenizer's files, weights as safetensors or pytorch_model*.bin."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

from ckpt_tools.checkpoint import Contents, Piece, closing_on_error, view_pieces
from ckpt_tools.config import LlamaConfig
from ckpt_tools.dtypes import ITEM_SIZE
from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.formats.companions import GENERATION_CONFIG, stated_config, tokenizer_files
from ckpt_tools.layout import Layout
from ckpt_tools.planning import OutputFile, Planned
from ckpt_tools.shard_rules import (
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    HEAD,
    INPUT_NORM,
    MLP_NORM,
    PROJ,
    QKV,
    Range,
    View,
    layer_name,
    qkv_rows,
    sharding,
)
from ckpt_tools.storage.files import DiskTensor, File, plain_name, read_json
from ckpt_tools.storage.output import encode_json
from ckpt_tools.storage.safetensors import SafetensorsWriter, read_safetensors
from ckpt_tools.storage.torch_read import read_torch

FORMAT = "hf"
SINGLE_SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
SINGLE_BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHT_FILES = (SINGLE_SAFETENSORS, SAFETENSORS_INDEX, SINGLE_BIN, BIN_INDEX)
"""What a folder's weights are looked for in, in the order in which transformers does."""

WRITTEN = r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
"""The paths that `plan` gives to weights."""

MAX_SHARD_BYTES = 5_000_000_000
"""Of a written safetensors file; a tensor above it gets a file of its own."""

IGNORED_ENDING = ".rotary_emb.inv_freq"
"""A constant that old versions of transformers saved with the weights."""


def recognise(folder: Path) -> bool:
    """Whether the folder holds weights in this format."""
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def open_hf(folder: Path) -> Contents:
    """The contents of a Hugging Face folder.

    Raises:
        CheckpointError: A file is missing or broken, or the index names what is not there.
    """
    files: list[File] = []
    with closing_on_error(files):
        found = {name: tensor for name, tensor in _stored(folder, files).items() if not name.endswith(IGNORED_ENDING)}

    def place(config: LlamaConfig, _: str) -> Iterator[tuple[str, Piece]]:
        expected = hf_tensors(config)
        if unknown := sorted(found.keys() - expected.keys()):
            raise CheckpointError(f"{found[unknown[0]].where} is none of a LLaMA-2's tensors")
        for key, tensor in found.items():
            name, view = expected[key]
            yield from ((name, piece) for piece in view_pieces(tensor, view))
        if missing := sorted(expected.keys() - found.keys()):
            raise CheckpointError(f"{folder} lacks the tensor {missing[0]}")

    return Contents(
        format=FORMAT,
        config=stated_config(folder),
        missing="has no config.json: heads, eps and the rotary base are not known",
        files=files,
        tensors=list(found.values()),
        place=place,
        tokenizer_files=tokenizer_files(folder),
    )


def hf_tensors(config: LlamaConfig) -> dict[str, tuple[str, View]]:
    """Every tensor that LlamaForCausalLM has, in the model's order: its name to the canonical one and the part."""
    shapes = {name: rule.shape for name, rule in sharding(config).items()}

    def whole(name: str) -> tuple[str, View]:
        shape = shapes[name]
        return name, View(((0, shape[0]),), None if len(shape) == 1 else (0, shape[1]))

    def rows(name: str, ranges: Iterable[Range]) -> tuple[str, View]:
        return name, View(tuple(ranges), (0, shapes[name][1]))

    ffn = config.ffn_hidden_size
    query, key, value = qkv_rows(config)
    tensors = {"model.embed_tokens.weight": whole(EMBEDDING)}
    for n in range(config.num_layers):
        at = f"model.layers.{n}"
        qkv, fc1 = layer_name(n, QKV), layer_name(n, FC1)
        tensors |= {
            f"{at}.input_layernorm.weight": whole(layer_name(n, INPUT_NORM)),
            f"{at}.self_attn.q_proj.weight": rows(qkv, query),
            f"{at}.self_attn.k_proj.weight": rows(qkv, key),
            f"{at}.self_attn.v_proj.weight": rows(qkv, value),
            f"{at}.self_attn.o_proj.weight": whole(layer_name(n, PROJ)),
            f"{at}.post_attention_layernorm.weight": whole(layer_name(n, MLP_NORM)),
            f"{at}.mlp.gate_proj.weight": rows(fc1, [(0, ffn)]),
            f"{at}.mlp.up_proj.weight": rows(fc1, [(ffn, 2 * ffn)]),
            f"{at}.mlp.down_proj.weight": whole(layer_name(n, FC2)),
        }
    return tensors | {"model.norm.weight": whole(FINAL_NORM), "lm_head.weight": whole(HEAD)}


def _stored(folder: Path, files: list[File]) -> dict[str, DiskTensor]:
    """The tensors of the folder's weight files, which are added to `files` as they are opened."""
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file() and name.endswith(".index.json"):
            return _indexed(path, files)
        if path.is_file():
            return _tensors_of(path, files)
    raise CheckpointError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}")


def _indexed(index: Path, files: list[File]) -> dict[str, DiskTensor]:
    weight_map = read_json(index).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    shards = {}
    for shard in weight_map.values():
        path = plain_name(index.parent, shard, index)
        shards[path.name] = path
    tensors = {shard: _tensors_of(path, files) for shard, path in sorted(shards.items())}
    for name, shard in weight_map.items():
        if name not in tensors[shard]:
            raise CheckpointError(f"{index} says that {name} is in {shard}, which has no such tensor")
    return {name: tensors[shard][name] for name, shard in weight_map.items()}


def _tensors_of(path: Path, files: list[File]) -> dict[str, DiskTensor]:
    file = File(path)
    files.append(file)
    if path.suffix == ".safetensors":
        return read_safetensors(file)
    tree, tensors = read_torch(file)
    if type(tree) is not dict or len(tensors) != len(tree) or any(len(keys) > 1 for keys in tensors):
        raise CheckpointError(f"{path} is not a flat dictionary of tensors")
    return {str(key): tensor for (key,), tensor in tensors.items()}


def plan(config: LlamaConfig, layout: Layout, dtypes: Mapping[str, str]) -> Planned:
    """The files to write: safetensors in shards, and an index when there are several.

    Raises:
        UsageError: A layout was asked for, which this format has not.
    """
    if layout != Layout():
        raise UsageError("a Hugging Face folder is not split over ranks nor padded: leave out the layout's options")
    shards = _shards(config, dtypes)
    names = [SINGLE_SAFETENSORS]
    if len(shards) > 1:
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    batches = [[OutputFile(*named, SafetensorsWriter)] for named in zip(names, shards, strict=True)]
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    texts = {GENERATION_CONFIG: encode_json({"_from_model_config": True, **generation})}
    if len(shards) > 1:
        texts[SAFETENSORS_INDEX] = _index(names, shards, dtypes)
    return Planned(batches, texts)


def _shards(config: LlamaConfig, dtypes: Mapping[str, str]) -> list[dict[str, tuple[str, View]]]:
    """The tensors of each file; those that are parts of one canonical tensor stay together."""
    shards: list[dict[str, tuple[str, View]]] = [{}]
    size, previous = 0, ""
    fused = {name: prod(rule.shape) * ITEM_SIZE[dtypes[name]] for name, rule in sharding(config).items()}
    for key, (name, view) in hf_tensors(config).items():
        if name != previous:
            if size and size + fused[name] > MAX_SHARD_BYTES:
                shards.append({})
                size = 0
            size, previous = size + fused[name], name
        shards[-1][key] = name, view
    return shards


def _index(names: Sequence[str], shards: Sequence[Mapping[str, tuple[str, View]]], dtypes: Mapping[str, str]) -> bytes:
    weight_map = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
    parts = [part for shard in shards for part in shard.values()]
    total = sum(prod(view.shape) * ITEM_SIZE[dtypes[name]] for name, view in parts)
    return encode_json({"metadata": {"total_size": total}, "weight_map": weight_map})
