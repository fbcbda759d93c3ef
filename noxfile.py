"""Every check of the repository, and the demo. `nox` runs the default list, `nox -l` shows it, `nox -s NAME` runs one.

Arguments after `--` go to pytest (or to the demo). Environments are made by uv where it is there: they share hard
links, so that six with torch cost the disk of one.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

import nox

if sys.version_info < (3, 11):  # noqa: UP036  (whoever runs this may have an older one)
    raise SystemExit("error: Puna needs Python 3.11 or newer to run its sessions")

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "arch", "bare", "tests", "npu_contract", "road", "pythons"]

# uv does not read pip's configuration: hand on where local wheels lie, so that a CPU build of torch is found there.
if "PIP_FIND_LINKS" in os.environ:
    os.environ.setdefault("UV_FIND_LINKS", os.environ["PIP_FIND_LINKS"])

SIBLINGS = {
    "npu-kernels": [],
    "ckpt-tools": [],
    "data-prep": [],
    "llama-model": ["npu-kernels", "ckpt-tools", "data-prep"],
    "trainer": ["npu-kernels", "ckpt-tools", "data-prep", "llama-model"],
    "evaluator": ["npu-kernels", "ckpt-tools", "data-prep", "llama-model"],
}
PACKAGES = list(SIBLINGS)
OTHER_PYTHONS = ["3.12", "3.13"]
CONSTRAINTS = ("-c", "constraints.txt")
IN_ONE_PROCESS = ("npu-kernels", "ckpt-tools", "data-prep")
"""Packages whose tests mostly keep to one process: two run at a time. The others' fill both cores themselves."""


def folders(package: str, extras: str = "") -> list[str]:
    """`package` and its siblings as folders: a name alone would be looked up on the public index."""
    return [f"./packages/{package}{extras}", *(f"./packages/{sibling}" for sibling in SIBLINGS[package])]


def test_group(package: str) -> list[str]:
    """What the tests of `package` need besides what it declares."""
    return nox.project.dependency_groups(nox.project.load_toml(f"packages/{package}/pyproject.toml"), "test")


def install_all(session: nox.Session) -> None:
    """All six packages, each with all that its tests and the demo need."""
    needs = sorted({requirement for package in PACKAGES for requirement in test_group(package)})
    session.install(*CONSTRAINTS, *(f"-e./packages/{package}" for package in PACKAGES), *needs)


