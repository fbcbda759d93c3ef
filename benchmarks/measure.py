"""Runs commands in turn and compares them: medians of wall time, CPU time and peak memory, and ratios to the first.

Whole processes are measured, imports among them: it is what a user waits for. Rounds alternate, so that a machine that
slows down slows all of them; where it is noisy, CPU time is the steadier column.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

Command = Sequence[str | Path]

SCRIPTS = Path(sys.executable).parent
"""Where this environment's console scripts lie."""


class Cost(NamedTuple):
    """What one process cost."""

    wall_s: float
    cpu_s: float
    """User and system, its children's that it waited for among them."""
    peak_mib: float
    """Resident memory of the largest single process, mapped file pages included."""
    read_gb: float
    """Bytes that it asked the system for, those of imported modules among them, by /proc/PID/io."""
    written_gb: float
    """Bytes that it gave to the system."""


def run_once(command: Command) -> Cost:
    """The cost of one run; SystemExit with its stderr where it fails."""
    begin = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    wall_s = time.perf_counter() - begin
    moved = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(map(str, command))}\n{said}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Cost(wall_s, cpu_s, usage.ru_maxrss / 1024, int(moved["rchar"]) / 1e9, int(moved["wchar"]) / 1e9)


def compare(commands: Mapping[str, Command], *, rounds: int, clean: Callable[[], None] = lambda: None) -> None:
    """Prints the table. `clean` removes what a command wrote, before each."""
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            clean()
            costs[name].append(run_once(command))
    clean()
    medians = {name: Cost(*map(statistics.median, zip(*each, strict=True))) for name, each in costs.items()}
    first = next(iter(medians.values()))
    width = max(map(len, medians))
    print(f"{'':<{width}}  {'wall s':>7}  {'ratio':>5}  {'CPU s':>7}  {'ratio':>5}  {'peak MiB':>8}")
    for name, cost in medians.items():
        ratios = cost.wall_s / first.wall_s, cost.cpu_s / first.cpu_s
        print(
            f"{name:<{width}}  {cost.wall_s:>7.2f}  {ratios[0]:>5.2f}  {cost.cpu_s:>7.2f}  {ratios[1]:>5.2f}  "
            f"{cost.peak_mib:>8.0f}"
        )
    print(f"medians of {rounds} rounds, {os.cpu_count()} cores, Python {sys.version.split()[0]}")


def remove(*paths: Path) -> None:
    """Deletes files and folders, whether they are there or not."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
