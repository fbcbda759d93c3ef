"""What a rank says when another is gone: torch.distributed's many errors as one line, after the other's own error."""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator

from trainer.config import TrainConfig
from trainer.errors import TrainerError

OTHERS_FIRST_S = 5.0
"""How long a rank that has lost another keeps silent. The launcher ends it meanwhile if it has seen the other die, so
that the error on the screen is the other's. Where that was on another machine, this rank is the one to speak.
"""

_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|reset by peer|broken pipe|timed? ?out|no route to host"
    r"|network is unreachable|connectFullMesh|remote process exited|communicator was aborted|failed to connect",
    re.IGNORECASE,
)
"""What gloo, nccl, hccl and the store say of a peer that does not answer."""


@contextlib.contextmanager
def named(config: TrainConfig) -> Iterator[None]:
    """Turns the errors of a lost connection into one that says who lost whom, and what to do.

    Raises:
        TrainerError: In place of the errors of torch.distributed.
    """
    try:
        yield
    except Exception as error:
        line = _line(error, config)
        if line is None:
            _tell_torchrun(str(error))
            raise
        _let_the_others_speak()
        _tell_torchrun(line)
        raise TrainerError(line) from error


def _line(error: Exception, config: TrainConfig) -> str | None:
    """One line of a lost connection; None for any other error."""
    said = " ".join(str(error).split())
    if "RANK" not in os.environ or not isinstance(error, RuntimeError) or not _LOST.search(said):
        return None
    who = f"rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')} on {socket.gethostname()}"
    if re.search(r"timed? ?out", said, re.IGNORECASE):
        lost = (
            f"{who} heard nothing of the others within --distributed-timeout-minutes "
            f"{config.distributed_timeout_minutes:g}"
        )
    else:
        lost = f"{who} lost another process"
    return (
        f"{lost} ({_short(said)}): look for the error of the one that is gone, or for its machine; earlier checkpoints "
        f"are as they were: go on with --resume {config.output_dir}"
    )


def _short(said: str) -> str:
    """What stands before a stack of C++ calls, without the place in gloo's sources."""
    said = re.split(r" Exception raised from | \. This may indicate| Check the logs of the remote", said)[0]
    return re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\] ", "", said)[:200].rstrip(". ")


def _let_the_others_speak() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing left to save
    time.sleep(OTHERS_FIRST_S)


def _tell_torchrun(line: str) -> None:
    """Puts the error where torchrun's own report shows it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return
    report = {"message": {"message": f"error: {line}", "extraInfo": {"timestamp": str(int(time.time()))}}}
    with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as stream:
        json.dump(report, stream)
