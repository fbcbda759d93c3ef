"""`npu-kernels doctor` with the real torch_npu: on the emulated NPU, and without any CANN."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from npu_kernels import backends, devices, installation
from npu_kernels.doctor import examine, table

SCRIPT = str(Path(sys.executable).parent / "npu-kernels")


def test_doctor_sees_the_npu_and_its_fused_ops():
    facts = examine()
    assert facts["problems"] == []
    assert (facts["device"], facts["collective_backend"]) == ("npu", "hccl")
    npu = facts["devices"][0]
    assert (npu["available"], npu["name"], npu["count"]) == (True, "Ascend910B3", 1)
    assert npu["peak_flops"]["bfloat16"] == pytest.approx(294.9e12, rel=1e-3)
    assert all(names["npu"].startswith("npu_") for names in facts["ops"].values())
    assert backends("npu")["swiglu"] == "npu_swiglu"
    assert "not yet on hardware" in table(facts)


def without_cann(*command, **variables):
    """A process of its own, in which nothing is emulated."""
    env = {key: value for key, value in os.environ.items() if key != installation.AUTOLOAD}
    return subprocess.run(command, capture_output=True, text=True, env=env | variables, check=False)


def test_doctor_names_the_missing_cann_where_importing_torch_fails():
    failing = without_cann(sys.executable, "-c", "import torch")
    assert failing.returncode != 0, "the control: torch loads torch_npu, which misses CANN"
    assert "libhccl.so" in failing.stderr
    done = without_cann(SCRIPT, "doctor", "--json")
    assert done.returncode == 3, done.stderr
    facts = json.loads(done.stdout)
    (problem,) = facts["problems"]
    assert problem["what"].startswith("CANN's libraries are not found (libascendcl.so")
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in problem["fix"]
    assert facts["device"] in ("cpu", "cuda")
    assert not facts["devices"][0]["available"]


def test_a_run_without_cann_goes_on_without_the_npu():
    code = "from npu_kernels import device; print(device().type)"
    done = without_cann(sys.executable, "-W", "ignore", "-c", code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.stdout.strip() in ("cpu", "cuda"), done.stderr


def test_an_npu_that_works_is_not_looked_at_from_outside(monkeypatch):
    monkeypatch.setattr(installation, "problems", lambda: pytest.fail("torch_npu is imported and works"))
    devices._npu_failure.cache_clear()
    assert devices.why_not("npu") is None
