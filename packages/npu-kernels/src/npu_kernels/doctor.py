"""What this machine offers and which backend each op uses: the facts that `npu-kernels doctor` prints.

It looks from outside first (`installation`), and imports torch only where that cannot fail.
"""

import os
import warnings
from typing import Any

from npu_kernels import installation


def examine() -> dict[str, Any]:
    """Everything that a report of a problem should say, ready for JSON. Never raises for what is missing."""
    found = installation.problems()
    facts: dict[str, Any] = {
        **installation.versions(),
        "problems": [{"what": problem.what, "fix": problem.fix} for problem in found],
    }
    if any(problem.breaks_torch for problem in found):
        os.environ[installation.AUTOLOAD] = "0"  # then torch imports, without its NPU
    return facts | _examine_torch()


def _examine_torch() -> dict[str, Any]:
    from npu_kernels import devices, dispatch

    runs = {kind: dispatch.backends(kind) for kind in devices.BACKENDS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say stands in `devices`
        found = [_describe(kind) for kind in devices.BACKENDS]
        chosen = devices.device()
    return {
        "device": chosen.type,
        "collective_backend": chosen.collective_backend,
        "devices": found,
        "ops": {op: {kind: runs[kind][op] for kind in devices.BACKENDS} for op in dispatch.OPS},
        "fused_required": dispatch.is_fused_required(),
        "notes": _notes(chosen.type),
    }


def _describe(kind: str) -> dict[str, Any]:
    import torch

    from npu_kernels import devices

    reason = devices.why_not(kind)
    if reason is not None:
        return {"type": kind, "available": False, "reason": reason}
    here = devices.Device(kind)
    peaks = {str(dtype).removeprefix("torch."): here.peak_flops(dtype) for dtype in (torch.bfloat16, torch.float32)}
    return {"type": kind, "available": True, "name": here.name, "count": here.count(), "peak_flops": peaks}


def _notes(device: str) -> list[str]:
    from npu_kernels import dispatch

    notes = []
    if "reference" in dispatch.backends("cpu").values():
        notes.append(f"{dispatch.VARIABLE}=reference: every op runs as its plain reference, which is slow")
    if device == "npu":
        notes.append("the calls to Ascend's ops are tested on torch_npu's real front end, not yet on hardware")
    return notes


def table(facts: dict[str, Any]) -> str:
    """The facts for people."""
    kinds = [device["type"] for device in facts["devices"]]
    lines = [
        *(f"{name:<10} {facts[name] or 'not found'}" for name in ("torch", "torch_npu", "cann", "driver")),
        f"device     {facts['device']} (collectives: {facts['collective_backend']})",
        "",
        *(_device_line(device) for device in facts["devices"]),
        "",
        *_columns([["op", *kinds], *([op, *names.values()] for op, names in facts["ops"].items())]),
        "",
        *(f"note: {note}" for note in facts["notes"]),
        *(f"problem: {problem['what']}\n    fix: {problem['fix']}" for problem in facts["problems"]),
    ]
    return "\n".join(line.rstrip() for line in lines).rstrip()


def _device_line(device: dict[str, Any]) -> str:
    if not device["available"]:
        return f"{device['type']:<5} no   {device['reason']}"
    peaks = ", ".join(f"{dtype} {peak / 1e12:g} TFLOP/s" for dtype, peak in device["peak_flops"].items() if peak)
    return f"{device['type']:<5} yes  {device['count']} x {device['name']}, peak {peaks or 'unknown'}"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    return ["".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
