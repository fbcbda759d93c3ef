"""A folder that appears under its name whole or not at all, whenever the process is killed.

It is built beside the target, brought to disk, and takes the target's name by one rename. Beside a target NAME there
may lie, after a kill, `.NAME.unfinished-…` (deleted by the next write to NAME) and, only where the system cannot
exchange two folders, `.NAME.replaced` (the old target, which `recover` brings back).
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ckpt_tools.errors import CheckpointError

AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool, check: Callable[[Path], None]) -> Iterator[Path]:
    """A folder to fill; when the block ends without an error it becomes `target`.

    Args:
        target: Must not exist, or be an empty folder, unless `overwrite`.
        overwrite: Exchange what is there for the new folder, then delete it.
        check: Raises where a folder must not be replaced. It is asked before the work and again at its end.

    Raises:
        CheckpointError: The target exists, or cannot, because it would lie in a file.
    """
    target = Path(os.path.realpath(target))
    recover(target)
    check(target)
    if target.exists() and not overwrite and not _is_empty_folder(target):
        raise CheckpointError(f"{target} exists: give --overwrite to replace it, or choose another target")
    _make_parents(target)
    _delete_abandoned(target)
    building = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    building.mkdir()
    lock = os.open(building, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield building
        _sync_folders(building)
        if overwrite and target.exists():
            check(target)
            _replace(building, target)
        else:
            _take_name(building, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)  # what was not finished, or what was replaced
        os.close(lock)


def recover(target: Path) -> None:
    """Brings back what an interrupted replacement has left aside, if the target itself is missing."""
    if target.exists() or not target.name:
        return
    aside = _aside(target)
    if aside.is_dir():
        aside.rename(target)


def _make_parents(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(parent for parent in target.parents if parent.exists())
        raise CheckpointError(f"{file} is a file, not a folder: choose another target than {target}") from None


def _take_name(building: Path, target: Path) -> None:
    """Renames `building` to `target`, which the system refuses where something has come to lie there meanwhile."""
    try:
        building.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise CheckpointError(f"{target} was made by somebody else in the meantime: choose another target") from None


def _replace(building: Path, target: Path) -> None:
    """Gives the name of `target` to `building`; what was there is afterwards called `building`, or gone."""
    if not _exchange(building, target):
        aside = _aside(target)
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        building.rename(target)
        _sync(target.parent)
        shutil.rmtree(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Lets two folders swap their names in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _delete_abandoned(target: Path) -> None:
    """Deletes what killed processes have left; one that still runs holds the lock of its folder."""
    for folder in target.parent.glob(f".{_literal(target.name)}.unfinished-*"):
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def _literal(name: str) -> str:
    """`name` for a pattern in which it stands for itself."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _sync_folders(folder: Path) -> None:
    """Brings the names in a folder and below to disk; the files themselves were, as each was finished."""
    for child in folder.iterdir():
        if child.is_dir():
            _sync_folders(child)
    _sync(folder)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
