"""Runs the console script as a user would."""

import os
import resource
import subprocess
import sys
from pathlib import Path

TRAINER = str(Path(sys.executable).parent / "trainer")


def start(*arguments, largest_file=None):
    """The running script, in a process group of its own; it may write no file of more bytes than `largest_file`."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [TRAINER, *map(str, arguments)]

    def limit():
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=env, process_group=0, preexec_fn=limit, **pipes)


def trainer(*arguments, code=0):
    """The finished script, after its exit code was checked."""
    process = start(*arguments)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
