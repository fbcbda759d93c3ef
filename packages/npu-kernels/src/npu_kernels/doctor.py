"""What this machine offers and which backend each op uses: the facts that `npu-kernels doctor` prints."""

import warnings
from importlib import metadata
from typing import Any

import torch

from npu_kernels import devices, dispatch

OPS = ("rms_norm", "rotary_embedding", "swiglu", "attention", "decode_attention", "cross_entropy")


def examine() -> dict[str, Any]:
    """Everything that a report of a problem should say, ready for JSON. Never raises for what is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say stands in `devices`
        found = [_describe(kind) for kind in devices.BACKENDS]
        chosen = devices.device()
    return {
        "torch": torch.__version__,
        "torch_npu": _version("torch_npu"),
        "device": chosen.type,
        "collective_backend": chosen.collective_backend,
        "devices": found,
        "ops": {op: {kind: dispatch.backend_name() for kind in devices.BACKENDS} for op in OPS},
        "notes": _notes(),
    }


def _describe(kind: str) -> dict[str, Any]:
    reason = devices.why_not(kind)
    if reason is not None:
        return {"type": kind, "available": False, "reason": reason}
    here = devices.Device(kind)
    peaks = {str(dtype).removeprefix("torch."): here.peak_flops(dtype) for dtype in (torch.bfloat16, torch.float32)}
    return {"type": kind, "available": True, "name": here.name, "count": here.count(), "peak_flops": peaks}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _notes() -> list[str]:
    notes = ["npu: the ops run as PyTorch's own; torch_npu's fused ops are not used yet"]
    if dispatch.backend_name() == "reference":
        notes.append(f"{dispatch.VARIABLE}=reference: every op runs as its plain reference, which is slow")
    return notes


def table(facts: dict[str, Any]) -> str:
    """The facts for people."""
    lines = [
        f"torch      {facts['torch']}",
        f"torch_npu  {facts['torch_npu'] or 'not installed'}",
        f"device     {facts['device']} (collectives: {facts['collective_backend']})",
        "",
        *(_device_line(device) for device in facts["devices"]),
        "",
        f"{'op':<18}{''.join(f'{kind:<11}' for kind in devices.BACKENDS)}",
        *(f"{op:<18}{''.join(f'{name:<11}' for name in kinds.values())}" for op, kinds in facts["ops"].items()),
        "",
        *(f"note: {note}" for note in facts["notes"]),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _device_line(device: dict[str, Any]) -> str:
    if not device["available"]:
        return f"{device['type']:<5} no   {device['reason']}"
    peaks = ", ".join(f"{dtype} {peak / 1e12:g} TFLOP/s" for dtype, peak in device["peak_flops"].items() if peak)
    return f"{device['type']:<5} yes  {device['count']} x {device['name']}, peak {peaks or 'unknown'}"
