"""A persistent pool of rank processes on gloo: every case runs on all of them, in the same processes.

    with Ranks(2) as ranks:
        results = ranks.run(function, *arguments)        # one result a rank; `function` is importable and picklable

A rank that raises, dies or outlasts the time limit fails the case with every rank's traceback; the pool's processes are
then killed, and the next case gets new ones. Ranks end with the process that made them.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

GRACE_S = 1.0
"""How long the others may go on once a rank has failed: most of them then hang in a collective."""


class RankError(Exception):
    """What the ranks said."""


class Ranks:
    """`size` processes in one process group."""

    def __init__(self, size: int, timeout_s: float = 60.0) -> None:
        self.size, self.timeout_s = size, timeout_s
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        """Ranks end by themselves where they can, and so end what megatron-core started in them."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(GRACE_S)
        self._kill()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returns on each rank."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = self._collect()
        if any(answer is None or answer[0] != "result" for answer in answers):
            report = self._report(answers)
            self._kill()
            raise RankError(report)
        return [answer[1] for answer in answers if answer is not None]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._home = tempfile.mkdtemp(prefix="ranks-")
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # spawned processes read it when they load torch
        try:
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, self.size, self._home, theirs))
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
        finally:
            os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)

    def _collect(self) -> list[tuple[str, Any] | None]:
        """Each rank's answer; None for one that gave none in time."""
        answers: list[tuple[str, Any] | None] = [None] * self.size
        waiting = dict(zip(self._pipes, range(self.size), strict=True))
        deadline = time.monotonic() + self.timeout_s
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    self._processes[rank].join()
                    answers[rank] = ("error", f"the process ended with code {self._processes[rank].exitcode}")
                if answers[rank][0] != "result":
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _report(self, answers: list[tuple[str, Any] | None]) -> str:
        parts = []
        for rank, answer in enumerate(answers):
            said = "no answer; it stands at\n" + self._stack(rank) if answer is None else str(answer[1])
            if answer is None or answer[0] != "result":
                parts.append(f"--- rank {rank} of {self.size}: {said}")
        return "\n" + "\n".join(parts)

    def _stack(self, rank: int) -> str:
        """Where a rank hangs, as it says itself."""
        os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return Path(self._home, f"stack-{rank}").read_text("utf-8")

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(rank: int, size: int, home: str, pipe: Connection) -> None:
    """A rank's life: cases come through the pipe until it is closed."""
    stack = open(f"{home}/stack-{rank}", "w", encoding="utf-8")  # noqa: SIM115  (open as long as the process lives)
    faulthandler.register(signal.SIGUSR1, file=stack)
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{home}/rendezvous", rank=rank, world_size=size)
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("result", function(*arguments))
        except BaseException:
            answer = ("error", traceback.format_exc())
        sys.stdout.flush()
        pipe.send(answer)
