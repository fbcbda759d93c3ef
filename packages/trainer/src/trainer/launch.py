"""Starts the processes of a run on this machine, as torchrun would: `--nproc-per-node N`.

torchrun itself turns every exit code into 1 and wraps each error in a report of its own; here the code and the one line
of the rank that failed first reach the user. Several machines start with torchrun.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

Rank = subprocess.Popen[bytes]

_GRACE_S = 10.0
_ECHO_S = 2.0


def is_rank() -> bool:
    """Whether this process was started as one of a group, by `start` or by torchrun."""
    return "RANK" in os.environ


def is_first_rank() -> bool:
    """Whether this process speaks for the run."""
    return os.environ.get("RANK", "0") == "0"


def world_size(nproc_per_node: int) -> int:
    """How many processes take part: torchrun's number, or the asked one."""
    return int(os.environ.get("WORLD_SIZE", nproc_per_node))


def start(arguments: Sequence[str], nproc: int) -> int:
    """The exit code of `nproc` ranks of `python -m trainer ARGUMENTS`: 0, or that of the first that failed.

    When one fails the others are ended. The ranks die with this process. Each gets an equal share of the cores unless
    OMP_NUM_THREADS says otherwise.
    """
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
    }
    shared.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(nproc)]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "trainer", *arguments],
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=None if rank == 0 else logs[rank],  # what rank 0 says is for people; the others repeat it
                preexec_fn=_die_with_parent,  # noqa: PLW1509  (this process has no threads)
            )
            for rank in range(nproc)
        ]
        try:
            failed = _first_failure(ranks)
            if failed is None:
                return 0
            _report(failed, ranks, logs)
            code = ranks[failed].returncode
            return code if code > 0 else 128 - code
        finally:
            _end(ranks)


def _first_failure(ranks: list[Rank]) -> int | None:
    """The number of the first rank that ends with an error, or None when all are done."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [number for number, code in enumerate(codes) if code]
        if failed:
            return failed[0]
        if None not in codes:
            return None
        time.sleep(0.05)


def _report(failed: int, ranks: list[Rank], logs: Sequence[IO[bytes]]) -> None:
    """Shows the last words of a rank that failed while rank 0 did not say the same."""
    if failed == 0:
        return
    with contextlib.suppress(subprocess.TimeoutExpired):
        ranks[0].wait(_ECHO_S)
    usage = 2  # a contradiction that every rank finds for itself, rank 0 too
    if ranks[0].returncode == ranks[failed].returncode == usage:
        return
    logs[failed].seek(0)
    said = logs[failed].read().decode("utf-8", "replace").strip().splitlines()
    code = ranks[failed].returncode
    last = said[-1] if said else f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
    print(f"rank {failed}: {last}", file=sys.stderr)


def _end(ranks: list[Rank]) -> None:
    """Asks what still runs to stop, then makes it."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + _GRACE_S
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """Linux's PR_SET_PDEATHSIG: the rank is killed when its launcher is, however that dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
