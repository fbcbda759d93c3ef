"""What known chips can do at most, with the sources. What is not here stays unknown: no chip stands for another.

Without torch: types go by their names.
"""

import configparser
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

V = TypeVar("V")

_A100 = {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12}
_SXM_H = {"bfloat16": 989.4e12, "float16": 989.4e12, "float32": 66.9e12}
FLOPS: dict[str, dict[str, float]] = {
    # Dense tensor-core figures, never the doubled ones of structured sparsity; fp32 without TF32.
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    "NVIDIA A100": _A100,
    # https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper, table 2
    "NVIDIA H100 PCIe": {"bfloat16": 756e12, "float16": 756e12, "float32": 51.2e12},
    "NVIDIA H100 80GB HBM3": _SXM_H,
    # https://www.nvidia.com/en-us/data-center/h200/: the compute of an H100 SXM, with more memory
    "NVIDIA H200": _SXM_H,
}
"""Name of a GPU, as its driver spells the beginning of it, to peak FLOP/s by dtype."""

BYTES_PER_S: dict[str, float] = {  # the same pages
    "NVIDIA A100-SXM4-80GB": 2039e9,
    "NVIDIA A100-SXM4-40GB": 1555e9,
    "NVIDIA A100 80GB PCIe": 1935e9,
    "NVIDIA H100 PCIe": 2000e9,
    "NVIDIA H100 80GB HBM3": 3350e9,
    "NVIDIA H200": 4800e9,
}
"""Name of a GPU to the peak bandwidth of its memory in byte/s."""

ASCEND_CUBES: dict[str, tuple[int, int]] = {
    "Ascend910B1": (24, 1850),
    "Ascend910B2": (24, 1800),
    "Ascend910B3": (20, 1800),
    "Ascend910B4": (20, 1500),
}
"""Name of an NPU to its cube cores and their MHz: `cube_core_cnt` and `cube_freq` of CANN 8's
`platform_config/NAME.ini`. Marketing figures differ: 313 TFLOP/s for a 910B3, which its listed clock does not give.
"""

ASCEND_STEP = 2 * 16 * 16 * 16
"""FLOP that a cube core does in a cycle in fp16 and bf16: a product of 16 x 16 matrices (`cube_m_size` and so on)."""


MEMORY_BYTES: dict[str, float] = {
    # Gigabytes (10^9) of the same pages. What a driver counts is a little more, of which it keeps a part.
    "NVIDIA A100-SXM4-80GB": 80e9,
    "NVIDIA A100-SXM4-40GB": 40e9,
    "NVIDIA A100 80GB PCIe": 80e9,
    "NVIDIA A100-PCIE-40GB": 40e9,
    "NVIDIA H100 PCIe": 80e9,
    "NVIDIA H100 80GB HBM3": 80e9,
    "NVIDIA H200": 141e9,
    # 910B3: npu-smi says 65536 MB, https://github.com/vllm-project/vllm-ascend/issues/1903; 910B4: half of that,
    # https://github.com/vllm-project/vllm-ascend/issues/129
    "Ascend910B3": 64e9,
    "Ascend910B4": 32e9,
}
"""Name of a chip to the size of its memory in bytes."""


def known() -> list[str]:
    """The names of all chips of which a peak is known."""
    return sorted({*FLOPS, *BYTES_PER_S, *ASCEND_CUBES})


def memory_bytes(name: str) -> float | None:
    """Size of the chip's memory in bytes; None: unknown."""
    return MEMORY_BYTES.get(name) if name.startswith("Ascend") else _by_beginning(MEMORY_BYTES, name)


def flops(name: str, dtype: str) -> float | None:
    """Dense peak in FLOP/s for matrix products of the chip that its driver calls `name`; None: unknown.

    Args:
        name: As the driver spells it.
        dtype: "bfloat16", "float16" or "float32".
    """
    if name.startswith("Ascend"):
        cubes = _cubes_by_cann(name) or ASCEND_CUBES.get(name)
        is_half = dtype in ("float16", "bfloat16")
        return cubes[0] * cubes[1] * 1e6 * ASCEND_STEP if cubes and is_half else None
    return (_by_beginning(FLOPS, name) or {}).get(dtype)


def bytes_per_s(name: str) -> float | None:
    """Peak bandwidth of the chip's memory in byte/s; None: unknown."""
    return _by_beginning(BYTES_PER_S, name)


def _by_beginning(table: Mapping[str, V], name: str) -> V | None:
    known = max((start for start in table if name.startswith(start)), key=len, default=None)
    return None if known is None else table[known]


def _cubes_by_cann(name: str) -> tuple[int, int] | None:
    """Cores and MHz as the installed CANN describes the chip, which is the better source."""
    home = os.environ.get("ASCEND_HOME_PATH")
    found = sorted(Path(home).glob(f"**/platform_config/{name}.ini")) if home else []
    if not found:
        return None
    config = configparser.ConfigParser(strict=False, interpolation=None)
    config.read(found[0], "utf-8")
    try:
        return config.getint("SoCInfo", "cube_core_cnt"), config.getint("AICoreSpec", "cube_freq")
    except (configparser.Error, ValueError):
        return None
