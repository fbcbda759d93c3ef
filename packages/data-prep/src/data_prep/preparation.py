"""Raw files to indexed datasets: read, handled, tokenized and written as a stream, in place only when whole."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from data_prep.committing import check_target, commit
from data_prep.comparison import disagreement
from data_prep.errors import DataError, UsageError
from data_prep.indexed_writer import IndexedWriter, sha256_of
from data_prep.instruction import OUTPUTS
from data_prep.journal import Journal, fingerprint, read_journal, remove_journal, write_journal
from data_prep.manifest import LISTED, Manifest
from data_prep.packing import Packer
from data_prep.plan import Plan
from data_prep.pool import results
from data_prep.progress import Progress
from data_prep.readers import batches
from data_prep.recipe import Done, Task, Worker
from data_prep.sources import Source, part_of, passes, sources_of

JOURNAL_S = 10.0
"""Between two notes of how far a run is: what a killed one does again is no more than that."""


def prepare(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    *,
    tokenizer: str | Path,
    handler_name: str = "GeneralPretrainHandler",
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    prompt_type: str | None = None,
    map_keys: Mapping[str, Any] | None = None,
    input_weights: Sequence[float] = (),
    special_tokens_in_text: str = "match",
    dtype: str = "int32",
    pack_length: int | None = None,
    skip_bad_records: bool = False,
    num_shards: int = 1,
    shard_index: int = 0,
    workers: int = 1,
    resume: bool = False,
    log_interval: int = 0,
    overwrite: bool = False,
    executor: str = "local",
) -> Manifest:
    """Writes `{output_prefix}_{key}_document.{bin,idx}` and a manifest for each key of the handler.

    The bytes are the same for any number of workers. They appear when all of them are complete; on overwriting, the old
    index goes first and the new one comes last, so that whoever reads meanwhile sees the old data, none, or the new.

    Args:
        inputs: Files or folders.
        output_prefix: Where to write; its folder is made if need be.
        tokenizer: A Hugging Face folder or a tokenizer's file.
        handler_name: How a record becomes documents: a name of `data_prep.handlers.kinds()`.
        json_keys: Columns that GeneralPretrainHandler reads.
        append_eod: End each document with `</s>`.
        prompt_type: A name of `data_prep.templates.CHATS`, for the handlers of conversations.
        map_keys: Role to column, for the handlers of conversations.
        input_weights: How many times each input is read; a fraction takes that share of its records.
        special_tokens_in_text: "match" makes special ids of `</s>` and the like in a text, "ignore" plain text.
        dtype: "int32", or "uint16" where ids are no labels and fit.
        pack_length: Packs documents to this many tokens, see `Packer`.
        skip_bad_records: Leave out what cannot be used, and list it, instead of stopping there.
        num_shards: Write one of so many parts, which `merge` joins; its prefix gets `-00000-of-00002` and so on.
        shard_index: Of the part, from 0.
        workers: Processes that tokenize, this one among them; others are started where there is enough to do.
        resume: Continue what a killed run with the same options left.
        log_interval: Documents between two lines on stderr where it is no terminal; 0 for none.
        overwrite: Replace a data set that is there.
        executor: "local", or "ray": the shards of the data set are made on a Ray cluster, `workers` at a time.

    Returns:
        The manifest of the handler's first key.

    Raises:
        DataError: An input, a record or the tokenizer is broken, nothing was found, or the target exists; no file is
            left under the prefix.
        UsageError: There is no such handler, or it takes no such option; no input, or no name for the output.
    """
    plan = Plan(
        inputs=tuple(Path(path) for path in inputs),
        output_prefix=str(output_prefix),
        tokenizer=Path(tokenizer),
        handler_name=handler_name,
        json_keys=tuple(json_keys),
        append_eod=append_eod,
        prompt_type=prompt_type,
        map_keys=map_keys,
        input_weights=tuple(input_weights),
        special_tokens_in_text=special_tokens_in_text,
        dtype=dtype,
        pack_length=pack_length,
        skip_bad_records=skip_bad_records,
        num_shards=num_shards,
        shard_index=shard_index,
    )
    if executor == "ray":
        from data_prep.executors import make_on_ray

        if resume:
            raise UsageError("--resume: with --executor ray, shards are made again as a whole")
        return make_on_ray(plan, workers=workers, overwrite=overwrite)
    if executor != "local":
        raise UsageError(f"--executor {executor}: local or ray")
    return make(plan, workers=workers, resume=resume, log_interval=log_interval, overwrite=overwrite)


def make(plan: Plan, *, workers: int, resume: bool, log_interval: int, overwrite: bool) -> Manifest:
    """`prepare`, of a plan."""
    if workers < 1:
        raise UsageError(f"--workers {workers}: at least one process has to work")
    sources, skipped = sources_of(plan.inputs, plan.input_weights)
    if skipped:
        _say(f"left out: {', '.join(skipped)} (not of the folder's main kind)")
    worker = Worker(plan.recipe)
    _check_dtype(plan, worker)
    prefixes = [Path(f"{plan.prefix}{output}") for output in worker.handler.outputs]
    check_target(prefixes, overwrite)
    prefixes[0].parent.mkdir(parents=True, exist_ok=True)
    run = _Run(plan, sources, worker, prefixes)
    if plan.append_eod and not worker.handler.appends_eod:
        _say(f"note: {plan.handler_name} appends no </s>, as AscendSpeed's: --append-eod changes nothing")
    try:
        run.open(resume)
        run.work(workers, log_interval)
        manifests = run.finish()
        commit(list(run.writers.values()), manifests)
        run.summarize()
        return manifests[0]
    except OSError as error:  # a full disk does not say which
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, plan.prefix) from None
    finally:
        run.discard()


def _check_dtype(plan: Plan, worker: Worker) -> None:
    if plan.dtype != "uint16":
        return
    if worker.handler.outputs == OUTPUTS:
        raise UsageError(f"--dtype uint16: {plan.handler_name} writes labels, and -100 is none of its numbers")
    if worker.tokenizer.vocab_size > 1 << 16:
        raise UsageError(f"--dtype uint16: the vocabulary has {worker.tokenizer.vocab_size} ids, above 65536")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


class _Run:
    """One run at work: its files, and how far it is."""

    def __init__(self, plan: Plan, whole: Sequence[Source], worker: Worker, prefixes: Sequence[Path]) -> None:
        self.plan, self.worker, self._prefixes = plan, worker, prefixes
        self._whole = whole
        parts = part_of(whole, plan.shard_index, plan.num_shards)
        self._reads = [(source, share) for source in parts for _, share in passes(source)]
        self.writers: dict[str, IndexedWriter] = {}
        self._packer: Packer | None = None
        if plan.pack_length:
            self._packer = Packer(plan.pack_length, merge=worker.handler.outputs == OUTPUTS)
        self._journal = Journal(self._fingerprint())
        self._progress: Progress | None = None

    def _fingerprint(self) -> str:
        tokenizer = self.worker.tokenizer
        files = [(source, source.path.stat().st_mtime_ns) for source in self._whole]
        return fingerprint([asdict(self.plan), tokenizer.vocab_sha256, tokenizer.probe_sha256, str(files)])

    def open(self, resume: bool) -> None:
        """Opens the files: anew, or as a killed run left them."""
        found = read_journal(self._prefixes[0], self._journal.run) if resume else None
        if resume:
            _say(f"resuming behind {found.records:,} records" if found else "nothing to resume: beginning anew")
        for output, prefix in zip(self.worker.handler.outputs, self._prefixes, strict=True):
            state = found.writers[output] if found else None
            self.writers[output] = IndexedWriter(prefix, self.plan.dtype, state)
        if found:
            self._journal = found
            if self._packer:
                vars(self._packer).update(found.packer)
        else:
            remove_journal(self._prefixes[0])

    def work(self, workers: int, log_interval: int) -> None:
        """Reads, tokenizes and writes everything."""
        begun = (self._journal.done_bytes, *self._written())
        self._progress = Progress(sum(source.size for source, _ in self._reads), log_interval, _say, begun)
        noted = time.monotonic()
        try:
            for (number, before), (task, done) in self._done(workers):
                self._add(done)
                journal = self._journal
                journal.source, journal.begin, journal.records = number, task.batch.end, journal.records + done.records
                journal.done_bytes = before + task.batch.read_bytes
                self._progress.counts.add(done.counts)
                self._progress.at(journal.done_bytes, *self._written())
                if time.monotonic() - noted >= JOURNAL_S:
                    self._note()
                    noted = time.monotonic()
        finally:
            self._progress.close()

    def _done(self, workers: int) -> Iterator[tuple[tuple[int, int], tuple[Task, Done]]]:
        """((number of the read, bytes before it), (task, what it became)), in order."""
        places: list[tuple[int, int]] = []

        def tasks() -> Iterator[Task]:
            for number, source, share, before in self._left():
                handler = self.worker.handler
                found = batches(source, handler.columns, handler.optional, skip_bad=self.plan.skip_bad_records)
                for batch in found:
                    places.append((number, before))
                    yield Task(batch, share)

        for each in results(tasks(), self.plan.recipe, self.worker, workers):
            yield places.pop(0), each

    def _left(self) -> Iterator[tuple[int, Source, float, int]]:
        """(number, source, share, bytes before it) of what is still to be read."""
        before, first, begin = 0, self._journal.source, self._journal.begin
        for number, (source, share) in enumerate(self._reads):
            if number == first and begin:
                yield number, replace(source, begin=begin, aligned=True), share, before
            elif number >= first:
                yield number, source, share, before
            before += source.size

    def _add(self, done: Done) -> None:
        journal = self._journal
        journal.bad += done.bad[: LISTED - len(journal.bad)]
        journal.bad_count += len(done.bad)
        for line in done.bad:
            _say(f"skipped: {line}")
        if not done.blocks:
            return
        blocks = self._packer.pack(done.blocks) if self._packer else done.blocks
        for output, block in blocks.items():
            self.writers[output].add(block)

    def _written(self) -> tuple[int, int]:
        """Documents and tokens."""
        first = next(iter(self.writers.values()))
        return first.documents, first.tokens

    def _note(self) -> None:
        self._journal.writers = {output: writer.state() for output, writer in self.writers.items()}
        if self._packer:
            self._journal.packer = {
                name: vars(self._packer)[name] for name in ("open_tokens", "open_count", "too_long")
            }
        write_journal(self._prefixes[0], self._journal)

    def finish(self) -> list[Manifest]:
        """Completes the files, still beside their places."""
        if self._packer:
            for output, block in self._packer.rest(tuple(self.writers)).items():
                self.writers[output].add(block)
        empty = [output for output, writer in self.writers.items() if not writer.documents]
        if empty and self.plan.num_shards == 1:
            names = [source.name for source in self._whole]
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise DataError(f"the input holds no document for {', '.join(empty)}: {listed}")
        for writer in self.writers.values():
            writer.finish()
        return self._manifests()

    def _manifests(self) -> list[Manifest]:
        plan, tokenizer = self.plan, self.worker.tokenizer
        common: dict[str, Any] = {
            "data_prep_version": metadata.version("puna-data-prep"),
            "inputs": self._inputs(),
            "handler": plan.handler_name,
            "append_eod": plan.append_eod and self.worker.handler.appends_eod,
            "encoder": f"{tokenizer.encoder} {metadata.version(tokenizer.encoder)}",
            "vocab_size": tokenizer.vocab_size,
            "vocab_sha256": tokenizer.vocab_sha256,
            "probe_sha256": tokenizer.probe_sha256,
            "dtype": plan.dtype,
            "options": plan.facts,
            "skipped": self._journal.bad_count,
            "skipped_records": self._journal.bad,
            "shard": [plan.shard_index, plan.num_shards] if plan.num_shards > 1 else None,
        }
        return [
            Manifest(
                documents=writer.documents,
                sequences=writer.sequences,
                tokens=writer.tokens,
                bin_sha256=writer.sha256[".bin"],
                idx_sha256=writer.sha256[".idx"],
                **common,
            )
            for writer in self.writers.values()
        ]

    def _inputs(self) -> list[dict[str, Any]]:
        """Name, bytes and sha256 of each file; a shard hashes those whose beginning it read."""
        ours = {source.path for source, _ in self._reads if not source.begin}
        paths = dict.fromkeys(source.path for source in self._whole)
        return [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path) if path in ours else None}
            for path in paths
        ]

    def summarize(self) -> None:
        """Says on stderr how it went."""
        assert self._progress is not None
        progress = self._progress
        progress.at(sum(source.size for source, _ in self._reads), *self._written())
        _say(f"{progress.seconds:.1f} s: {progress.rates()}; {progress.cache()}")
        if note := disagreement(self.worker.tokenizer, self.plan.tokenizer):
            _say(f"note: {note}")
        if self._journal.bad_count:
            _say(f"{self._journal.bad_count:,} records were skipped")
        if self._packer and self._packer.too_long:
            _say(f"{self._packer.too_long:,} documents are packs of their own: they are longer than a pack")

    def discard(self) -> None:
        """Removes what is not in its place."""
        for writer in self.writers.values():
            writer.discard()
        if self.writers:
            remove_journal(self._prefixes[0])
