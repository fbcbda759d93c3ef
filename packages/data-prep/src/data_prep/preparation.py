"""Raw files to indexed datasets: read, handled, tokenized and written as a stream, in place only when whole."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path

from tqdm import tqdm

from data_prep.errors import DataError, UsageError
from data_prep.handlers import Handler, check_handler, make_handler
from data_prep.indexed_dataset import Block, IndexedWriter, sha256_of
from data_prep.manifest import Manifest, manifest_file, write_manifest
from data_prep.sources import Located, files_of, records
from data_prep.tokenizer import Tokenizer

_BATCH_RECORDS = 512
_BATCH_CHARACTERS = 1 << 20
"""A batch ends at either: a worker's message, and a step of the progress bar."""


def prepare(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    *,
    tokenizer: str | Path,
    handler_name: str = "GeneralPretrainHandler",
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 1,
    overwrite: bool = False,
) -> Manifest:
    """Writes `{output_prefix}_{key}_document.{bin,idx}` and a manifest for each key of the handler.

    The bytes are the same for any number of workers. They appear when all of them are complete; on overwriting, the old
    index goes first and the new one comes last, so that whoever reads meanwhile sees the old data, none, or the new.

    Args:
        inputs: Files or folders.
        output_prefix: Where to write; its folder is made if need be.
        tokenizer: A Hugging Face folder or a tokenizer's file.
        handler_name: How a record becomes documents: a name of `data_prep.handlers.HANDLERS`.
        json_keys: Columns that GeneralPretrainHandler reads.
        append_eod: End each document with `</s>`.
        workers: Processes that tokenize; with one, no other is started. They are spawned: a script that asks for
            several guards its main part with `if __name__ == "__main__"`.
        overwrite: Replace a data set that is there.

    Returns:
        The manifest of the handler's first key.

    Raises:
        DataError: An input, a record or the tokenizer is broken, nothing was found, or the target exists; no file is
            left under the prefix.
        UsageError: There is no such handler, or it takes no such option; no input, or no name for the output.
    """
    check_handler(handler_name, json_keys)
    if workers < 1:
        raise UsageError(f"--workers {workers}: at least one process has to work")
    if not inputs:
        raise UsageError("--input names no file and no folder")
    if not str(output_prefix) or str(output_prefix).endswith(("/", "/.", "/..")):
        raise UsageError(f"--output-prefix {str(output_prefix)!r} is a folder: end it with a name for the data set")
    files, skipped = files_of([Path(path) for path in inputs])
    if skipped:
        print(f"left out: {', '.join(map(str, skipped))} (not of the folder's main kind)", file=sys.stderr)
    recipe = _Recipe(Path(tokenizer), handler_name, tuple(json_keys), append_eod)
    encoder, handler = recipe.load()
    prefixes = [Path(f"{output_prefix}{output}") for output in handler.outputs]
    _check_target(prefixes, overwrite)
    prefixes[0].parent.mkdir(parents=True, exist_ok=True)
    writers: dict[str, IndexedWriter] = {}
    try:
        for output, prefix in zip(handler.outputs, prefixes, strict=True):
            writers[output] = IndexedWriter(prefix)
        _write_all(files, recipe, handler, workers, writers)
        if empty := [output for output, writer in writers.items() if not writer.documents]:
            raise DataError(f"the input holds no document for {', '.join(empty)}: {', '.join(map(str, files))}")
        for writer in writers.values():
            writer.finish()
        sources: list[dict[str, str | int]] = [
            {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files
        ]
        return _commit(list(writers.values()), recipe, encoder, sources)
    finally:
        for writer in writers.values():
            writer.discard()


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What a process needs to turn records into blocks."""

    tokenizer: Path
    handler_name: str
    json_keys: tuple[str, ...]
    append_eod: bool

    def load(self) -> tuple[Tokenizer, Handler]:
        tokenizer = Tokenizer(self.tokenizer)
        return tokenizer, make_handler(self.handler_name, tokenizer, self.json_keys, self.append_eod)


def _check_target(prefixes: Sequence[Path], overwrite: bool) -> None:
    folder = prefixes[0].parent
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: choose another --output-prefix")
    there = [file for prefix in prefixes for suffix in (".idx", ".bin") if (file := Path(f"{prefix}{suffix}")).exists()]
    if there and not overwrite:
        raise DataError(f"{there[0]} exists: give --overwrite to replace it, or choose another --output-prefix")


def _write_all(
    files: Sequence[Path], recipe: _Recipe, handler: Handler, workers: int, writers: dict[str, IndexedWriter]
) -> None:
    batches = (batch for file in files for batch in _batches(records(file, handler.columns)))
    with tqdm(unit="rec", unit_scale=True, desc="data-prep", disable=None, dynamic_ncols=True, file=sys.stderr) as bar:
        for number, blocks in _handled(batches, recipe, handler, workers):
            for output, block in blocks.items():
                writers[output].add(block)
            bar.update(number)
            bar.set_postfix_str(f"{sum(writer.tokens for writer in writers.values()) / len(writers):,.0f} tokens")


def _batches(stream: Iterator[Located]) -> Iterator[list[Located]]:
    batch: list[Located] = []
    characters = 0
    for located in stream:
        batch.append(located)
        characters += sum(len(value) for value in located[1].values() if isinstance(value, str))
        if len(batch) == _BATCH_RECORDS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _handled(
    batches: Iterator[list[Located]], recipe: _Recipe, handler: Handler, workers: int
) -> Iterator[tuple[int, dict[str, Block]]]:
    """(number of records, their blocks), in the order of the batches whoever made them."""
    if workers == 1:
        yield from ((len(batch), handler(batch)) for batch in batches)
        return
    pool = ProcessPoolExecutor(workers, _Context(), initializer=_start_worker, initargs=(recipe,))
    pending: deque[tuple[int, Future[dict[str, Block]]]] = deque()
    try:
        for batch in batches:
            with _no_signals():
                pending.append((len(batch), pool.submit(_handle, batch)))
            if len(pending) > 2 * workers:  # bounds the memory
                number, blocks = pending.popleft()
                yield number, blocks.result()
        for number, blocks in pending:
            yield number, blocks.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died (out of memory, or killed): run again, perhaps with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Worker(SpawnProcess):
    """A worker, from which SIGTERM is kept: the pool, to end the others when one has died, needs another means."""

    def terminate(self) -> None:
        self.kill()


class _Context(SpawnContext):
    """Workers are spawned, not forked: the parent has the threads of pyarrow and of the progress bar."""

    Process = _Worker


@contextlib.contextmanager
def _no_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the end, and never reach a process started meanwhile: the parent stops the pool.

    A worker could not ignore Ctrl-C itself early enough: it would die with a traceback while it still imports. One that
    SIGTERM ends amid a result would leave the pool waiting for the rest of it, and a parent that either stops between a
    worker's start and the pool's note of it would wait for that worker, for ever.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_handler: Callable[[Sequence[Located]], dict[str, Block]]
"""Of a worker process: loaded once, when it starts."""


def _start_worker(recipe: _Recipe) -> None:
    global _worker_handler
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_handler = recipe.load()[1]


def _end_with_parent() -> None:
    """A killed parent stops no pool: its workers would wait for the next batch for ever, and hold its stderr open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _handle(batch: list[Located]) -> dict[str, Block]:
    return _worker_handler(batch)


def _commit(
    writers: Sequence[IndexedWriter], recipe: _Recipe, encoder: Tokenizer, sources: list[dict[str, str | int]]
) -> Manifest:
    """Puts every file in its place: readers refuse a `.bin` without its `.idx`, so the indices frame the change."""
    manifests = [
        Manifest(
            data_prep_version=metadata.version("puna-data-prep"),
            inputs=sources,
            handler=recipe.handler_name,
            append_eod=recipe.append_eod,
            encoder=f"{encoder.encoder} {metadata.version(encoder.encoder)}",
            vocab_size=encoder.vocab_size,
            vocab_sha256=encoder.vocab_sha256,
            probe_sha256=encoder.probe_sha256,
            dtype="int32",
            documents=writer.documents,
            sequences=writer.sequences,
            tokens=writer.tokens,
            bin_sha256=writer.sha256[".bin"],
            idx_sha256=writer.sha256[".idx"],
        )
        for writer in writers
    ]
    folder = writers[0].prefix.parent
    for writer in writers:
        Path(f"{writer.prefix}.idx").unlink(missing_ok=True)
        manifest_file(writer.prefix).unlink(missing_ok=True)
    _sync(folder)
    for writer, manifest in zip(writers, manifests, strict=True):
        writer.put(".bin")
        write_manifest(writer.prefix, manifest)
    _sync(folder)
    for writer in writers:
        writer.put(".idx")
    _sync(folder)
    return manifests[0]


def _sync(folder: Path) -> None:
    """Makes the renames so far survive a power cut before those that follow."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
