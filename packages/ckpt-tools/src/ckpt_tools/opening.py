"""`open_checkpoint`: finds what kind of checkpoint a path holds, and opens it."""

from pathlib import Path

from ckpt_tools.checkpoint import Checkpoint, Contents
from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.formats import distributed, hf, megatron
from ckpt_tools.formats.companions import CONFIG, TRACKER
from ckpt_tools.storage.atomic import recover
from ckpt_tools.storage.files import close_all

READERS = (
    (distributed.recognise, distributed.open_distributed),
    (megatron.recognise, megatron.open_megatron),
    (hf.recognise, hf.open_hf),
)
NOT_YET = {
    "mp_rank_*_model_states.pt": "DeepSpeed",
    "latest": "DeepSpeed",
    "adapter_config.json": "PEFT",
}
"""Signs of formats that are known, but not read."""


def open_checkpoint(path: str | Path, config: LlamaConfig | None = None) -> Checkpoint:
    """The checkpoint at `path`, open for reading: nothing but headers has been read.

    Args:
        path: A training run's folder (its latest checkpoint), a Megatron folder with its tracker, one of its
            `iter_…` or `release` folders, a folder of megatron-core's distributed format, or a Hugging Face folder.
        config: The architecture, for folders that do not state it.

    Raises:
        CheckpointError: There is nothing, nothing that is known, or something broken.
        UsageError: `config` contradicts what the folder states, or the format is not read yet.
    """
    folder = resolve(Path(path))
    contents = _contents(folder)
    try:
        return Checkpoint(folder, contents, config)
    except BaseException:
        close_all(contents.files)
        raise


def resolve(path: Path) -> Path:
    """The folder that holds the files themselves: follows a run's or a Megatron folder's tracker.

    Raises:
        CheckpointError: There is no such folder, or the tracker names none.
    """
    recover(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file: give the checkpoint's folder")
    for folder in (path / "checkpoints", path):
        if (folder / TRACKER).is_file():
            return _tracked(folder)
    return path


def looks_like_checkpoint(path: Path) -> bool:
    """Whether the folder has the outward signs of a checkpoint, whole or broken, or is empty."""
    empty = path.is_dir() and not any(path.iterdir())
    return empty or (path / TRACKER).is_file() or any(known(path) for known, _ in READERS)


def _tracked(folder: Path) -> Path:
    tracker = folder / TRACKER
    stated = tracker.read_bytes()[:64].decode("utf-8", "replace").strip()
    if stated != "release" and not (stated.isascii() and stated.isdigit()):
        raise CheckpointError(f"{tracker} holds {stated!r}: neither an iteration nor `release`")
    named = folder / (stated if stated == "release" else f"iter_{int(stated):07d}")
    if not named.is_dir():
        raise CheckpointError(f"{tracker} names {named.name}, which does not exist")
    return named


def _contents(folder: Path) -> Contents:
    for recognise, read in READERS:
        if recognise(folder):
            return read(folder)
    for sign, kind in NOT_YET.items():
        if any(folder.glob(sign)):
            raise UsageError(f"{folder} is a {kind} checkpoint, which is not read yet")
    if (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has a {CONFIG}, but none of {', '.join(hf.WEIGHT_FILES)}")
    raise CheckpointError(
        f"{folder} is not a checkpoint: it has neither weights of a Hugging Face model, nor mp_rank_… folders, "
        f"nor {distributed.METADATA}, nor {TRACKER}"
    )
