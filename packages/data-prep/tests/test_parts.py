"""A data set in parts is the whole: any cut of its files, any batch, any place to go on from."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROWS
from data_prep import DataError, prepare, read_manifest
from data_prep.errors import UsageError
from data_prep.merging import merge
from data_prep.readers import batches
from data_prep.sources import part_of, sources_of
from hypothesis import given, settings
from hypothesis import strategies as st

lines = st.lists(st.sampled_from([b"", b"a", b"bcd", "ü🦙".encode(), b"x" * 9, b" "]), max_size=12)
ends = st.sampled_from([b"\n", b"\r\n", b"\r"])


def texts_of(source, optional=()):
    found = []
    for batch in batches(source, ("text",), optional, skip_bad=False):
        rows = batch.rows(skip_bad=False)
        found += zip(rows.numbers, rows.texts("text").to_pylist(), strict=True)
    return found


@given(lines, st.lists(ends, min_size=12, max_size=12), st.booleans(), st.integers(1, 5), st.integers(1, 30))
@settings(max_examples=300, deadline=None)
def test_lines_in_parts(lines, ends, last, count, size):
    """Of upstream's reading, independently: universal newlines, empty lines are none."""
    content = b"".join(line + end for line, end in zip(lines, ends, strict=False))
    content += b"end" if last else b""
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.batching.BATCH_BYTES", size)
        patch.setattr("data_prep.batching.BLOCK", size)
        path = Path(home) / "a.txt"
        path.write_bytes(content)
        with path.open(encoding="utf-8") as opened:
            whole = [(number, text) for number, line in enumerate(opened, 1) if (text := line.rstrip("\n"))]
        sources, _ = sources_of([path, path])
        assert texts_of(sources[0]) == whole
        parts = [part_of(sources, index, count) for index in range(count)]
        assert [found for part in parts for source in part for found in texts_of(source)] == whole * 2
        check_every_place(sources[0], whole)


def check_every_place(source, whole):
    """Behind each batch, reading goes on with the rest."""
    seen = 0
    for batch in batches(source, ("text",), (), skip_bad=False):
        seen += len(batch.rows(skip_bad=False))
        assert texts_of(replace(source, begin=batch.end, aligned=True)) == whole[seen:]


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".jsonl", ".json", ".csv", ".txt"])
@pytest.mark.parametrize("size", [1, 60, 1 << 20])
def test_every_kind_in_parts(tmp_path, monkeypatch, kind, size):
    monkeypatch.setattr("data_prep.batching.BATCH_BYTES", size)
    monkeypatch.setattr("data_prep.batching.BLOCK", size)
    sources, _ = sources_of([written(tmp_path / f"a{kind}", 40), written(tmp_path / f"b{kind}", 3)])
    for count in (1, 2, 3, 7, 50):
        parts = [part_of(sources, index, count) for index in range(count)]
        found = [text for part in parts for source in part for _, text in texts_of(source)]
        assert found == [text for source in sources for _, text in texts_of(source)]
        assert len(found) == 43
    check_every_place(sources[0], texts_of(sources[0]))


def written(path, count):
    rows = [{"text": f"the llama {number} walks"} for number in range(count)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=6)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    else:
        texts = [row["text"] for row in rows]
        made = {
            ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
            ".json": json.dumps(rows, indent=1),
            ".csv": "text\n" + "\n".join(texts),
            ".txt": "\n".join(texts),
        }
        path.write_text(made[path.suffix], "utf-8")
    return path


def files_of(folder, prefix):
    return {path.name.removeprefix(prefix): path.read_bytes() for path in folder.glob(f"{prefix}_*")}


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_merged_shards_are_the_bytes_of_one_run(folder, tmp_path, count):
    inputs = [written(tmp_path / f"a{kind}", 30) for kind in (".jsonl", ".csv", ".parquet")]
    options = {"tokenizer": folder, "append_eod": True}
    prepare(inputs, tmp_path / "one", **options)
    for index in range(count if count > 1 else 0):
        prepare(inputs, tmp_path / "cut", num_shards=count, shard_index=index, **options)
    if count > 1:
        merge([tmp_path / "cut"], tmp_path / "two")
    else:
        merge([tmp_path / "one"], tmp_path / "two")
    assert files_of(tmp_path, "two") == files_of(tmp_path, "one")


