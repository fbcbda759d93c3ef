"""`open_checkpoint`: finds what kind of checkpoint a path holds, and opens it."""

from pathlib import Path

from ckpt_tools.checkpoint import Checkpoint, Contents
from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import CheckpointError
from ckpt_tools.formats import hf
from ckpt_tools.storage.files import close_all

TRACKER = "latest_checkpointed_iteration.txt"


def open_checkpoint(path: str | Path, config: LlamaConfig | None = None) -> Checkpoint:
    """The checkpoint at `path`, open for reading: nothing but headers has been read.

    Args:
        path: A training run's folder (its latest checkpoint), a Megatron folder with its tracker, one of its
            `iter_…` or `release` folders, a folder of megatron-core's distributed format, or a Hugging Face folder.
        config: The architecture, for folders that do not state it.

    Raises:
        CheckpointError: There is nothing, nothing that is known, or something broken.
        UsageError: `config` contradicts what the folder states.
    """
    folder = resolve(Path(path))
    contents = _contents(folder)
    try:
        return Checkpoint(folder, contents, config)
    except BaseException:
        close_all(contents.files)
        raise


def resolve(path: Path) -> Path:
    """The folder that holds the files themselves: follows a run's or a Megatron folder's tracker."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file: give the checkpoint's folder")
    for folder in (path / "checkpoints", path):
        if (folder / TRACKER).is_file():
            return _tracked(folder)
    return path


def _tracked(folder: Path) -> Path:
    stated = (folder / TRACKER).read_bytes()[:64].decode("utf-8", "replace").strip()
    if stated != "release" and not (stated.isascii() and stated.isdigit()):
        raise CheckpointError(f"{folder / TRACKER} holds {stated!r}: neither an iteration nor `release`")
    named = folder / (stated if stated == "release" else f"iter_{int(stated):07d}")
    if not named.is_dir():
        raise CheckpointError(f"{folder / TRACKER} names {named.name}, which does not exist")
    return named


def _contents(folder: Path) -> Contents:
    if hf.recognise(folder):
        return hf.open_hf(folder)
    raise CheckpointError(f"{folder} is not a checkpoint that is known here")
