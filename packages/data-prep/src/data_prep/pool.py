"""Several processes that do tasks, and hand the results back in the order of the tasks.

Helpers are interpreters of their own, in a process group of their own, which talk through their standard input and
output: a terminal's Ctrl-C does not reach them, they end when their input does (however the parent ended), and nothing
of the caller's program is imported there.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from data_prep.errors import DataError
from data_prep.recipe import Done, Recipe, Task, Worker

START_AFTER_S = 2.0
"""Work of the parent after which helpers are started: each costs a third of a second before it does anything."""
_AHEAD = 2
"""Tasks that a helper has at a time: one that it works on, one that waits for it."""
_SERVE = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from data_prep.pool import serve; serve()"


class _Job:
    """A task that someone works on."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.done = threading.Event()
        self.result: Done | Exception | None = None

    def finish(self, result: Done | Exception) -> None:
        self.result = result
        self.done.set()

    def take(self) -> Done:
        self.done.wait()
        assert self.result is not None
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class _Helper:
    """A process that does tasks, and a thread of ours that hands them to it one by one."""

    def __init__(self, recipe: Recipe) -> None:
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        command, pipe = [sys.executable, "-c", _SERVE], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, process_group=0)
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: deque[_Job] = deque()
        self._thread = threading.Thread(target=self._converse, args=(recipe,), daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Tasks that it has not done yet."""
        while self._jobs and self._jobs[0].done.is_set():
            self._jobs.popleft()
        return len(self._jobs)

    def do(self, job: _Job) -> None:
        """Gives it a task, which it does in its turn."""
        self._jobs.append(job)
        self._queue.put(job)

    def _converse(self, recipe: Recipe) -> None:
        channel, answers = self.process.stdin, self.process.stdout
        assert channel is not None
        assert answers is not None
        first: list[Any] = [sys.path, recipe]
        while job := self._queue.get():
            try:
                for message in (*first, job.task):
                    pickle.dump(message, channel, protocol=5)
                channel.flush()
                first = []
                job.finish(pickle.load(answers))  # noqa: S301  (our own process's)
            except (EOFError, OSError, ValueError, pickle.UnpicklingError):  # and so it goes for those that follow
                words = "a worker process died (out of memory, or killed): run again, perhaps with fewer --workers"
                job.finish(DataError(words))

    def end(self) -> None:
        """Ends it, whatever it does."""
        self._queue.put(None)
        self.process.kill()
        self.process.wait()
        self._thread.join()
        for channel in (self.process.stdin, self.process.stdout):
            assert channel is not None
            with contextlib.suppress(OSError):  # what was not sent, nobody wants any more
                channel.close()


def results(tasks: Iterable[Task], recipe: Recipe, worker: Worker, workers: int) -> Iterator[tuple[Task, Done]]:
    """Each task with what it became, in the order of the tasks, whoever did them.

    Args:
        tasks: Taken one by one.
        recipe: What helpers are told.
        worker: The parent's own: it works where all helpers have enough to do.
        workers: Processes in all. More than one are started when there is enough to do.

    Raises:
        DataError: A task failed, or a helper died.
    """
    helpers: list[_Helper] = []
    pending: deque[_Job] = deque()
    begin = time.monotonic()
    try:
        for task in tasks:
            if len(helpers) < workers - 1 and time.monotonic() - begin >= START_AFTER_S:
                helpers += [_Helper(recipe) for _ in range(workers - 1)]
            pending.append(job := _Job(task))
            free = min(helpers, key=lambda helper: helper.load, default=None)
            if free is not None and free.load < _AHEAD:
                free.do(job)
            else:
                job.finish(_outcome(worker, task))
            while pending and (pending[0].done.is_set() or len(pending) > _AHEAD * workers):
                job = pending.popleft()
                yield job.task, job.take()
        for job in pending:
            yield job.task, job.take()
    finally:
        for helper in helpers:
            helper.end()


def _outcome(worker: Callable[[Task], Done], task: Task) -> Done | Exception:
    try:
        return worker(task)
    except DataError as error:  # it is raised in its turn: a task before it may fail, too
        return error


def serve() -> None:
    """A helper's life: a recipe, then tasks, until its input ends."""
    channel, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what anything prints must not come between the answers
    with contextlib.suppress(EOFError, BrokenPipeError):
        worker = Worker(pickle.load(channel))  # noqa: S301  (our own parent's)
        while True:
            answer = _outcome(worker, pickle.load(channel))  # noqa: S301
            pickle.dump(answer, answers, protocol=5)
            answers.flush()
