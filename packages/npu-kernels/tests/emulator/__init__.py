"""A CANN runtime that is not there: lets the real torch_npu wheel run with device="npu" on an x86-64 CPU.

`start` builds the libraries that torch_npu links to (`build.py`, `ascendcl.c`, `opapi.c`, `hccl.c`), loads them, then
imports torch_npu. The wheel's whole front end then runs as it is: its schemas, its checks, its autograd formulas, its
choice of aclnn op and the arguments that it hands down. Device memory is the host's; each aclnn call is decoded,
recorded on demand (`recording`) and carried out by a few lines of PyTorch (`fused_kernels.py`, `plain_kernels.py`)
written from CANN's documentation. Collectives are those of one rank.

What it shows: the call contract, and our own logic on the real front end. What it cannot show: CANN's numerics, its
speed, and what its kernels refuse.
"""

import os
from pathlib import Path

from emulator.build import LIBRARIES, build, why_not
from emulator.calls import Call, known_ops, recording

__all__ = ["Call", "known_ops", "recording", "start", "why_not"]


def start(folder: Path) -> None:
    """Imports torch_npu on an emulated NPU; libraries are built below `folder` and kept there. Once a process."""
    os.environ["TASK_QUEUE_ENABLE"] = (
        "0"  # calls run where they are made: a kernel computes before its launch is queued
    )
    from emulator import calls, fused_kernels, plain_kernels  # noqa: F401  (registers the kernels)

    calls.attach(build(folder), LIBRARIES)
    import torch_npu  # noqa: F401