@nox.session
def demo(session: nox.Session) -> None:
    """The whole road: raw text to an evaluated model, on two cores. `-- --quick` trains a few steps only."""
    install_all(session)
    session.run("python", "demo/run.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    session.install(*CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict, on every package's sources, the demo, the example and the benchmarks."""
    install_all(session)
    session.install(*CONSTRAINTS, "mypy", "types-PyYAML")
    session.run("mypy", *(f"packages/{package}/src" for package in PACKAGES))
    session.run("mypy", "demo", "examples", "benchmarks")


@nox.session
def arch(session: nox.Session) -> None:
    """DESIGN's dependency graph, on the imports (import-linter) and on the metadata; facts that stand twice agree."""
    install_all(session)
    session.install(*CONSTRAINTS, "import-linter")
    session.run("lint-imports")
    session.run("pytest", "tests/test_repository.py", *session.posargs)


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def bare(session: nox.Session, package: str) -> None:
    """One package with nothing but what it declares: it installs from folders, imports, and answers."""
    session.install(*CONSTRAINTS, *folders(package))
    session.run("python", "tests/bare.py", package)


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def tests(session: nox.Session, package: str) -> None:
    """One package's tests, in an environment with only what it declares and its test group."""
    session.install(*CONSTRAINTS, *folders(package), *test_group(package))
    session.chdir(f"packages/{package}")
    if package in IN_ONE_PROCESS:
        session.run("pytest", "-n", "2", "--dist", "worksteal", *session.posargs, env={"OMP_NUM_THREADS": "1"})
    else:
        session.run("pytest", *session.posargs)


@nox.session
def matrix(session: nox.Session) -> None:
    """The trainer in every layout up to 8 processes against Hugging Face: a table in benchmarks/. Ten minutes."""
    session.install(*CONSTRAINTS, *folders("trainer"), *test_group("trainer"))
    session.chdir("packages/trainer")
    table = ["../../benchmarks/ptd_matrix.md"]
    session.run("python", "tests/matrix.py", *(session.posargs or table), env={"PYTHONPATH": "../llama-model/tests"})


@nox.session
def npu_contract(session: nox.Session) -> None:
    """Every call to Ascend's ops, llama-model and trainer on the real torch_npu over an emulated CANN.

    Built with gcc for x86-64 Linux; the wheel is for Python 3.10 to 3.12.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        session.skip(f"the emulated CANN is for x86-64 Linux, this is {platform.machine()} {sys.platform}")
    if not shutil.which("gcc"):
        session.skip("needs gcc")
    if sys.version_info >= (3, 13):
        session.skip("torch_npu has no wheel for this Python")
    session.install(*CONSTRAINTS, *folders("trainer"), *test_group("npu-kernels"), "torch_npu")
    session.chdir("packages/npu-kernels")
    session.run("pytest", "tests/contract", *session.posargs, env={"REQUIRE_EMULATED_NPU": "1"})


@nox.session
def road(session: nox.Session) -> None:
    """The packages together: the demo's road with few steps, the example pipeline, all six console scripts."""
    install_all(session)
    session.run("pytest", "tests/test_scripts.py", "tests/test_road.py", *session.posargs)


@nox.session(venv_backend="none")
def pythons(session: nox.Session) -> None:
    """Each package installs, imports and answers `--help` on the other versions it claims, where they are found.

    Without torch, whose wheels for them may bring gigabytes of CUDA: none of the three needs it. `-- --with-torch`
    installs it too.
    """
    uv = nox.virtualenv.UV
    if not uv:
        session.skip("needs uv (pip install 'nox[uv]')")
    for version in OTHER_PYTHONS:
        interpreter = _interpreter(session, uv, version)
        if not interpreter:
            session.warn(f"no Python {version} on this machine: not checked")
            continue
        for package in PACKAGES:
            _check_on(session, uv, interpreter, version, package)


def _interpreter(session: nox.Session, uv: str, version: str) -> str:
    """The path of a Python `version`, or an empty text: uv's search, then pyenv's versions that no shim leads to."""
    env = {"UV_PYTHON_DOWNLOADS": "never"}
    found = session.run(uv, "python", "find", version, silent=True, external=True, env=env, success_codes=[0, 2])
    if found and Path(found.strip()).exists():
        return found.strip()
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return max(map(str, pyenv.glob(f"versions/{version}.*/bin/python")), default="")


def _check_on(session: nox.Session, uv: str, interpreter: str, version: str, package: str) -> None:
    home = Path(session.cache_dir) / f"python-{version}" / package
    session.run(uv, "venv", "--quiet", "--clear", "--python", interpreter, str(home), external=True)
    override = Path(session.cache_dir) / "without-torch.txt"
    override.write_text("torch; python_version < '0'\nmegatron-core; python_version < '0'\n", "utf-8")
    without = () if "--with-torch" in session.posargs else ("--override", str(override))
    python = str(home / "bin/python")
    install = (uv, "pip", "install", "--quiet", "--python", python, *CONSTRAINTS, *without)
    session.run(*install, *folders(package), external=True)
    session.run(python, "tests/bare.py", package, external=True)


@nox.session
def build(session: nox.Session) -> None:
    """A wheelhouse of all six packages in dist/: `pip install --find-links dist puna-ckpt-tools`."""
    session.install(*CONSTRAINTS, "build", "hatchling")
    for package in PACKAGES:
        session.run("python", "-m", "build", "--no-isolation", "--wheel", "--outdir", "dist", f"packages/{package}")
