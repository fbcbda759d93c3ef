"""From raw files to data sets: the same bytes whoever works, whole or not at all."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from conftest import ROWS, TEXTS
from data_prep import DataError, IndexedDataset, Tokenizer, pool, prepare, read_manifest
from data_prep.errors import UsageError
from data_prep.indexed_writer import IndexedWriter, sha256_of
from data_prep.verification import verify


def content(folder, prefix):
    return {path.name.removeprefix(prefix): path.read_bytes() for path in folder.glob(f"{prefix}_*") if path.is_file()}


def small_batches(monkeypatch, size):
    """Batches of about so many bytes, and helpers from the first of them on."""
    monkeypatch.setattr("data_prep.batching.BATCH_BYTES", size)
    monkeypatch.setattr("data_prep.batching.BLOCK", size)
    monkeypatch.setattr("data_prep.pool.START_AFTER_S", 0)


def test_documents_and_manifest(folder, corpus, tmp_path):
    manifest = prepare([corpus], tmp_path / "new/out", tokenizer=folder, append_eod=True)
    data, tokenizer = IndexedDataset(tmp_path / "new/out"), Tokenizer(folder)
    expected = [tokenizer.encode(text, eos=True) for text in TEXTS]
    assert [row.tolist() for row in data] == expected
    assert data.document_indices.tolist() == list(range(len(TEXTS) + 1))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "out_text_document.bin",
        "out_text_document.idx",
        "out_text_document.manifest.json",
    ]
    assert manifest == read_manifest(tmp_path / "new/out") == read_manifest(tmp_path / "new/out_text_document")
    assert manifest.inputs == [{"name": "corpus.jsonl", "bytes": corpus.stat().st_size, "sha256": sha256_of(corpus)}]
    assert (manifest.documents, manifest.sequences) == (len(TEXTS), len(TEXTS))
    assert manifest.tokens == sum(map(len, expected))
    assert (manifest.vocab_sha256, manifest.probe_sha256) == (tokenizer.vocab_sha256, tokenizer.probe_sha256)
    assert manifest.vocab_size == tokenizer.vocab_size
    assert manifest.encoder.startswith("sentencepiece ")


def test_columns_of_other_names_are_noted(folder, tmp_path):
    (tmp_path / "in.csv").write_text("a,b\nthe llama,walks\n", "utf-8")
    manifest = prepare([tmp_path / "in.csv"], tmp_path / "out", tokenizer=folder, json_keys=("a", "b"))
    assert manifest.options == {"json_keys": ["a", "b"]}
    assert manifest == read_manifest(tmp_path / "out_a_document")
    assert len(IndexedDataset(tmp_path / "out_b_document")) == 1


def test_the_bytes_are_the_same_for_any_workers_and_batches(folder, rows, corpus, tmp_path, monkeypatch):
    for handler, source in (("GeneralInstructionHandler", rows), ("GeneralPretrainHandler", corpus)):
        options = {"tokenizer": folder, "handler_name": handler, "append_eod": True}
        prepare([source] * 3, tmp_path / "one", **options)
        small_batches(monkeypatch, 100)
        prepare([source] * 3, tmp_path / "two", workers=3, **options)
        small_batches(monkeypatch, 1)
        prepare([source] * 3, tmp_path / "three", **options)
        monkeypatch.undo()
        one = content(tmp_path, "one")
        assert one == content(tmp_path, "two") == content(tmp_path, "three")
        assert verify(tmp_path / "one") == []
        for path in tmp_path.glob("*_document*"):
            path.unlink()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"text": "a"}\n{oops\n', r"in\.jsonl, line 2"),
        ('{"text": "a"}\n{"text": null}\n', r"in\.jsonl, line 2: 'text' is null"),
        ("", "no document"),
        ('{"text": ""}\n', "no document"),
    ],
)
def test_a_broken_input_leaves_nothing(folder, tmp_path, text, words, workers):
    (tmp_path / "in.jsonl").write_text(text, "utf-8")
    with pytest.raises(DataError, match=words):
        prepare([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer=folder, workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_broken_input_leaves_the_old_data_set(folder, corpus, tmp_path):
    prepare([corpus], tmp_path / "out", tokenizer=folder)
    before = content(tmp_path, "out")
    corpus.write_text("{oops", "utf-8")
    with pytest.raises(DataError, match="line 1"):
        prepare([corpus], tmp_path / "out", tokenizer=folder, overwrite=True)
    assert content(tmp_path, "out") == before


def test_what_is_there_is_replaced_only_when_asked(folder, corpus, tmp_path):
    prepare([corpus], tmp_path / "out", tokenizer=folder)
    with pytest.raises(DataError, match="--overwrite"):
        prepare([corpus], tmp_path / "out", tokenizer=folder)
    corpus.write_text(json.dumps({"text": "short"}) + "\n", "utf-8")
    manifest = prepare([corpus], tmp_path / "out", tokenizer=folder, overwrite=True)
    assert manifest.documents == 1
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": []}, "--input names no file"),
        ({"output_prefix": ""}, "end it with a name"),
        ({"output_prefix": "out/"}, "end it with a name"),
        ({"json_keys": ("a/b",)}, "may hold no slash"),
    ],
)
def test_what_names_no_data_set_is_a_usage_error(folder, corpus, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    asked = {"inputs": [corpus], "output_prefix": "out", "tokenizer": folder} | change
    with pytest.raises(UsageError, match=words):
        prepare(asked.pop("inputs"), asked.pop("output_prefix"), **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_prefix_under_a_file_is_named(folder, corpus):
    with pytest.raises(DataError, match="is a file"):
        prepare([corpus], corpus / "out", tokenizer=folder)


def _killed_at(step, arguments, options):
    """Overwrites a data set, and dies as by kill -9 when `step` files have been moved."""
    moved = 0
    put = IndexedWriter.put

    def put_or_die(self, suffix):
        nonlocal moved
        if moved == step:
            os._exit(9)
        moved += 1
        put(self, suffix)

    IndexedWriter.put = put_or_die
    prepare(*arguments, **options)


@pytest.mark.parametrize("step", range(6))
def test_a_kill_at_any_moment_leaves_old_or_new_or_what_readers_refuse(folder, rows, tmp_path, step):
    options = {"tokenizer": folder, "handler_name": "GeneralInstructionHandler", "overwrite": True}
    prepare([rows], tmp_path / "out", **options)
    rows.write_text(json.dumps(ROWS[:1]), "utf-8")
    child = multiprocessing.get_context("fork").Process(
        target=_killed_at, args=(step, ([rows], tmp_path / "out"), options)
    )
    child.start()
    child.join()
    assert child.exitcode == 9
    lengths = set()
    for key in ("input_ids", "attention_mask", "labels"):
        try:
            lengths.add(len(IndexedDataset(tmp_path / f"out_packed_{key}_document")))
        except DataError:
            lengths.add(None)
    assert len(lengths - {None}) <= 1, "old and new stand side by side"
    prepare([rows], tmp_path / "out", **options)
    assert verify(tmp_path / "out") == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("moment", [1, 4])
def test_a_worker_that_dies_is_one_error(folder, tmp_path, monkeypatch, moment):
    (tmp_path / "in.txt").write_text("the llama walks\n" * 30_000, "utf-8")
    small_batches(monkeypatch, 100)
    helpers = []

    class Dying(pool._Helper):
        def __init__(self, recipe):
            super().__init__(recipe)
            helpers.append(self)
            self.tasks = 0

        def do(self, job):
            super().do(job)
            self.tasks += 1
            if self is helpers[0] and self.tasks == moment:
                os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr("data_prep.pool._Helper", Dying)
    with pytest.raises(DataError, match="a worker process died"):
        prepare([tmp_path / "in.txt"], tmp_path / "out", tokenizer=folder, workers=3)
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]
    assert [helper.process.poll() for helper in helpers] == [-signal.SIGKILL] * 2


def test_no_worker_is_a_usage_error(folder, corpus, tmp_path):
    with pytest.raises(UsageError, match="--workers 0"):
        prepare([corpus], tmp_path / "out", tokenizer=folder, workers=0)


def test_foreign_data_has_no_manifest_and_later_ones_are_refused(folder, corpus, tmp_path):
    prepare([corpus], tmp_path / "out", tokenizer=folder)
    file = Path(f"{tmp_path}/out_text_document.manifest.json")
    known = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(known | {"a_later_field": 1}), "utf-8")
    assert read_manifest(tmp_path / "out") is not None
    for broken, words in ((known | {"format_version": 2}, "version 2"), ({}, "no manifest"), ([], "no manifest")):
        file.write_text(json.dumps(broken), "utf-8")
        with pytest.raises(DataError, match=words):
            read_manifest(tmp_path / "out")
    file.unlink()
    assert read_manifest(tmp_path / "out") is None
    assert verify(tmp_path / "out") == []


def test_a_tokenizer_json_that_disagrees_on_the_data_is_noted(folder, json_folder, tmp_path, capsys):
    """Merges in the order of ids instead of scores, as some converters write them; in their own order, the control."""
    home = tmp_path / "both"
    shutil.copytree(folder, home)
    shutil.copy(json_folder / "tokenizer.json", home)
    (tmp_path / "in.txt").write_text("\n".join(TEXTS), "utf-8")
    prepare([tmp_path / "in.txt"], tmp_path / "a", tokenizer=home)
    assert "note:" not in capsys.readouterr().err
    content = json.loads((home / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"].reverse()
    (home / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    prepare([tmp_path / "in.txt"], tmp_path / "b", tokenizer=home)
    assert re.search(r"note: .*tokenizer\.json gives other ids to \d+ of \d+ distinct words", capsys.readouterr().err)
    assert (tmp_path / "a_text_document.bin").read_bytes() == (tmp_path / "b_text_document.bin").read_bytes()
    (home / "tokenizer.json").write_text("{}", "utf-8")
    prepare([tmp_path / "in.txt"], tmp_path / "c", tokenizer=home)
    assert "cannot be compared" in capsys.readouterr().err
