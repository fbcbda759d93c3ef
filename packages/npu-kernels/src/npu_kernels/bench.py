"""Times each op, each backend that a device has, forward and with its backward: `npu-kernels bench`."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from npu_kernels import dispatch, ops
from npu_kernels.bench_cases import LLAMA_2, Case, cases
from npu_kernels.devices import Device
from npu_kernels.errors import KernelError

MOST_ROUNDS = 1000
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def measure(
    device: Device, dtype: str, models: Sequence[str], *, full: bool = False, seconds: float = 0.5
) -> dict[str, Any]:
    """Every figure, ready for JSON.

    Args:
        device: Where to run.
        dtype: "float32", "float16" or "bfloat16".
        models: Of "7b" and "70b".
        full: The whole shapes on a CPU too, where they take minutes.
        seconds: For how long each is repeated; twice at least, of which the first does not count.

    Returns:
        What ran where, and `rows`: one for each model, op, pass and backend with `seconds` (the median), `gb_per_s` or
        `tflop_per_s` of the least work, `speedup` over the reference, and `of_peak` where the device's peak is known.

    Raises:
        KernelError: No such model or type.
    """
    _check(dtype, DTYPES)
    if not models:
        raise KernelError(f"no model is named: give some of {', '.join(LLAMA_2)}")
    if not 0 <= seconds < math.inf:
        raise KernelError(f"--seconds {seconds}: give a number, 0 or more")
    for model in models:
        _check(model, LLAMA_2)
    ops.load_all()
    rows = []
    for model in models:
        shape = LLAMA_2[model] if full or device.type != "cpu" else LLAMA_2[model].scaled_down()
        for case in cases(shape, DTYPES[dtype], device.torch_device()):
            rows += [{"model": model, **row} for row in _rows(case, device, DTYPES[dtype], seconds)]
    return {
        "device": device.type,
        "name": device.name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "full_shapes": full or device.type != "cpu",
        "rows": rows,
    }


def _check(name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise KernelError(f"bench knows no {name!r}: choose from {', '.join(known)}")


def _rows(case: Case, device: Device, dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    op = dispatch.OPS[case.op]
    best = "ascend" if device.type == "npu" else "torch"
    rows = []
    for backward in (False, True) if case.leaves else (False,):
        runs = {name: _run(getattr(op, name), case, backward) for name in ("reference", best)}
        times = _medians(runs, device, seconds)
        for name, took in times.items():
            row = {"op": case.op, "pass": "forward + backward" if backward else "forward", "backend": name}
            rates = _rates(case, backward, took, device, dtype)
            rows.append(row | {"seconds": took, **rates, "speedup": times["reference"] / took})
    return rows


def _rates(case: Case, backward: bool, took: float, device: Device, dtype: torch.dtype) -> dict[str, float | None]:
    rate = case.work(backward) / took
    is_flop = case.flop is not None
    peak = device.peak_flops(dtype) if is_flop else device.peak_bytes_per_s()
    shown = {"tflop_per_s": rate / 1e12} if is_flop else {"gb_per_s": rate / 1e9}
    return {**shown, "of_peak": None if peak is None else rate / peak}


def _run(function: Callable[..., Any], case: Case, backward: bool) -> Callable[[], object]:
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return function(*case.inputs)

        return forward
    leaves = [x.detach().requires_grad_() for x in case.inputs[: case.leaves]]
    inputs = (*leaves, *case.inputs[case.leaves :])
    first = function(*inputs)
    outputs = first if isinstance(first, tuple) else (first,)
    weights = [torch.ones_like(out) for out in outputs]
    return lambda: torch.autograd.grad(function(*inputs), leaves, weights if len(weights) > 1 else weights[0])


def _medians(runs: Mapping[str, Callable[[], object]], device: Device, seconds: float) -> dict[str, float]:
    """Of single runs in turn, so that a machine that slows down slows all; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    for round_number in itertools.count():
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            device.synchronize()
            times[name].append(time.perf_counter() - begin)
        if round_number >= 1 and (time.perf_counter() > end or round_number == MOST_ROUNDS):
            return {name: statistics.median(each[1:]) for name, each in times.items()}
    raise AssertionError("itertools.count ends")


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    shapes = "" if result["full_shapes"] else "; fewer tokens than the models have (--full for all)"
    head = f"{result['name']}, {result['dtype']}, torch {result['torch']}, {result['threads']} threads{shapes}"
    lines = [head, "", f"{'':<49}{'ms':>10} {'rate':>16} {'x reference':>12} {'of peak':>8}"]
    for row in result["rows"]:
        tflop = row.get("tflop_per_s")
        rate = f"{row['gb_per_s']:.1f} GB/s" if tflop is None else f"{tflop:.3f} TFLOP/s"
        peak = "n/a" if row["of_peak"] is None else f"{row['of_peak']:.0%}"
        name = f"{row['model']:<4} {row['op']:<17}{row['pass']:<19} {row['backend']}"
        lines.append(f"{name:<52}{row['seconds'] * 1e3:>7.2f} {rate:>16} {row['speedup']:>12.2f} {peak:>8}")
    return "\n".join(lines)
