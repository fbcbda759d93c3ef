"""The manifest beside a data set: what it was made of, by which tokenizer and handler."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.errors import DataError
from data_prep.indexed import find_prefix

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Facts of one data set."""

    format_version: int = FORMAT_VERSION
    inputs: list[dict[str, str | int]]
    handler: str
    append_eod: bool
    encoder: str
    vocab_size: int
    vocab_sha256: str
    documents: int
    tokens: int


def manifest_file(prefix: Path) -> Path:
    """Where the manifest of a pair of files lies."""
    return prefix.with_name(f"{prefix.name}.manifest.json")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a data set; None for foreign data, which has none.

    Raises:
        DataError: The file is broken.
    """
    file = manifest_file(find_prefix(prefix))
    if not file.exists():
        return None
    try:
        return Manifest(**json.loads(file.read_text("utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise DataError(f"{file} is no manifest: {error}") from None


def write_manifest(prefix: Path, manifest: Manifest) -> None:
    """Writes the manifest of a data set."""
    manifest_file(prefix).write_text(json.dumps(asdict(manifest), indent=2) + "\n", "utf-8")
