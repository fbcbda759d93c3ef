"""Each kind of raw file as records, and the words that name what is broken."""

import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_prep import DataError
from data_prep.readers import batches
from data_prep.sources import sources_of
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS = [{"text": "one"}, {"text": 'two\nlines, "quoted"'}, {"text": "drei ü 🦙"}]


def read(path, columns=("text",), **options):
    (source,), _ = sources_of([path])
    found = []
    for batch in batches(source, columns, ("input",), skip_bad=False):
        content = batch.rows(skip_bad=False).content
        found += content if isinstance(content, list) else content.to_pylist()
    return found


def test_every_kind_gives_the_same_records(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\r\n\n" for row in ROWS), "utf-8-sig")
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    (tmp_path / "list.json").write_text("\n " + json.dumps(ROWS, indent=2) + "\n", "utf-8-sig")
    (tmp_path / "a.csv").write_text('text\r\none\r\n"two\nlines, ""quoted"""\r\n\r\ndrei ü 🦙\r\n', "utf-8-sig")
    pq.write_table(pa.Table.from_pylist([row | {"more": 1} for row in ROWS]), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        assert read(path) == ROWS, path


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.lists(st.dictionaries(st.text(max_size=8), values, max_size=4), max_size=5),
    st.sampled_from([None, 1]),
    st.integers(1, 7),
)
@settings(max_examples=150, deadline=None)
def test_a_list_is_read_through_any_window(content, indent, chunk):
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.json_list._CHUNK", chunk)
        path = Path(home) / "a.json"
        path.write_text(json.dumps(content, indent=indent, ensure_ascii=False), "utf-8", newline="")
        assert read(path) == content


def test_a_line_of_text_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\r\ntwo\rthree\x0c\u2028 \n  \n".encode())
    assert [record["text"] for record in read(tmp_path / "a.txt")] == ["one", "two", "three\x0c\u2028 ", "  "]


def test_cells_are_text_as_they_stand_and_may_be_long(tmp_path):
    long = "x" * 300_000
    (tmp_path / "a.csv").write_text(f"text,n\nNA,1\nnull,\n{long},2\n", "utf-8")
    assert read(tmp_path / "a.csv") == [{"text": "NA", "n": "1"}, {"text": "null", "n": ""}, {"text": long, "n": "2"}]


def test_a_folder_stands_for_its_most_frequent_kind(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt", "d.md", ".hidden.txt", ".e.txt"):
        (tmp_path / name).write_text("", "utf-8")
    chosen, skipped = sources_of([tmp_path, tmp_path / "c.txt"])
    assert [source.path.name for source in chosen] == ["a.jsonl", "b.jsonl", "c.txt"]
    assert [Path(name).name for name in skipped] == ["c.txt", "d.md"]
    (tmp_path / "train").mkdir()
    assert f"{tmp_path}/train/" not in skipped
    assert sources_of([tmp_path])[1][-1].endswith("train/")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{oops\n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n["a"]\n', r"line 3 holds a list, not an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2 is not UTF-8"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>\n", r"a\.jsonl is an HTML page"),
        ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\n", r"a\.jsonl\.gz is a Git LFS pointer"),
        ("a.jsonl.zst", b"<!DOCTYPE html>\n<html>\n", r"a\.jsonl\.zst is an HTML page"),
        ("a.jsonl", b'{"text": "a"}\n{"n": ' + b"9" * 5000 + b"}\n", r"a\.jsonl, line 2 is not JSON"),
        ("a.json", b'[{"n": ' + b"9" * 5000 + b"}]", r"a\.json, line 1 is not JSON"),
        ("a.json", b'[{"text": "a" "b"},' + b" " * 4_000_000, r"line 1 is not JSON: Expecting ',' delimiter"),
        ("a.json", b'[{"a": 1},\n{"a": 2}\n{"a": 3}]', r"a\.json, line 3 is not JSON: '\{' where '\]'"),
        ("a.json", b'[{"a": 1},\n{"a": }]', r"line 2 is not JSON"),
        ("a.json", b'[{"a": 1},\n', r"line 2 is not JSON"),
        ("a.json", b'[{"a": 1}', r"it ends before '\]'"),
        ("a.json", b'[{"a": 1}]\n[]', r"line 2 is not JSON: something follows"),
        ("a.json", b"[\n1]", r"line 2 holds a int|line 1 holds a int"),
        ("a.csv", b'text\n"a\n', r"a\.csv, line 2 is not CSV"),
        ("a.csv", b"text,n,text\na,1,b\n", r"names the column 'text' twice"),
        ("a.csv", b"text,n\na\n", r"line 2 has 1 cells, the header 2"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", r"a\.parquet is a Git LFS pointer"),
        ("a.parquet", b"PAR1 something", r"a\.parquet is no parquet file"),
    ],
)
def test_what_is_broken_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read(tmp_path / name)


def test_a_parquet_file_without_the_column_is_named(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "input": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text': it has body, input"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "words"), [("none.txt", "no such input"), ("a.md", "no known kind"), ("folder", "holds no")]
)
def test_what_cannot_be_an_input_is_refused(tmp_path, name, words):
    (tmp_path / "a.md").write_text("", "utf-8")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=words):
        sources_of([tmp_path / name])
