"""Data sets joined without tokenizing again: several of them, or the shards of one."""

import glob
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.committing import check_target, commit
from data_prep.errors import DataError, UsageError
from data_prep.indexed_dataset import IndexedDataset, find_prefixes, missing
from data_prep.indexed_writer import CODES, Block, IndexedWriter
from data_prep.manifest import LISTED, Manifest, read_manifest

_BLOCK = 1 << 20
"""Bounds of documents that are copied at a time."""
_KEY = re.compile(r"_(packed_(input_ids|attention_mask|labels)|[^_]+)_document$")


def merge(prefixes: Sequence[str | Path], output_prefix: str | Path, *, overwrite: bool = False) -> list[Manifest]:
    """Writes the documents of several data sets, one set after another, as one.

    Args:
        prefixes: `P` stands for all its keys, or for all its shards if there is no data set of that name itself;
            `P_{key}_document` stands for one key. All have the same keys.
        output_prefix: Where to write.
        overwrite: Replace a data set that is there.

    Returns:
        The manifest of each key; none where a data set is foreign and has none.

    Raises:
        DataError: A data set is missing or broken, or they do not go together: keys, types, vocabularies, shards.
        UsageError: Nothing to merge, or no name for the output.
    """
    if not prefixes or not str(output_prefix) or str(output_prefix).endswith(("/", "/.", "/..")):
        raise UsageError("merge needs data sets, and --output-prefix a name for the new one")
    prefixes = [part for prefix in prefixes for part in _with_shards(prefix)]
    parts = [_keys(prefix) for prefix in prefixes]
    for prefix, keys in zip(prefixes, parts, strict=True):
        if list(keys) != list(parts[0]):
            raise DataError(f"{prefix} has the keys {', '.join(keys)}, {prefixes[0]} {', '.join(parts[0])}")
    targets = {key: Path(f"{output_prefix}{key}") for key in parts[0]}
    check_target(list(targets.values()), overwrite)
    if overwritten := {path for keys in parts for path in keys.values()} & set(targets.values()):
        raise UsageError(f"{overwritten.pop()} cannot be read and replaced at once: choose another --output-prefix")
    manifests = {key: _joined([keys[key] for keys in parts]) for key in targets}
    next(iter(targets.values())).parent.mkdir(parents=True, exist_ok=True)
    writers: dict[str, IndexedWriter] = {}
    try:
        for key, target in targets.items():
            writers[key] = _written(target, [IndexedDataset(keys[key]) for keys in parts], writers, key)
        if not any(writer.documents for writer in writers.values()):
            raise DataError(f"there is no document in {', '.join(map(str, prefixes))}")
        found = [_counted(manifests[key], writer) for key, writer in writers.items()]
        commit(list(writers.values()), found)
        return [each for each in found if each]
    finally:
        for writer in writers.values():
            writer.discard()


def _with_shards(prefix: str | Path) -> list[str | Path]:
    """The shards that `prefix` stands for; itself where it has none."""
    path = Path(prefix)
    if find_prefixes(path):
        return [prefix]
    shard = re.compile(rf"{re.escape(path.name)}-\d{{5}}-of-(\d{{5}})_.*_document\.idx")
    files = path.parent.glob(f"{glob.escape(path.name)}-*.idx")
    found = [match for file in files if (match := shard.fullmatch(file.name))]
    counts = sorted({int(match.group(1)) for match in found})
    if len(counts) > 1:
        raise DataError(f"{path} has shards of {counts[0]} and of {counts[1]}: name those that belong together")
    return [f"{path}-{at:05}-of-{counts[0]:05}" for at in range(counts[0])] if counts else [prefix]


def _keys(prefix: str | Path) -> dict[str, Path]:
    """Suffix of the output to full prefix, of each key of a data set."""
    found = find_prefixes(prefix)
    if not found:
        raise missing(Path(f"{prefix}.idx"))
    keys = {}
    for path in found:
        match = _KEY.search(path.name)
        bare = path.name.removeprefix(Path(prefix).name) if len(found) > 1 or path != Path(prefix) else ""
        if not bare and not match:
            raise DataError(f"{path} is not named P_KEY_document: give the data set its name first")
        keys[bare or (match.group() if match else "")] = path
    return keys


