"""The `npu-kernels` console script: its verbs, and nothing of what they do."""

import json as jsonlib

from npu_kernels import commandline


def doctor(*, json: bool = False) -> int:
    """Shows torch, torch_npu, the devices, and which backend each op uses. Works on a machine with nothing.

    Args:
        json: Print the result as JSON.
    """
    from npu_kernels.doctor import examine, table

    facts = examine()
    print(jsonlib.dumps(facts, indent=2) if json else table(facts))
    return 0


def main() -> int:
    """The exit code of the `npu-kernels` command."""
    return commandline.run(
        "npu-kernels",
        "Fused operations for LLaMA on NPU, CUDA and CPU: what this machine has.",
        {"doctor": doctor},
    )
