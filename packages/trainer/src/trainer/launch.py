"""Starts the processes of a run on this machine, as torchrun would: `--nproc-per-node N`; and what a rank owes to its
launcher, this one or torchrun.

torchrun itself turns every exit code into 1 and wraps each error in a report of its own; here the code and the one line
of the rank that failed first reach the user. Several machines start with torchrun.

How processes end:

- A rank that fails, or is killed, ends the others: they are asked (SIGTERM), and killed 10 s later.
- SIGTERM or SIGINT (Ctrl-C) to the launcher is handed on to every rank, once, and the launcher waits up to
  `SAVE_GRACE_S` for them to write a checkpoint. A second one ends them at once. SIGHUP (a terminal that is closed) is
  handed on as SIGTERM, unless `nohup` has it ignored.
- A launcher that is killed takes its ranks along, and a rank the processes that it has forked (`end_with_parent`).
"""

import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO

Rank = subprocess.Popen[bytes]

SAVE_GRACE_S = 600.0
"""How long ranks that were asked to stop may take: a checkpoint of hundreds of gigabytes on a slow disk. Whoever stops
the launcher (Slurm, Kubernetes) has a shorter limit of its own, and then kills it, and so the ranks.
"""

_GRACE_S = 10.0
_ECHO_S = 2.0
_POLL_S = 0.05
_USAGE = 2


def is_rank() -> bool:
    """Whether this process was started as one of a group, by `start` or by torchrun."""
    return "RANK" in os.environ


def is_first_rank() -> bool:
    """Whether this process speaks for the run."""
    return os.environ.get("RANK", "0") == "0"


def world_size(nproc_per_node: int) -> int:
    """How many processes take part: torchrun's number, or the asked one."""
    return int(os.environ.get("WORLD_SIZE", nproc_per_node))


def end_with_parent() -> None:
    """This process is killed when the one that started it ends, however that dies; so is every process that it forks.

    A process that is spawned instead calls this itself. (Linux's PR_SET_PDEATHSIG: it heeds the thread that made the
    process, so that helpers are started from a thread that lasts.)
    """
    _die_with_parent(os.getppid())
    forks_from: list[int] = []
    os.register_at_fork(
        before=lambda: forks_from.append(os.getpid()), after_in_child=lambda: _die_with_parent(forks_from[-1])
    )


def start(arguments: Sequence[str], nproc: int, program: Sequence[str] = ("-m", "trainer")) -> int:
    """The exit code of `nproc` ranks of `python -m trainer ARGUMENTS`: 0, or that of the first that failed.

    Each gets an equal share of the cores unless OMP_NUM_THREADS says otherwise. What rank 0 says is for people; of the
    others only the last line is shown, when they fail. See this module for how they end.

    Args:
        arguments: Of the program.
        nproc: How many.
        program: What Python runs.
    """
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
    }
    shared.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(_noting_signals())
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(nproc)]
        ranks: list[Rank] = []
        stack.callback(_end, ranks)
        for rank in range(nproc):
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *program, *arguments],
                    env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stderr=None if rank == 0 else logs[rank],
                    process_group=0,  # a terminal's Ctrl-C reaches the launcher alone, which hands it on once
                    preexec_fn=functools.partial(_die_with_parent, os.getpid()),  # noqa: PLW1509  (this process has no threads)
                )
            )
        failed = _first_failure(ranks, asked)
        if asked:
            return _stop(ranks, asked)
        if failed is None:
            return 0
        _report(failed, ranks, logs)
        return _exit_code(ranks[failed])


@contextlib.contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """The requests to stop that have come so far."""
    asked: list[int] = []
    kinds = [
        kind for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(kind) != signal.SIG_IGN
    ]
    before = {kind: signal.signal(kind, lambda number, _: asked.append(number)) for kind in kinds}
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _first_failure(ranks: list[Rank], asked: list[int]) -> int | None:
    """The number of the first rank that ends with an error; None when all are done, or are asked to stop."""
    while not asked:
        codes = [rank.poll() for rank in ranks]
        failed = [number for number, code in enumerate(codes) if code]
        if failed:
            return failed[0]
        if None not in codes:
            return None
        time.sleep(_POLL_S)
    return None


def _stop(ranks: list[Rank], asked: list[int]) -> int:
    """Hands a request to stop on and waits: the exit code of the first rank that has one."""
    handed_on = signal.SIGINT if asked[0] == signal.SIGINT else signal.SIGTERM
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(handed_on)
    deadline = time.monotonic() + SAVE_GRACE_S
    while any(rank.poll() is None for rank in ranks) and len(asked) == 1 and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()
    return next((code for rank in ranks if (code := _exit_code(rank))), 0)


def _report(failed: int, ranks: list[Rank], logs: Sequence[IO[bytes]]) -> None:
    """Shows the last words of a rank that failed while rank 0 did not say the same."""
    code = ranks[failed].returncode
    if code < 0:
        hint = " (is the machine out of memory?)" if -code == signal.SIGKILL else ""
        print(f"error: rank {failed} was ended by {signal.Signals(-code).name}{hint}", file=sys.stderr)
        return
    if failed == 0:
        return
    if code == _USAGE:  # a contradiction that every rank finds for itself, rank 0 too
        with contextlib.suppress(subprocess.TimeoutExpired):
            ranks[0].wait(_ECHO_S)
        if ranks[0].returncode == _USAGE:
            return
    logs[failed].seek(0)
    said = logs[failed].read().decode("utf-8", "replace").strip().splitlines()
    print(f"rank {failed}: {said[-1] if said else f'ended with code {code}'}", file=sys.stderr)


def _exit_code(rank: Rank) -> int:
    """As a shell gives it: 128 and its number for a signal."""
    code = rank.returncode
    return code if code >= 0 else 128 - code


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


def _die_with_parent(parent: int) -> None:
    """Linux's PR_SET_PDEATHSIG, in a process that `parent` has made."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be heeded
        os.kill(os.getpid(), signal.SIGKILL)
