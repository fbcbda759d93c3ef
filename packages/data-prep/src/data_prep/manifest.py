"""The manifest beside a pair of files: what it was made of, by which tokenizer and handler."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.indexed_dataset import find_prefix

FORMAT_VERSION = 1
LISTED = 1000
"""Skipped records that a manifest names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Facts of one pair of files, `{P}_{key}_document.{bin,idx}`."""

    format_version: int = FORMAT_VERSION
    data_prep_version: str
    inputs: list[dict[str, Any]]
    """Name, bytes and sha256 of each input file, in the order of reading; a shard hashes those that it begins."""
    handler: str
    append_eod: bool
    encoder: str
    """The library that made the ids, and its version."""
    vocab_size: int
    vocab_sha256: str
    """Identifies the vocabulary: see `Tokenizer.vocab_sha256`."""
    probe_sha256: str
    """Identifies the segmentation: see `Tokenizer.probe_sha256`."""
    dtype: str
    documents: int
    sequences: int
    tokens: int
    bin_sha256: str
    idx_sha256: str
    options: dict[str, Any] = field(default_factory=dict)
    """What else was asked for that the ids depend on, where it is not the default."""
    skipped: int = 0
    """Records that --skip-bad-records left out."""
    skipped_records: list[str] = field(default_factory=list)
    """The first of them, and why."""
    shard: list[int] | None = None
    """[index, count] where this is one part of a data set."""


def manifest_file(prefix: Path) -> Path:
    """Where the manifest of a pair of files lies."""
    return prefix.with_name(f"{prefix.name}.manifest.json")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a data set; None for foreign data, which has none.

    Args:
        prefix: As for `IndexedDataset`.

    Raises:
        DataError: The file is broken, or of a later format.
    """
    file = manifest_file(find_prefix(prefix))
    if not file.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if content["format_version"] > FORMAT_VERSION:
            raise DataError(
                f"{file} has format version {content['format_version']}: this data-prep reads {FORMAT_VERSION}"
            )
        known = {each.name for each in fields(Manifest)}
        return Manifest(**{name: value for name, value in content.items() if name in known})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no manifest: {error}") from None


def write_manifest(prefix: Path, manifest: Manifest) -> None:
    """Writes the manifest of a pair of files; it appears whole."""
    file = manifest_file(prefix)
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("w", encoding="utf-8") as opened:
            opened.write(json.dumps(asdict(manifest), indent=2) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
