"""Raw files to an indexed dataset: read, handled, tokenized and written as a stream, in place only when whole."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from data_prep.errors import DataError
from data_prep.handlers import handler_class
from data_prep.indexed import IndexedWriter
from data_prep.manifests import Manifest, manifest_file, write_manifest
from data_prep.sources import files_of, records
from data_prep.tokenizing import Tokenizer


def prepare(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    *,
    tokenizer: str | Path,
    handler_name: str = "GeneralPretrainHandler",
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Writes `{output_prefix}_{key}_document.{bin,idx}` and a manifest for each key of the handler.

    Args:
        inputs: Files or folders.
        output_prefix: Where to write.
        tokenizer: A Hugging Face folder or a tokenizer's file.
        handler_name: How a record becomes documents.
        json_keys: Columns that GeneralPretrainHandler reads.
        append_eod: End each document with `</s>`.
        overwrite: Replace a data set that is there.

    Returns:
        The manifest of the first key.

    Raises:
        DataError: An input, a record or the tokenizer is broken, nothing was found, or the target exists; no file is
            left under the prefix.
        UsageError: There is no such handler.
    """
    make = handler_class(handler_name)
    files = files_of([Path(path) for path in inputs])
    encoder = Tokenizer(tokenizer)
    handle = make(encoder, list(json_keys), append_eod)
    prefixes = [Path(f"{output_prefix}{suffix}") for suffix in handle.outputs]
    _check_target(prefixes, overwrite)
    prefixes[0].parent.mkdir(parents=True, exist_ok=True)
    writers = {suffix: IndexedWriter(prefix) for suffix, prefix in zip(handle.outputs, prefixes, strict=True)}
    try:
        for file in files:
            bar = tqdm(records(file), unit="record", desc=file.name, disable=None, dynamic_ncols=True, file=sys.stderr)
            for where, record in bar:
                for suffix, ids in handle(record, where).items():
                    writers[suffix].add_document(ids)
        if empty := [suffix for suffix, writer in writers.items() if not writer.documents]:
            raise DataError(f"the input holds no document for {', '.join(empty)}")
        for writer in writers.values():
            writer.finish()
        facts = Manifest(
            inputs=[_input(file) for file in files],
            handler=handler_name,
            append_eod=append_eod,
            encoder=encoder.encoder,
            vocab_size=encoder.vocab_size,
            vocab_sha256=encoder.vocab_sha256,
            documents=0,
            tokens=0,
        )
        return _commit(list(writers.values()), facts)
    finally:
        for writer in writers.values():
            writer.discard()


def _check_target(prefixes: Sequence[Path], overwrite: bool) -> None:
    there = [prefix for prefix in prefixes if Path(f"{prefix}.idx").exists()]
    if there and not overwrite:
        raise DataError(f"{there[0]}.idx exists: give --overwrite to replace it, or choose another --output-prefix")


def _commit(writers: Sequence[IndexedWriter], facts: Manifest) -> Manifest:
    """Old indices go first, the new come last, so that a kill never leaves a mixture that readers accept."""
    for writer in writers:
        Path(f"{writer.prefix}.idx").unlink(missing_ok=True)
        manifest_file(writer.prefix).unlink(missing_ok=True)
    manifests = [replace(facts, documents=writer.documents, tokens=writer.tokens) for writer in writers]
    for writer, manifest in zip(writers, manifests, strict=True):
        write_manifest(writer.prefix, manifest)
        writer.commit()
    return manifests[0]


def _input(file: Path) -> dict[str, str | int]:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": digest.hexdigest()}