def test_merged_shards_list_what_was_skipped(folder, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{\n' * 1500, "utf-8")
    options = {"tokenizer": folder, "skip_bad_records": True}
    prepare([tmp_path / "in.jsonl"], tmp_path / "one", **options)
    for index in range(3):
        prepare([tmp_path / "in.jsonl"], tmp_path / "cut", num_shards=3, shard_index=index, **options)
    merge([tmp_path / "cut"], tmp_path / "two")
    manifest = read_manifest(tmp_path / "two")
    assert manifest == read_manifest(tmp_path / "one")
    assert (manifest.skipped, len(manifest.skipped_records)) == (1500, 1000)


def test_shards_that_do_not_belong_together_are_refused(folder, rows, tmp_path):
    options = {"tokenizer": folder, "handler_name": "GeneralInstructionHandler"}
    for index in range(2):
        prepare([rows], tmp_path / "a", num_shards=2, shard_index=index, **options)
        prepare([rows], tmp_path / "b", num_shards=2, shard_index=index, append_eod=True, **options)
    first, second, other = (tmp_path / name for name in ("a-00000-of-00002", "a-00001-of-00002", "b-00001-of-00002"))
    with pytest.raises(DataError, match="is shard 1 of 2, where shard 0 of 2 was expected"):
        merge([second, first], tmp_path / "out")
    with pytest.raises(DataError, match="is shard 0 of 2, where shard 0 of 1 was expected"):
        merge([first], tmp_path / "out")
    with pytest.raises(DataError, match="are not of one data set"):
        merge([first, other], tmp_path / "out")
    second.with_name(f"{second.name}_packed_labels_document.idx").unlink()
    with pytest.raises(DataError, match="has the keys"):
        merge([tmp_path / "a"], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    assert not list(tmp_path.glob(".out*"))


def test_shards_of_a_longer_name_are_another_data_sets(folder, corpus, tmp_path):
    for name, count in (("a", 2), ("a-en", 3)):
        for index in range(count):
            prepare([corpus], tmp_path / name, tokenizer=folder, num_shards=count, shard_index=index)
    whole = prepare([corpus], tmp_path / "whole", tokenizer=folder)
    assert merge([tmp_path / "a"], tmp_path / "a")[0].bin_sha256 == whole.bin_sha256


def test_data_sets_are_merged_in_their_order(folder, rows, tmp_path):
    options = {"tokenizer": folder, "handler_name": "GeneralInstructionHandler"}
    prepare([rows], tmp_path / "a", append_eod=True, **options)
    rows.write_text(json.dumps(ROWS[:1]), "utf-8")
    prepare([rows], tmp_path / "b", **options)
    merge([tmp_path / "b", tmp_path / "a"], tmp_path / "new/ab")
    bins = [(tmp_path / f"{name}_packed_labels_document.bin").read_bytes() for name in ("b", "a", "new/ab")]
    assert bins[2] == bins[0] + bins[1]
    manifest = read_manifest(tmp_path / "new/ab")
    assert (manifest.documents, len(manifest.inputs), manifest.append_eod) == (4, 2, False)
    with pytest.raises(DataError, match="--overwrite"):
        merge([tmp_path / "a"], tmp_path / "new/ab")
    with pytest.raises(UsageError, match="cannot be read and replaced at once"):
        merge([tmp_path / "a"], tmp_path / "a", overwrite=True)


def test_foreign_and_other_data_is_not_mixed_unseen(folder, symbols, corpus, tmp_path, capsys):
    prepare([corpus], tmp_path / "a", tokenizer=folder)
    prepare([corpus], tmp_path / "b", tokenizer=symbols)
    prepare([corpus], tmp_path / "c", tokenizer=folder, dtype="uint16")
    with pytest.raises(DataError, match="another tokenizer"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(DataError, match="different types cannot be merged: int32, uint16"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    with pytest.raises(DataError, match="no such data set"):
        merge([tmp_path / "none"], tmp_path / "out")
    (tmp_path / "b_text_document.manifest.json").unlink()
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert "b_text_document has no manifest" in capsys.readouterr().err
    assert read_manifest(tmp_path / "out") is None


def test_an_input_is_read_as_often_as_its_weight_says(folder, tmp_path):
    options = {"tokenizer": folder}
    a, b = written(tmp_path / "a.jsonl", 10), written(tmp_path / "b.jsonl", 9)
    prepare([a, b], tmp_path / "out", input_weights=[2.3, 1 / 3], **options)
    texts = [f"the llama {number} walks" for number in [*range(10), *range(10), 3, 6, 9, 2, 5, 8]]
    (tmp_path / "c.txt").write_text("\n".join(texts), "utf-8")
    prepare([tmp_path / "c.txt"], tmp_path / "same", **options)
    assert (tmp_path / "out_text_document.bin").read_bytes() == (tmp_path / "same_text_document.bin").read_bytes()
    for index in range(3):
        prepare([a, b], tmp_path / "cut", input_weights=[2.3, 1 / 3], num_shards=3, shard_index=index, **options)
    merge([tmp_path / "cut"], tmp_path / "two")
    assert (tmp_path / "two_text_document.bin").read_bytes() == (tmp_path / "same_text_document.bin").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_shards": 2, "shard_index": 2}, "--shard-index 2 is none of the 2"),
        ({"num_shards": 2, "pack_length": 8}, "--pack with --num-shards"),
    ],
)
def test_parts_that_cannot_be_are_usage_errors(folder, corpus, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        prepare([corpus], tmp_path / "out", tokenizer=folder, **options)
