"""The `npu-kernels` console script: its verbs, and nothing of what they do."""

import json as jsonlib

from npu_kernels import commandline

CHECK_FAILED = 3


def doctor(*, json: bool = False) -> int:
    """Shows torch, torch_npu, CANN, the devices, and which backend each op uses. Works on a machine with nothing.

    What does not fit together is named with its fix, and the exit code is then 3.

    Args:
        json: Print the result as JSON.
    """
    from npu_kernels.doctor import examine, table

    facts = examine()
    print(jsonlib.dumps(facts, indent=2) if json else table(facts))
    return CHECK_FAILED if facts["problems"] else 0


def main() -> int:
    """The exit code of the `npu-kernels` command."""
    return commandline.run(
        "npu-kernels",
        "Fused operations for LLaMA on NPU, CUDA and CPU: what this machine has.",
        {"doctor": doctor},
    )
