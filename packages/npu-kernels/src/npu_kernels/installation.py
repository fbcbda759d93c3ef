"""What is installed for Ascend, and what does not fit together: found without importing torch or torch_npu.

With torch_npu installed but CANN missing, `import torch` itself fails, since torch loads its extensions; with the wrong
torch, it is an undefined symbol. So whoever wants to say what is wrong must look from outside.

Source: torch_npu's own metadata and the tables of its README, https://gitcode.com/ascend/pytorch.
"""

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

LIBRARIES = ("libascendcl.so", "libhccl.so", "libge_runner.so", "libgraph.so", "libacl_tdt_channel.so")
"""CANN's, without which torch_npu does not import."""

CANN_FOR_TORCH = {
    "2.6": ("8.2", "8.3", "8.5"),
    "2.7": ("8.3", "8.5"),
    "2.8": ("8.3", "8.5"),
    "2.9": ("8.5",),
    "2.10": ("8.5",),
    "2.11": ("8.5",),
    "2.12": ("8.5",),
}
"""The CANN releases that torch_npu's README lists for a torch; other releases, and newer torch, are not judged."""

PLACES = ("/usr/local/Ascend/ascend-toolkit", "/usr/local/Ascend/cann")
"""Where CANN's installer puts it."""

DRIVER = Path("/usr/local/Ascend/driver/version.info")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that does not fit."""

    what: str
    fix: str
    blocks: bool = True
    """Whether importing torch_npu fails or may crash."""
    breaks_torch: bool = False
    """Whether `import torch` itself does."""


def versions() -> dict[str, str | None]:
    """Versions of torch, torch_npu, CANN and the driver; None for what is not there."""
    return {"torch": _version("torch"), "torch_npu": _version("torch_npu"), "cann": _cann(), "driver": _driver()}


def problems() -> list[Problem]:
    """Everything that does not fit an installed torch_npu; nothing where none is installed."""
    if importlib.util.find_spec("torch_npu") is None:
        return []
    return [*_torch_mismatch(), *_missing_cann(), *_cann_mismatch()]


def _torch_mismatch() -> list[Problem]:
    torch, torch_npu = _version("torch"), _version("torch_npu")
    if torch is None or torch_npu is None or _release(torch) == _release(torch_npu):
        return []
    wanted = ".".join(map(str, _release(torch_npu)))
    blocks = _release(torch)[:2] != _release(torch_npu)[:2]  # 2.7.0 beside 2.7.1 may work
    return [
        Problem(
            f"torch_npu {torch_npu} is built for torch {wanted}, and torch {torch} is installed",
            f"pip install torch=={wanted}, or the torch_npu of your torch",
            blocks=blocks,
            breaks_torch=blocks and _autoloads(),
        )
    ]


def _missing_cann() -> list[Problem]:
    missing = _not_loadable()
    if not missing:
        return []
    found = [f"{place}/set_env.sh" for place in PLACES if Path(place, "set_env.sh").exists()]
    fix = f"source {found[0]}" if found else "install CANN and source its set_env.sh"
    if _autoloads():
        fix += f", or set {AUTOLOAD}=0 to do without the NPU"
    what = f"CANN's libraries are not found ({', '.join(missing)})"
    return [Problem(what, fix, breaks_torch=_autoloads())]


def _cann_mismatch() -> list[Problem]:
    torch, cann = _version("torch_npu"), _cann()
    if torch is None or cann is None:
        return []
    listed = CANN_FOR_TORCH.get(".".join(map(str, _release(torch)[:2])))
    known = {release for releases in CANN_FOR_TORCH.values() for release in releases}
    release = ".".join(map(str, _release(cann)[:2]))
    if listed is None or release in listed or release not in known:
        return []
    what = f"torch_npu {torch} is listed for CANN {' and '.join(listed)}, and CANN {cann} is installed"
    return [Problem(what, f"install CANN {listed[-1]}, or the torch_npu of your CANN", blocks=False)]


def _not_loadable() -> list[str]:
    """CANN's libraries that the loader does not find; another process tries, for they start threads."""
    code = "import ctypes, sys\nfor name in sys.argv[1:]:\n try: ctypes.CDLL(name)\n except OSError: print(name)"
    loaded = [name for name in LIBRARIES if _is_loaded(name)]
    rest = [name for name in LIBRARIES if name not in loaded]
    if not rest:
        return []
    done = subprocess.run([sys.executable, "-c", code, *rest], capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else rest


def _is_loaded(name: str) -> bool:
    """Whether this process has it already."""
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def _autoloads() -> bool:
    """Whether `import torch` loads torch_npu by itself."""
    return os.environ.get(AUTOLOAD, "1") == "1"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """2.6.0.post5+cpu to (2, 6, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _cann() -> str | None:
    home = os.environ.get("ASCEND_HOME_PATH")
    homes = [Path(home)] if home else [Path(place, "latest") for place in PLACES]
    for folder in homes:
        for name in ("version.cfg", "ascend_toolkit_install.info", "share/info/runtime/version.info"):
            for path in [folder / name, *folder.glob(f"*-linux/{name}")]:
                if found := _read_version(path):
                    return found
    return None


def _driver() -> str | None:
    return _read_version(DRIVER)


def _read_version(path: Path) -> str | None:
    """The first version=8.5.0 or ..._version=[7.7:8.5.0] of a file."""
    try:
        text = path.read_text("utf-8", "replace")
    except OSError:
        return None
    found = re.search(r"version\w*\s*=\s*(?:\[[^:\]\n]*:)?\s*(\d+(?:\.\w+)+)", text, re.IGNORECASE)
    return found.group(1) if found else None
