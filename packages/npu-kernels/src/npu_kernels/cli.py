"""The `npu-kernels` console script: its verbs, and nothing of what they do."""

import json as jsonlib
import warnings

from npu_kernels import commandline
from npu_kernels.errors import KernelError

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


def bench(
    *,
    device: str | None = None,
    dtype: str = "bfloat16",
    models: tuple[str, ...] = ("7b", "70b"),
    full: bool = False,
    seconds: float = 0.5,
    json: bool = False,
) -> int:
    """Times each op and backend at the shapes of LLaMA-2: time, GB/s or TFLOP/s, and how they compare.

    Args:
        device: npu, cuda or cpu; the machine's accelerator unless given.
        dtype: float32, float16 or bfloat16.
        models: Of 7b and 70b.
        full: All tokens of the models on a CPU too, which takes minutes.
        seconds: For how long each is repeated.
        json: Print the result as JSON.
    """
    from npu_kernels import installation

    for problem in installation.problems():
        if problem.breaks_torch:
            raise KernelError(f"{problem.what}: {problem.fix}")

    from npu_kernels.bench import measure, table
    from npu_kernels.devices import device as find_device

    result = measure(find_device(device), dtype, models, full=full, seconds=seconds)
    print(jsonlib.dumps(result, indent=2) if json else table(result))
    return 0


def main() -> int:
    """The exit code of the `npu-kernels` command."""
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's own, where nobody needs it
    return commandline.run(
        "npu-kernels",
        "Fused operations for LLaMA on NPU, CUDA and CPU: what this machine has, and how fast it is.",
        {"doctor": doctor, "bench": bench},
    )
