"""A killed run goes on where it was, and the bytes are those of one that was not."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from data_prep import DataError, prepare
from data_prep.errors import UsageError
from data_prep.indexed_writer import IndexedWriter
from test_parts import files_of, written


def _killed_after(batches, journals, arguments, options):
    """Dies as by kill -9 in the middle of a batch's files; its last journal is `journals` batches old."""
    from data_prep import preparation

    done = 0
    add, note = IndexedWriter.add, preparation._Run._note

    def add_or_die(self, block):
        nonlocal done
        add(self, block)
        if self is first_of[0]:
            done += 1
        if done > batches and self is not first_of[0]:
            for file in self._files.values():
                file.flush()
            os._exit(9)

    def seldom(self):
        if done % (journals + 1) == 0:
            note(self)

    first_of = []
    real = IndexedWriter.__init__

    def remembered(self, *arguments):
        real(self, *arguments)
        first_of.append(self)

    IndexedWriter.__init__, IndexedWriter.add, preparation._Run._note = remembered, add_or_die, seldom
    preparation.JOURNAL_S = 0.0
    prepare(*arguments, **options)


def killed(batches, journals, arguments, options):
    child = multiprocessing.get_context("fork").Process(
        target=_killed_after, args=(batches, journals, arguments, options)
    )
    child.start()
    child.join()
    assert child.exitcode == 9


@pytest.fixture
def inputs(tmp_path):
    """Rows in Alpaca's columns, of three kinds of files, one of them with a bad record at each end."""
    lines = written(tmp_path / "a.jsonl", 60).read_text("utf-8").splitlines()
    rows = [{"instruction": json.loads(line)["text"], "output": "up " * (at % 7)} for at, line in enumerate(lines)]
    (tmp_path / "a.jsonl").write_text("{\n" + "\n".join(map(json.dumps, rows)) + '\n{"instruction": null}\n', "utf-8")
    (tmp_path / "b.json").write_text(json.dumps(rows), "utf-8")
    (tmp_path / "c.csv").write_text("instruction,output\n" + "x,y\n" * 50, "utf-8")
    return [tmp_path / name for name in ("a.jsonl", "b.json", "c.csv")]


@pytest.mark.parametrize("pack", [None, 700])
@pytest.mark.parametrize(("batches", "journals"), [(1, 0), (4, 2), (9, 0), (20, 5)])
def test_a_killed_run_is_continued(folder, inputs, tmp_path, monkeypatch, capsys, batches, journals, pack):
    monkeypatch.setattr("data_prep.batching.BATCH_BYTES", 400)
    monkeypatch.setattr("data_prep.batching.BLOCK", 400)
    options = {"tokenizer": folder, "handler_name": "GeneralInstructionHandler", "skip_bad_records": True}
    options |= {"pack_length": pack, "append_eod": True}
    prepare(inputs, tmp_path / "whole", **options)
    killed(batches, journals, (inputs, tmp_path / "out"), options)
    assert not list(tmp_path.glob("out*"))
    capsys.readouterr()
    prepare(inputs, tmp_path / "out", resume=True, **options)
    said = capsys.readouterr().err
    assert ("beginning anew" in said) == (batches < journals)
    assert "resuming behind" in said or batches < journals
    assert files_of(tmp_path, "out") == files_of(tmp_path, "whole")
    assert not list(tmp_path.glob(".*"))


def test_a_run_is_killed_and_continued_again_and_again(folder, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.batching.BATCH_BYTES", 400)
    monkeypatch.setattr("data_prep.batching.BLOCK", 400)
    options = {"tokenizer": folder, "handler_name": "GeneralInstructionHandler", "skip_bad_records": True}
    prepare(inputs, tmp_path / "whole", **options)
    killed(3, 0, (inputs, tmp_path / "out"), options)
    for _ in range(4):
        killed(5, 0, (inputs, tmp_path / "out"), options | {"resume": True})
    prepare(inputs, tmp_path / "out", resume=True, workers=2, **options)
    assert files_of(tmp_path, "out") == files_of(tmp_path, "whole")


def test_only_the_same_run_is_continued(folder, symbols, inputs, tmp_path):
    options = {"tokenizer": folder, "handler_name": "GeneralInstructionHandler", "skip_bad_records": True}
    killed(1, 0, (inputs, tmp_path / "out"), options)
    left = sorted(path.name for path in tmp_path.glob(".out*"))
    assert len(left) == 10
    others = [{"append_eod": True}, {"tokenizer": symbols}, {"pack_length": 9}, {"input_weights": [1, 1, 2]}]
    for other in others:
        with pytest.raises(UsageError, match="made with other options, inputs or another tokenizer"):
            prepare(inputs, tmp_path / "out", resume=True, **(options | other))
    with pytest.raises(UsageError, match="made with other"):
        prepare(inputs[:2], tmp_path / "out", resume=True, **options)
    assert sorted(path.name for path in tmp_path.glob(".out*")) == left
    inputs[2].write_text("instruction,output\nx,z\n", "utf-8")
    with pytest.raises(UsageError, match="made with other"):
        prepare(inputs, tmp_path / "out", resume=True, **options)
    prepare(inputs, tmp_path / "out", **options)  # anew
    assert not list(tmp_path.glob(".*"))


def test_files_that_were_cut_are_not_continued(folder, inputs, tmp_path):
    options = {"tokenizer": folder, "handler_name": "GeneralInstructionHandler", "skip_bad_records": True}
    killed(1, 0, (inputs, tmp_path / "out"), options)
    os.truncate(tmp_path / ".out_packed_labels_document.bin.part", 3)
    with pytest.raises(DataError, match="is shorter than when it was noted"):
        prepare(inputs, tmp_path / "out", resume=True, **options)


def test_an_error_leaves_nothing_to_resume(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.preparation.JOURNAL_S", 0.0)
    monkeypatch.setattr("data_prep.batching.BATCH_BYTES", 1)
    monkeypatch.setattr("data_prep.batching.BLOCK", 1)
    Path(tmp_path / "in.jsonl").write_text('{"text": "a"}\n' * 5 + "{\n", "utf-8")
    with pytest.raises(DataError, match="line 6"):
        prepare([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