def _written(
    target: Path, parts: Sequence[IndexedDataset], writers: dict[str, IndexedWriter], key: str
) -> IndexedWriter:
    kinds = {part.dtype.name for part in parts}
    if len(kinds) > 1 or not kinds <= set(CODES):
        raise DataError(f"data sets of different types cannot be merged: {', '.join(sorted(kinds))}")
    writer = writers[key] = IndexedWriter(target, kinds.pop())
    for part in parts:
        for block in _blocks(part):
            writer.add(block)
    writer.finish()
    return writer


def _blocks(data: IndexedDataset) -> Iterator[Block]:
    """A data set in pieces: sequences first, then the bounds of documents."""
    nothing = np.empty(0, np.int32)
    for begin, end in data.pieces():
        yield Block(data.span(begin, end), data.sequence_lengths[begin:end], nothing)
    bounds = data.document_indices
    for at in range(0, len(bounds) - 1, _BLOCK):
        yield Block(nothing, nothing, np.diff(bounds[at : at + _BLOCK + 1]))


def _joined(parts: Sequence[Path]) -> Manifest | None:
    """What the manifests of one key say together, counts and hashes aside."""
    found = [(path, read_manifest(path)) for path in parts]
    foreign = [path for path, manifest in found if manifest is None]
    if foreign:
        print(f"warning: {foreign[0]} has no manifest: nothing is known of its vocabulary", file=sys.stderr)
        return None
    manifests = [manifest for _, manifest in found if manifest]
    first = manifests[0]
    for path, manifest in zip(parts, manifests, strict=True):
        if manifest.vocab_sha256 != first.vocab_sha256 or manifest.probe_sha256 != first.probe_sha256:
            raise DataError(f"{path} was made with another tokenizer than {parts[0]}: they do not go together")
    _check_shards(parts, manifests)
    same = all(manifest.handler == first.handler and manifest.options == first.options for manifest in manifests)
    return replace(
        first,
        data_prep_version=metadata.version("puna-data-prep"),
        inputs=_inputs(manifests),
        handler=first.handler if same else "several",
        options=first.options if same else {},
        append_eod=all(manifest.append_eod for manifest in manifests),
        skipped=sum(manifest.skipped for manifest in manifests),
        skipped_records=[line for manifest in manifests for line in manifest.skipped_records][:LISTED],
        shard=None,
    )


def _check_shards(parts: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    shards = [manifest.shard for manifest in manifests]
    if not any(shards):
        return
    for at, (path, shard) in enumerate(zip(parts, shards, strict=True)):
        if shard != [at, len(parts)]:
            of = f"shard {shard[0]} of {shard[1]}" if shard else "no shard"
            raise DataError(f"{path} is {of}, where shard {at} of {len(parts)} was expected: name all, in their order")
    kinds = {(manifest.handler, manifest.append_eod, str(manifest.options)) for manifest in manifests}
    names = {tuple((each["name"], each["bytes"]) for each in manifest.inputs) for manifest in manifests}
    if len(kinds) > 1 or len(names) > 1:
        raise DataError(f"{parts[0]} and the other shards are not of one data set: inputs or options differ")


def _inputs(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """All inputs; those of shards are the same list, of which each shard has hashed some."""
    if not manifests[0].shard:
        return [each for manifest in manifests for each in manifest.inputs]
    columns = zip(*(manifest.inputs for manifest in manifests), strict=True)
    return [next((each for each in column if each["sha256"]), column[0]) for column in columns]


def _counted(manifest: Manifest | None, writer: IndexedWriter) -> Manifest | None:
    if manifest is None:
        return None
    return replace(
        manifest,
        dtype=writer.dtype.name,
        documents=writer.documents,
        sequences=writer.sequences,
        tokens=writer.tokens,
        bin_sha256=writer.sha256[".bin"],
        idx_sha256=writer.sha256[".idx"],
    )
