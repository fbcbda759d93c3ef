"""Facts that stand in several places agree: metadata, copies, commands."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GRAPH = {
    "npu-kernels": set(),
    "ckpt-tools": set(),
    "data-prep": set(),
    "llama-model": {"npu-kernels", "ckpt-tools", "data-prep"},
    "trainer": {"npu-kernels", "ckpt-tools", "data-prep", "llama-model"},
    "evaluator": {"npu-kernels", "ckpt-tools", "data-prep", "llama-model"},
}
PACKAGES = sorted(GRAPH)


def metadata(package):
    return tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text("utf-8"))["project"]


def siblings(requirements):
    found = (re.match(r"puna-([a-z-]+)", requirement) for requirement in requirements)
    return {match.group(1) for match in found if match}


@pytest.mark.parametrize("package", PACKAGES)
def test_metadata_declares_the_graph(package):
    project = metadata(package)
    assert project["name"] == f"puna-{package}"
    assert siblings(project["dependencies"]) == GRAPH[package]
    assert project["scripts"] == {package: f"{package.replace('-', '_')}.cli:main"}


@pytest.mark.parametrize("package", PACKAGES)
def test_siblings_are_pinned_by_range(package):
    extras = metadata(package).get("optional-dependencies", {}).values()
    for requirement in [*metadata(package)["dependencies"], *(item for extra in extras for item in extra)]:
        if requirement.startswith("puna-"):
            assert re.search(r">=0\.1,<0\.2$", requirement), requirement


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_its_papers(package):
    folder = ROOT / "packages" / package
    version = metadata(package)["version"]
    assert f"## {version}" in (folder / "CHANGELOG.md").read_text("utf-8")
    readme = (folder / "README.md").read_text("utf-8")
    assert f"./packages/{package}" in readme, "how to install it"
    assert (folder / "src" / package.replace("-", "_") / "py.typed").exists()


def test_the_command_line_copies_are_equal():
    copies = [ROOT / f"packages/{p}/src/{p.replace('-', '_')}/commandline.py" for p in GRAPH if not GRAPH[p]]
    assert len({copy.read_text("utf-8") for copy in copies}) == 1


def test_ci_runs_the_readmes_test_command():
    command = "python3 -m venv .venv && .venv/bin/pip install 'nox[uv]' && .venv/bin/nox\n"
    assert command in (ROOT / "README.md").read_text("utf-8")
    assert command in (ROOT / ".ci/run").read_text("utf-8").replace("install -q", "install")


def test_constraints_pin_every_dependency_exactly():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^ ]+", pin) for pin in pins)
    pinned = {normal(pin.split("==")[0]) for pin in pins}
    for package in PACKAGES:
        for requirement in metadata(package)["dependencies"]:
            name = normal(re.match(r"[A-Za-z0-9._-]+", requirement).group())
            assert name in pinned or name.startswith("puna-"), f"{package} needs {name}"


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_nobody_elses_machine_is_named():
    """No home anywhere, and no folder above this checkout where a path may begin."""
    above = [rf"(?<![^\s\"'`(=,\[]){re.escape(str(folder))}/" for folder in ROOT.parents if folder.name]
    machine = re.compile("|".join(["/root/", "/home/", *above]))
    for path in [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("packages/*/*.md"), *ROOT.glob("*.md")]:
        assert not machine.search(path.read_text("utf-8")), path
