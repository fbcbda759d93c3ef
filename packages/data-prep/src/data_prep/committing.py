"""Puts finished files in their places: old or new at any moment, or what readers refuse."""

import os
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import DataError
from data_prep.indexed_writer import IndexedWriter
from data_prep.manifest import Manifest, manifest_file, write_manifest


def check_target(prefixes: Sequence[Path], overwrite: bool) -> None:
    """Sees to it that files may be written there.

    Raises:
        DataError: They are there, or their folder is none.
    """
    folder = prefixes[0].parent
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: choose another --output-prefix")
    there = [file for prefix in prefixes for suffix in (".idx", ".bin") if (file := Path(f"{prefix}{suffix}")).exists()]
    if there and not overwrite:
        raise DataError(f"{there[0]} exists: give --overwrite to replace it, or choose another --output-prefix")


def commit(writers: Sequence[IndexedWriter], manifests: Sequence[Manifest | None]) -> None:
    """Moves every file to its place: readers refuse a `.bin` without its `.idx`, so the indices frame the change."""
    folder = writers[0].prefix.parent
    for writer in writers:
        Path(f"{writer.prefix}.idx").unlink(missing_ok=True)
        manifest_file(writer.prefix).unlink(missing_ok=True)
    _sync(folder)
    for writer, manifest in zip(writers, manifests, strict=True):
        writer.put(".bin")
        if manifest:
            write_manifest(writer.prefix, manifest)
    _sync(folder)
    for writer in writers:
        writer.put(".idx")
    _sync(folder)


def _sync(folder: Path) -> None:
    """Makes the renames so far survive a power cut before those that follow."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
