"""What does not fit together is found from outside, before anything that would crash is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from npu_kernels import installation, peaks

SCRIPT = str(Path(sys.executable).parent / "npu-kernels")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with torch_npu, and what else is said."""

    def describe(*, torch="2.6.0+cpu", torch_npu="2.6.0.post5", missing=(), cann=None, autoload="1"):
        monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(installation, "_version", {"torch": torch, "torch_npu": torch_npu}.get)
        monkeypatch.setattr(installation, "_not_loadable", lambda: list(missing))
        monkeypatch.setattr(installation, "PLACES", ())
        monkeypatch.setenv(installation.AUTOLOAD, autoload)
        monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
        if cann:
            (tmp_path / "version.cfg").write_text(f"# version\nruntime_running_version=[7.0:{cann}]\n")
            monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
        return installation.problems()

    return describe


def test_what_fits_is_no_problem(machine):
    assert machine() == []
    assert machine(cann="8.5.0") == []


def test_the_wrong_torch_is_named_with_the_right_one(machine):
    (problem,) = machine(torch="2.7.1")
    assert problem.what == "torch_npu 2.6.0.post5 is built for torch 2.6.0, and torch 2.7.1 is installed"
    assert "pip install torch==2.6.0" in problem.fix
    assert problem.breaks_torch
    assert problem.blocks
    assert not machine(torch="2.7.1", autoload="0")[0].breaks_torch
    (near,) = machine(torch="2.6.1")
    assert (near.blocks, near.breaks_torch) == (False, False), "a patch release apart may work"


def test_a_missing_cann_is_named_with_the_way_out(machine, tmp_path, monkeypatch):
    (problem,) = machine(missing=["libascendcl.so"])
    assert problem.what == "CANN's libraries are not found (libascendcl.so)"
    assert problem.fix.endswith("or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to do without the NPU")
    assert problem.breaks_torch
    (tmp_path / "set_env.sh").touch()
    monkeypatch.setattr(installation, "PLACES", (str(tmp_path),))
    assert installation.problems()[0].fix.startswith(f"source {tmp_path}/set_env.sh")


def test_a_cann_of_another_time_is_named(machine):
    (problem,) = machine(torch="2.9.0", torch_npu="2.9.0", cann="8.2.RC1")
    assert problem.what == "torch_npu 2.9.0 is listed for CANN 8.5, and CANN 8.2.RC1 is installed"
    assert not problem.blocks, "it may work: doctor says it, nothing stops"
    assert machine(torch="2.14.0", torch_npu="2.14.0", cann="8.2.RC1") == [], "not in the table: not judged"
    assert machine(torch="2.9.0", torch_npu="2.9.0", cann="10.0.0") == [], "newer than the table: not judged"


def test_without_torch_npu_nothing_is_wrong(monkeypatch):
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None)
    assert installation.problems() == []


@pytest.fixture
def broken(tmp_path):
    """A folder with a torch_npu that another torch was built for, and whose import would be noticed."""
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu/__init__.py").write_text("raise SystemExit('undefined symbol: _ZN5torch')")
    facts = tmp_path / "torch_npu-2.6.0.post5.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.6.0.post5\n")
    (facts / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return tmp_path


def doctor(*arguments, **variables):
    env = {key: value for key, value in os.environ.items() if key not in ("PUNA_KERNELS", installation.AUTOLOAD)}
    command = [SCRIPT, "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env | variables, check=False)


def test_doctor_names_a_mismatch_instead_of_running_into_it(broken):
    failing = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True, check=False,
                             env=os.environ | {"PYTHONPATH": str(broken), installation.AUTOLOAD: "1"})  # fmt: skip
    assert failing.returncode != 0, "the control: import torch itself fails"
    done = doctor("--json", PYTHONPATH=str(broken))
    assert done.returncode == 3, done.stderr
    assert "undefined symbol" not in done.stdout + done.stderr
    facts = json.loads(done.stdout)
    whats = [problem["what"] for problem in facts["problems"]]
    assert whats[0].startswith("torch_npu 2.6.0.post5 is built for torch 2.6.0, and torch 2.")
    assert facts["torch_npu"] == "2.6.0.post5"
    assert facts["device"] in ("cpu", "cuda")
    shown = doctor(PYTHONPATH=str(broken))
    assert "fix: pip install torch==2.6.0" in shown.stdout
    assert shown.returncode == 3


def test_commands_other_than_doctor_refuse_the_npu_in_one_line(broken):
    code = "from npu_kernels import device; device('npu')"
    env = os.environ | {"PYTHONPATH": str(broken), installation.AUTOLOAD: "0"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env,
                          check=False)  # fmt: skip
    assert "KernelError: device npu cannot be used: torch_npu 2.6.0.post5 is built for torch 2.6.0" in done.stderr


def test_the_peak_of_an_npu_is_what_its_cann_says(tmp_path, monkeypatch):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    assert peaks.flops("Ascend910B3", "bfloat16") == pytest.approx(294.9e12, rel=1e-3)
    assert peaks.flops("Ascend910B3", "float32") is None
    assert peaks.flops("Ascend910B9", "bfloat16") is None
    folder = tmp_path / "aarch64-linux/data/platform_config"
    folder.mkdir(parents=True)
    (folder / "Ascend910B9.ini").write_text("[SoCInfo]\ncube_core_cnt=10\n[AICoreSpec]\ncube_freq=1000\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert peaks.flops("Ascend910B9", "float16") == 10 * 1000e6 * 8192
    (folder / "Ascend910B8.ini").write_text("[SoCInfo]\n")
    assert peaks.flops("Ascend910B8", "float16") is None


def test_bandwidths_are_known_by_name_or_not_at_all():
    assert peaks.bytes_per_s("NVIDIA H100 80GB HBM3") == 3350e9
    assert peaks.bytes_per_s("NVIDIA A100-PCIE-40GB") is None
    assert peaks.memory_bytes("NVIDIA H200") == 141e9
    assert peaks.memory_bytes("NVIDIA A100") is None  # there are two of the name
    assert peaks.memory_bytes("Ascend910B4-1") is None  # has twice a 910B4's
