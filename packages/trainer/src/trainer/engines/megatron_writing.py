"""Writes megatron-core's distributed checkpoints in this process, or in one forked from it.

megatron-core's own writer forks once more for each file and waits for ever if such a process dies (killed for memory,
disk full), and starts a process to hold the writers' results. Here the bytes are written where `AsyncRequest` runs, the
results come through a pipe, and whatever goes wrong ends the save.
"""

import contextlib
import multiprocessing
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException  # no Exception, but a BaseException

from trainer.engines.common import could_not_write
from trainer.errors import TrainerError
from trainer.hashes import leave_hashes

Bucket = tuple[Path, str, Any]
"""A file, its name in `.metadata`, and the items that it is to hold."""


def begin(folder: Path, state: dict[str, Any], metadata: dict[str, Any], *, in_background: bool) -> "Writing":
    """Plans the save with all ranks and writes this rank's files: here and now, or in a process of their own.

    Raises:
        TrainerError: A rank could not write its part.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    results = _Results() if in_background else queue.SimpleQueue[Any]()
    filesystem_async._results_queue = results  # where megatron-core looks for one before it makes its own
    try:
        request = dist_checkpointing.save(state, str(folder), content_metadata=metadata, async_sharded_save=True)
    except OSError as error:
        raise _failure(folder, error) from error
    if request.async_fn is not None:  # else there is nothing to write on this rank
        transforms = request.async_fn.args[0]  # torch's, which megatron-core hands on to its writer
        request = request._replace(async_fn=partial(_write, folder, transforms))
    if isinstance(results, _Results):
        calls = AsyncCallsQueue(persistent=False)  # the persistent one shares live parameters with its writer on a CPU
        calls.schedule_async_request(request)
        results.listen()
        return Writing(folder, calls)
    try:
        request.execute_sync()
    except (Exception, CheckpointException) as error:
        raise _failure(folder, error) from error
    return Writing(folder, None)


class Writing:
    """See `trainer.engines.Writing`."""

    def __init__(self, folder: Path, calls: Any | None) -> None:
        self._folder, self._calls = folder, calls

    def finished(self, *, wait: bool) -> bool:
        """See `trainer.engines.Writing.finished`."""
        if self._calls is None:
            return True
        try:
            self._calls.maybe_finalize_async_calls(blocking=wait)
        except (Exception, CheckpointException) as error:
            raise _failure(self._folder, error) from error
        return not self._calls.get_num_unfinalized_calls()


class _Results:
    """A queue for one value, out of the process that is forked next."""

    def __init__(self) -> None:
        self._here, self._there = multiprocessing.Pipe(duplex=False)
        self._received: list[Any] = []
        self._listener = threading.Thread(target=self._receive, daemon=True)

    def put(self, value: Any) -> None:
        """Called there."""
        self._there.send(value)

    def listen(self) -> None:
        """Called here after the fork: a pipe holds little, and its writer waits for a reader."""
        self._there.close()
        self._listener.start()

    def _receive(self) -> None:
        with contextlib.suppress(EOFError):  # it died
            self._received.append(self._here.recv())

    def get_nowait(self) -> Any:
        """Called here once the other process has ended."""
        self._listener.join()
        if not self._received:
            raise queue.Empty
        return self._received.pop()


def _write(folder: Path, transforms: list[Any], rank: int, buckets: list[Bucket], results: Any) -> None:
    """What runs as the request's function: writes this rank's files, and leaves their hashes."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write(number: int) -> Any:
        done = queue.SimpleQueue[Any]()
        FileSystemWriterAsync.write_preloaded_data(
            transforms, number, buckets[number], done, _Uncounted(), use_fsync=True
        )
        return done.get()

    with ThreadPoolExecutor(len(buckets)) as pool:
        written = dict(pool.map(write, range(len(buckets))))
    failures = [result for result in written.values() if isinstance(result, Exception)]
    if failures:
        results.put(failures[0])
        return
    leave_hashes(folder, rank, [Path(file) for file, _, _ in buckets])
    results.put(written)


class _Uncounted:
    """Stands for the queue in which megatron-core counts the writers that are still alive."""

    def get(self) -> None:
        """Nothing is counted."""

    def task_done(self) -> None:
        """Nothing is counted."""


def _failure(folder: Path, error: BaseException) -> TrainerError:
    """What went wrong, with the first rank that says so: the others only learn that something did."""
    who, reason = f"rank {distributed.get_rank()}", str(error)
    if isinstance(error, CheckpointException):
        who = ", ".join(f"rank {rank}" for rank in error.failures) or "another rank"
        reason = next((str(cause) for cause, _ in error.failures.values()), "its own line says why")
    return could_not_write(folder, who, reason or type(error).__name__)
