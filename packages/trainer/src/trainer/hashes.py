"""A checkpoint's manifest: size and SHA-256 of every file, so that a damaged one is found before it is trained on."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from trainer.errors import TrainerError

MANIFEST = "manifest.json"
_PART = ".hashes-{}.json"


def leave_hashes(folder: Path, rank: int, files: Iterable[Path]) -> None:
    """Writes down the hashes of the files that a rank has written into `folder`, for `write_manifest`."""
    found = {file.name: _fingerprint(file) for file in files}
    (folder / _PART.format(rank)).write_text(json.dumps(found), "utf-8")


def write_manifest(folder: Path) -> None:
    """The manifest of everything in `folder`; hashes that the ranks have left there become part of it."""
    found: dict[str, dict[str, int | str]] = {}
    for part in sorted(folder.glob(_PART.format("*"))):
        found |= json.loads(part.read_text("utf-8"))
        part.unlink()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    entries = {file.name: found.get(file.name) or _fingerprint(file) for file in files}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n", "utf-8")


def damage(folder: Path, share: int, shares: int) -> str | None:
    """What is wrong with the files of a checkpoint: a line, or None. One of `shares` ranks reads every so many-th file.

    Raises:
        TrainerError: There is no manifest.
    """
    try:
        entries = dict(json.loads((folder / MANIFEST).read_text("utf-8"))["files"])
    except FileNotFoundError:
        raise TrainerError(f"{folder} has no {MANIFEST}: it is no finished checkpoint of this trainer") from None
    except (ValueError, TypeError, KeyError):
        raise TrainerError(f"{folder / MANIFEST} is damaged") from None
    there = {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".nfs")}
    if strangers := there - entries.keys() - {MANIFEST}:
        return f"{folder / min(strangers)} is none of the files that {MANIFEST} says were written"
    for name, expected in sorted(entries.items())[share::shares]:
        file = folder / Path(name).name
        if not file.is_file():
            return f"{file} is missing"
        if _fingerprint(file) != expected:
            return f"{file} is damaged: it is not what {MANIFEST} says was written"
    return None


def _fingerprint(file: Path) -> dict[str, int | str]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
