"""`open_checkpoint`: finds what kind of checkpoint a path holds, and opens it."""

from collections.abc import Callable
from pathlib import Path

from ckpt_tools import qkv_order as orders
from ckpt_tools.checkpoint import Checkpoint, Contents, Part, QkvOrder
from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.formats import deepspeed, distributed, hf, megatron
from ckpt_tools.formats.companions import CONFIG, LATEST, TRACKER
from ckpt_tools.storage.atomic import recover
from ckpt_tools.storage.files import close_all


def _weights_only(read: Callable[[Path], Contents]) -> Callable[[Path, Part], Contents]:
    """The reader of a format of which nothing but weights is read."""

    def read_part(folder: Path, part: Part) -> Contents:
        if part != "weights":
            raise CheckpointError(f"{folder} holds weights in a format of which no optimizer's {part} is read")
        return read(folder)

    return read_part


READERS: tuple[tuple[Callable[[Path], bool], Callable[[Path, Part], Contents]], ...] = (
    (distributed.recognise, distributed.open_distributed),
    (megatron.recognise, _weights_only(megatron.open_megatron)),
    (deepspeed.recognise, deepspeed.open_deepspeed),
    (hf.recognise, _weights_only(hf.open_hf)),
)
PEFT_SIGN = "adapter_config.json"


def open_checkpoint(
    path: str | Path,
    config: LlamaConfig | None = None,
    *,
    qkv_order: QkvOrder | None = None,
    reference: str | Path | None = None,
    part: Part = "weights",
) -> Checkpoint:
    """The checkpoint at `path`, open for reading: nothing but headers has been read.

    Args:
        path: A training run's folder (its latest checkpoint), a Megatron or DeepSpeed folder with its tracker, one of
            its `iter_…`, `release` or tag folders, a folder of megatron-core's distributed format, or a Hugging Face
            folder.
        config: The architecture, for folders that do not state it.
        qkv_order: "megatron" or "ascendspeed", for AscendSpeed's layouts with several KV heads on each rank. What its
            network was trained in, and what is written here, is Megatron's order; its converter wrote another one.
        reference: A Hugging Face folder of the model that such a checkpoint was made from: its weights decide it.
        part: Read what a run's optimizer keeps instead of the weights, under the same names and in the same shapes:
            the fp32 weights that it steps, or one of Adam's moments. Runs of `trainer` (both modes) and DeepSpeed's
            ZeRO folders hold them.

    Raises:
        CheckpointError: There is nothing, nothing that is known, no such part, or something broken.
        UsageError: `config` contradicts what the folder states, the format is not read yet, or `reference` is another
            model.
    """
    if qkv_order not in (None, *orders.ORDERS):
        raise UsageError(f"{qkv_order!r} is no order of heads: choose from {', '.join(orders.ORDERS)}")
    if qkv_order and reference:
        raise UsageError(
            f"the order of heads is given as {qkv_order}, and {reference} is to decide it: give one of them"
        )
    folder = resolve(Path(path))
    contents = _contents(folder, part)
    try:
        checkpoint = Checkpoint(folder, contents, config, qkv_order)
        undecided = checkpoint.has_config and contents.qkv_order is None
        if reference is not None and undecided and contents.qkv_is_ambiguous(checkpoint.config):
            checkpoint = _decided(folder, contents, checkpoint.config, reference)
        return checkpoint
    except BaseException:
        close_all(contents.files)
        raise


def _decided(folder: Path, contents: Contents, config: LlamaConfig, reference: str | Path) -> Checkpoint:
    with open_checkpoint(reference) as known:
        candidates = {order: Checkpoint(folder, contents, config, order) for order in orders.ORDERS}
        return candidates[orders.decide(candidates, known)]


def resolve(path: Path) -> Path:
    """The folder that holds the files themselves: this one, or what a tracker (of a run, too) names.

    Raises:
        CheckpointError: There is no such folder, or the tracker names none.
    """
    recover(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file: give the checkpoint's folder")
    if any(recognise(path) for recognise, _ in READERS):
        return path
    for folder in (path / "checkpoints", path):
        if (folder / TRACKER).is_file() or (folder / LATEST).is_file():
            return _tracked(folder)
    return path


def looks_like_checkpoint(path: Path) -> bool:
    """Whether the folder has the outward signs of a checkpoint, whole or broken, or is empty."""
    empty = path.is_dir() and not any(path.iterdir())
    tracked = any((path / tracker).is_file() for tracker in (TRACKER, LATEST))
    return empty or tracked or any(known(path) for known, _ in READERS)


def _tracked(folder: Path) -> Path:
    """The folder that the trackers name: AscendSpeed's ZeRO mode writes both, and only DeepSpeed's is right."""
    found = [tracker for tracker in (folder / TRACKER, folder / LATEST) if tracker.is_file()]
    named = [_named_by(tracker) for tracker in found]
    existing = next((place for place in named if place.is_dir()), None)
    if existing is None:
        raise CheckpointError(f"{found[0]} names {named[0].name}, which does not exist")
    return existing


def _named_by(tracker: Path) -> Path:
    stated = tracker.read_bytes()[:256].decode("utf-8", "replace").strip()
    is_iteration = stated.isascii() and stated.isdigit()
    if tracker.name == TRACKER and stated != "release" and not is_iteration:
        raise CheckpointError(f"{tracker} holds {stated!r}: neither an iteration nor `release`")
    if stated in ("", ".", "..") or "/" in stated or "\0" in stated:
        raise CheckpointError(f"{tracker} holds {stated!r}, which is no folder beside it")
    return tracker.parent / (f"iter_{int(stated):07d}" if tracker.name == TRACKER and is_iteration else stated)


def _contents(folder: Path, part: Part) -> Contents:
    for recognise, read in READERS:
        if recognise(folder):
            return read(folder, part)
    if (folder / PEFT_SIGN).is_file():
        raise UsageError(f"{folder} is a PEFT checkpoint, which is not read yet")
    if (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has a {CONFIG}, but none of {', '.join(hf.WEIGHT_FILES)}")
    raise CheckpointError(
        f"{folder} is not a checkpoint: it has neither weights of a Hugging Face model, nor mp_rank_… of Megatron or "
        f"DeepSpeed, nor {distributed.METADATA}, nor {TRACKER}"
    )
