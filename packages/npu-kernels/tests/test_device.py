"""Devices, dispatch and `doctor`, on a machine that need have none of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from npu_kernels import Device, KernelError, device, devices

SCRIPT = str(Path(sys.executable).parent / "npu-kernels")


def run(*arguments, **variables):
    env = {key: value for key, value in os.environ.items() if key != "PUNA_KERNELS"} | variables
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=env, check=False)


def test_a_cpu_is_always_there():
    cpu = device("cpu")
    assert (cpu.type, cpu.collective_backend, cpu.torch_device()) == ("cpu", "gloo", torch.device("cpu"))
    cpu.set_current(3)
    cpu.synchronize()
    assert cpu.max_memory_bytes() is None
    assert cpu.peak_flops(torch.bfloat16) is None


def test_the_first_that_is_there_is_chosen(monkeypatch):
    monkeypatch.setattr(devices, "why_not", lambda kind: "absent" if kind == "npu" else None)
    assert device() == Device("cuda")
    assert device().collective_backend == "nccl"


@pytest.mark.parametrize("name", ["npu", "cuda"])
def test_a_device_that_is_not_there_is_refused_with_the_reason(name):
    if devices.why_not(name) is None:
        pytest.skip(f"this machine has {name}")
    with pytest.raises(KernelError, match=f"device {name} cannot be used: .+") as caught:
        device(name)
    assert caught.value.exit_code == 2


def test_an_unknown_device_is_refused():
    with pytest.raises(KernelError, match="choose from npu, cuda, cpu"):
        device("tpu")


@pytest.mark.parametrize(
    ("name", "bf16"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12),
     ("NVIDIA H200", 989.4e12), ("NVIDIA GeForce RTX 9090", None), ("NVIDIA H100 NVL", None)],
)  # fmt: skip
def test_a_peak_is_known_by_name_or_not_at_all(monkeypatch, name, bf16):
    monkeypatch.setattr(Device, "name", name)
    assert Device("cuda").peak_flops(torch.bfloat16) == bf16
    assert Device("cuda").peak_flops(torch.int8) is None


def test_a_torch_npu_that_does_not_import_is_a_reason_and_no_crash(tmp_path):
    (tmp_path / "torch_npu.py").write_text("raise OSError('libascendcl.so: cannot open shared object file')")
    done = run("doctor", "--json", PYTHONPATH=str(tmp_path), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 3, done.stderr
    npu = json.loads(done.stdout)["devices"][0]
    assert "libascendcl.so" in npu["reason"]


def test_doctor_says_what_is_there():
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["torch"] == torch.__version__
    assert [found["type"] for found in facts["devices"]] == ["npu", "cuda", "cpu"]
    sdpa = "F.scaled_dot_product_attention"
    ascend = "npu_fusion_attention, npu_fused_infer_attention_score"
    assert facts["ops"]["attention"] == {"npu": ascend, "cuda": sdpa, "cpu": sdpa}
    assert facts["problems"] == []
    shown = run("doctor").stdout
    assert "decode_attention" in shown
    assert "torch_npu" in shown


def test_doctor_says_when_the_references_run():
    facts = json.loads(run("doctor", "--json", PUNA_KERNELS="reference").stdout)
    assert facts["ops"]["rms_norm"]["cpu"] == "reference"
    assert any("slow" in note for note in facts["notes"])


def test_an_unknown_choice_of_kernels_is_one_line():
    done = run("doctor", PUNA_KERNELS="fast")
    assert done.returncode == 2
    assert done.stderr.startswith("error: PUNA_KERNELS is 'fast'")


def test_names_are_functions_and_importing_them_is_lazy():
    code = (
        "import sys, npu_kernels; assert 'torch' not in sys.modules; "
        "from npu_kernels import attention, device; import npu_kernels.ops.attention; "
        "assert callable(npu_kernels.attention) and callable(npu_kernels.device); "
        "assert 'torch_npu' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
