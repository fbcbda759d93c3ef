"""Makes a console script of a few functions: subcommands, one-line errors, the exit codes of every Puna command.

The same file stands in ckpt-tools, data-prep and npu-kernels, which depend on nothing of each other; a test at the
repository's root keeps the copies equal. llama-model, trainer and evaluator import ckpt-tools' copy.

Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 ran but a check failed, 130 interrupted, 143 terminated, 129
hung up.
"""

import contextlib
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NoReturn

import tyro

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def run(
    prog: str,
    summary: str,
    commands: Mapping[str, Callable[..., int]],
    argv: Sequence[str] | None = None,
) -> int:
    """The exit code of running `argv` (default: the process's) as `prog VERB ...`.

    Args:
        prog: The console script's name; its distribution is `puna-{prog}`.
        summary: What `prog --help` says first.
        commands: Verb to function. Its keyword-only parameters become long options, its `tyro.conf.Positional`
            ones arguments, its docstring the help; it returns an exit code. An exception that carries an integer
            `exit_code`, and any OSError, is the user's to mend and becomes one line on stderr.
        argv: Arguments without the program's name. `--debug` anywhere shows tracebacks.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["--version"]:
        print(f"{prog} {metadata.version(f'puna-{prog}')}")
        return 0
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        return _parse_and_call(prog, summary, commands, args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left (`... | head`): nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if debug:
            raise
        print(f"error: {_one_line(_describe(error))}", file=sys.stderr)
        return getattr(error, "exit_code", FAILED)


@contextlib.contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """SIGTERM (docker stop, a scheduler, `timeout`) unwinds the stack, as Ctrl-C does, instead of ending it at once.

    So does SIGHUP (a terminal that is closed), unless `nohup` has it ignored. For commands that write: what is half
    written is deleted on the way out.
    """
    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = [(number, signal.signal(number, _terminate)) for number in heeded]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _terminate(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice: the second must not end the cleaning up
    raise SystemExit(128 + number)


def _parse_and_call(prog: str, summary: str, commands: Mapping[str, Callable[..., int]], args: list[str]) -> int:
    """Parses first, calls afterwards: only the parser's own complaints are folded into one line."""
    chosen: list[Callable[[], int]] = []
    deferred = {verb: _deferred(function, chosen) for verb, function in commands.items()}
    asked_for_help = not args or "-h" in args or "--help" in args
    complaint = io.StringIO()
    capture: contextlib.AbstractContextManager[Any] = contextlib.redirect_stderr(complaint)
    try:
        with contextlib.nullcontext() if asked_for_help else capture, _wide(not asked_for_help):
            tyro.extras.subcommand_cli_from_dict(
                deferred,
                prog=prog,
                description=f"{summary} ({prog} --version; --debug for tracebacks)",
                args=args or ["--help"],
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if stop.code in (0, None) and args:
            return 0
        if text := complaint.getvalue():
            print(f"error: {_one_line(_unboxed(text))}", file=sys.stderr)
        return USAGE
    return chosen[0]()


def _deferred(function: Callable[..., int], chosen: list[Callable[[], int]]) -> Callable[..., None]:
    """`function` with its signature and help, which notes the parsed call instead of making it."""

    @functools.wraps(function)
    def note(*args: Any, **kwargs: Any) -> None:
        chosen.append(lambda: function(*args, **kwargs))

    note.__annotations__ = {**function.__annotations__, "return": None}
    return note


@contextlib.contextmanager
def _wide(on: bool) -> Iterator[None]:
    """Keeps the parser from wrapping a message in the middle of a name."""
    before = os.environ.get("COLUMNS")
    if on:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if on:
            os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)


def _unboxed(text: str) -> str:
    """The words inside the parser's boxed message, without the box and its title."""
    words = re.findall(r"^│ (.*) │$", text, re.MULTILINE)
    words = words or text.splitlines()  # a stderr that is not UTF-8 gets no box
    joined = "; ".join(line.strip(" .") for line in words if line.strip("─- "))
    return joined.replace(":;", ":").replace("; For full", ". For full")


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if hasattr(error, "exit_code"):
        return str(error)
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)"


def _one_line(text: str) -> str:
    return " ".join(text.split())
