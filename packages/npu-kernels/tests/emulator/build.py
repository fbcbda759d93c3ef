"""Builds the emulated CANN libraries with gcc, for the torch_npu wheel that is installed."""

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

EMPTY = ("ge_runner", "graph", "acl_tdt_channel")
"""Libraries that the wheel links to and that nothing here calls."""

LIBRARIES = ("ascendcl", "hccl", *EMPTY, "acl_op_compiler", "opapi")
"""All that are built, in the order in which they are loaded."""

SAVE_REGISTERS = """
.text
.Lrecord:
    push %rbp
    mov %rsp, %rbp
    sub $128, %rsp
    mov %rdi, -48(%rbp)
    mov %rsi, -40(%rbp)
    mov %rdx, -32(%rbp)
    mov %rcx, -24(%rbp)
    mov %r8, -16(%rbp)
    mov %r9, -8(%rbp)
    movsd %xmm0, -112(%rbp)
    movsd %xmm1, -104(%rbp)
    movsd %xmm2, -96(%rbp)
    movsd %xmm3, -88(%rbp)
    movsd %xmm4, -80(%rbp)
    movsd %xmm5, -72(%rbp)
    movsd %xmm6, -64(%rbp)
    movsd %xmm7, -56(%rbp)
    mov %eax, %edi
    lea -48(%rbp), %rsi
    lea -112(%rbp), %rdx
    lea 16(%rbp), %rcx
    call emulator_record@PLT
    leave
    ret
.section .note.GNU-stack,"",@progbits
.text
"""
"""emulator_record(op's number in eax, integer registers, floating-point registers, stack) of the System V ABI."""


def why_not() -> str | None:
    """Why the emulator cannot run here; None where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the emulated CANN is for x86-64 Linux, this is {platform.machine()} {sys.platform}"
    missing = [tool for tool in ("gcc", "nm") if not shutil.which(tool)]
    if missing:
        return f"building the emulated CANN needs {' and '.join(missing)}"
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed here: `nox -s npu_contract` runs these with it"
    if "ASCEND_HOME_PATH" in os.environ:
        return "a real CANN is set up here (ASCEND_HOME_PATH)"
    return None


def wheel() -> Path:
    """The installed torch_npu's folder, found without importing it."""
    spec = importlib.util.find_spec("torch_npu")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build(folder: Path) -> Path:
    """A folder below `folder` with the libraries; built once for each wheel and each version of these sources."""
    binary = wheel() / "lib/libtorch_npu.so"
    key = hashlib.sha256(f"{binary} {binary.stat().st_size}".encode())
    for source in (*sorted(HERE.glob("*.c")), Path(__file__)):
        key.update(source.read_bytes())
    made = folder / key.hexdigest()[:16]
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder))
        _build_ascendcl(scratch)
        _build_opapi(scratch, binary)
        with contextlib.suppress(OSError):  # another process was first
            scratch.rename(made)
    return made


def _build_ascendcl(folder: Path) -> None:
    asked = set()
    for library in [*wheel().glob("lib/*.so"), *wheel().glob("_C.*.so")]:
        said = _output("nm", "-D", "--undefined-only", str(library))
        asked |= set(re.findall(r"^\s+U ((?:acl|rt[A-Z]|Msprof)\w*)", said, re.MULTILINE))
    source = (HERE / "ascendcl.c").read_text("utf-8")
    implemented = set(re.findall(r"^(?:SUCCEEDS\(|\w[\w *]*?\b)(acl\w+)[()]", source, re.MULTILINE))
    stubs = folder / "stubs.c"
    stubs.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(asked - implemented)))
    _compile(folder, "ascendcl", HERE / "ascendcl.c", stubs)
    _compile(folder, "hccl", HERE / "hccl.c")
    empty = folder / "empty.c"
    empty.write_text("")
    for name in EMPTY:
        _compile(folder, name, empty)
    # torch_npu looks some of ascendcl's functions up in it
    _compile(folder, "acl_op_compiler", empty, "-Wl,--no-as-needed", f"-L{folder}", "-lascendcl")


def _build_opapi(folder: Path, binary: Path) -> None:
    suffix = "GetWorkspaceSize"
    found = set(re.findall(rf"\0(aclnn\w+?){suffix}\0".encode(), binary.read_bytes()))
    names = sorted(name.decode() for name in found)
    lines = [SAVE_REGISTERS]
    for index, name in enumerate(names):
        lines.append(f".globl {name}{suffix}\n{name}{suffix}: mov ${index}, %eax\njmp .Lrecord")
        lines.append(f".globl {name}\n{name}: xor %eax, %eax\nret")
    trampolines = folder / "trampolines.S"
    trampolines.write_text("\n".join(lines) + "\n")
    table = folder / "names.c"
    quoted = ", ".join(f'"{name}"' for name in names)
    table.write_text(f"const char *emulator_names[] = {{{quoted}}};\n")
    _compile(folder, "opapi", HERE / "opapi.c", table, trampolines)


def _compile(folder: Path, name: str, *inputs: Path | str) -> None:
    target = folder / f"lib{name}.so"
    flags = ("-w", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{target.name}")
    _output("gcc", *flags, "-o", str(target), *map(str, inputs))


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
