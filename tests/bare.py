"""Checks one installed package from the inside of its environment, with the standard library alone.

    python tests/bare.py PACKAGE

Shows: siblings came from folders, never from an index; what must not be there is not; the package and its console
script work as they stand; `--help` imports no torch.
"""

import importlib
import importlib.util
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

FORBIDDEN = {
    "ckpt-tools": ["torch", "megatron", "deepspeed", "transformers", "safetensors"],
    "data-prep": ["torch", "megatron", "deepspeed", "transformers"],
    "npu-kernels": ["megatron", "deepspeed", "transformers", "torch_npu"],
    "llama-model": ["megatron", "deepspeed", "transformers", "torch_npu"],
    "evaluator": ["megatron", "deepspeed", "transformers", "torch_npu"],
    "trainer": ["deepspeed", "transformers", "torch_npu"],
}


def check_origins() -> None:
    """Every puna distribution was installed from a local folder or file."""
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name.startswith("puna-"):
            origin = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "an index")
            assert origin.startswith("file://"), f"{name} came from {origin}"


def check_absences(package: str) -> None:
    """Nothing that the package does not declare has come along."""
    present = [name for name in FORBIDDEN[package] if importlib.util.find_spec(name)]
    assert not present, f"{package} pulls in {present}"


def check_names(package: str) -> None:
    """Importing the package loads no torch, and names what it is for."""
    module = importlib.import_module(package.replace("-", "_"))
    assert module.__doc__, f"{package} does not say what it is for"
    assert module.__all__, f"{package} does not name what it offers"
    assert "torch" not in sys.modules, f"importing {package} imports torch"


def check_script(package: str) -> None:
    """`--version` and `--help` answer, and `--help` imports no torch."""
    script = str(Path(sys.executable).parent / package)
    version = metadata.version(f"puna-{package}")
    said = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"{package} {version}", said
    module = [sys.executable, "-X", "importtime", "-m", package.replace("-", "_"), "--help"]
    helped = subprocess.run(module, capture_output=True, text=True, check=True)
    assert helped.stdout, "--help says nothing"
    loaded = {line.split("|")[-1].strip() for line in helped.stderr.splitlines() if line.startswith("import time:")}
    assert not loaded & {"torch", "megatron.core", "transformers"}, f"{package} --help imports torch"


def main(package: str) -> None:
    """All checks, each an assertion."""
    check_origins()
    check_absences(package)
    check_names(package)
    check_script(package)
    print(f"{package} stands alone on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main(sys.argv[1])
