"""What cannot be used stops a run before its target exists, or is left out, counted and listed where that is asked."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_prep import DataError, IndexedDataset, Tokenizer, prepare, read_manifest
from data_prep.cli import main

LINES = [
    b'{"text": "the llama"}',
    b"{oops",
    b'{"text": null}',
    b'{"text": "walks"}',
    b'["text"]',
    b'{"body": "x"}',
    b'{"text": 5}',
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b"[" * 100_000,
    b'{"text": "over"}',
]
WORDS = [
    "line 2 is not JSON",
    "line 3: 'text' is null",
    "line 5 holds a list, not an object",
    "line 6 has no column 'text': it has body",
    "line 7: 'text' is int",
    "line 8 is not UTF-8",
    "line 9: 'text' holds half of a surrogate pair",
    "line 10 is not JSON",
]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_bad_lines_are_left_out_and_listed(folder, tmp_path, monkeypatch, capsys, size, workers):
    monkeypatch.setattr("data_prep.batching.BATCH_BYTES", size)
    monkeypatch.setattr("data_prep.batching.BLOCK", size)
    monkeypatch.setattr("data_prep.pool.START_AFTER_S", 0)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(LINES))
    options = {"tokenizer": folder, "workers": workers}
    manifest = prepare([path], tmp_path / "out", skip_bad_records=True, **options)
    tokenizer = Tokenizer(folder)
    assert [ids.tolist() for ids in IndexedDataset(tmp_path / "out")] == [
        tokenizer.encode(text) for text in ("the llama", "walks", "over")
    ]
    listed = sorted(manifest.skipped_records, key=lambda line: int(line.split("line ")[1].split()[0].strip(":")))
    assert manifest.skipped == len(WORDS) == len(listed)
    for words, line in zip(WORDS, listed, strict=True):
        assert line.startswith(f"{path}, {words}")
    said = capsys.readouterr().err
    assert all(f"skipped: {path}, {words}" in said for words in WORDS)
    assert "8 records were skipped" in said
    for at, words in zip((1, 2, 4, 5, 6, 7, 8, 9), WORDS, strict=True):
        path.write_bytes(b"\n".join([*LINES[:1] * at, LINES[at]]))
        with pytest.raises(DataError, match=words):
            prepare([path], tmp_path / "other", **options)
    assert not list(tmp_path.glob("*other*"))


def test_bad_rows_items_and_cells(folder, tmp_path):
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps([{"text": "c"}, 5, {"text": [1]}]), "utf-8")
    (tmp_path / "c.csv").write_bytes(b"text,n\nd,1\nx\n\xff,2\ne,3\n")
    inputs = [tmp_path / name for name in ("a.parquet", "b.json", "c.csv")]
    manifest = prepare(inputs, tmp_path / "out", tokenizer=folder, skip_bad_records=True)
    tokenizer = Tokenizer(folder)
    texts = [tokenizer.decode(ids) for ids in IndexedDataset(tmp_path / "out")]
    assert texts == ["a", "b", "c", "d", "e"]
    assert [line.removeprefix(f"{tmp_path}/") for line in manifest.skipped_records] == [
        "a.parquet, row 2: 'text' is null, not text",
        "b.json, line 1 holds a int, not an object",
        "b.json, line 1: 'text' is list, not text",
        "c.csv, line 3 has 1 cells, the header 2",
        "c.csv, line 4 is not UTF-8",
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'[{"text": "a"},\n{"text": }]', "line 2 is not JSON"),
        ("a.csv", b'text\n"a\n', "is not CSV"),
        ("a.parquet", b"PAR1", "is no parquet file"),
        ("a.jsonl", b"{\n{\n", "holds no document"),
    ],
)
def test_what_cannot_be_read_on_is_an_error_all_the_same(folder, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        prepare([tmp_path / name], tmp_path / "out", tokenizer=folder, skip_bad_records=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_column_that_is_in_no_record_of_a_table_is_an_error(folder, tmp_path):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text': it has body"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", tokenizer=folder, skip_bad_records=True)


def test_a_manifest_lists_the_first_thousand(folder, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"{\n" * 1500 + b'{"text": "a"}')
    manifest = prepare([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer=folder, skip_bad_records=True)
    assert (manifest.skipped, len(manifest.skipped_records)) == (1500, 1000)
    assert read_manifest(tmp_path / "out") == manifest


def test_a_file_that_may_not_be_read_is_one_line(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n', "utf-8")

    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.open", refuse)  # root may read anything
    command = ["run", "--input", tmp_path / "in.jsonl", "--tokenizer-name-or-path", folder]
    assert main([*map(str, command), "--output-prefix", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: Permission denied: {tmp_path}/in.jsonl\n"
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_special_tokens_in_a_text_may_be_text(folder, pieces, tmp_path):
    text = "the </s> llama<s>"
    (tmp_path / "in.txt").write_text(text, "utf-8")
    ids = {}
    for how in ("match", "ignore"):
        manifest = prepare([tmp_path / "in.txt"], tmp_path / how, tokenizer=folder, special_tokens_in_text=how)
        (ids[how],) = (row.tolist() for row in IndexedDataset(tmp_path / how))
        assert manifest.options == ({"special_tokens_in_text": "ignore"} if how == "ignore" else {})
    assert ids["ignore"] == [1, *pieces.encode(text)]
    assert ids["match"] == Tokenizer(folder).encode(text) != ids["ignore"]
    assert 2 in ids["match"]
    assert 2 not in ids["ignore"]
    assert Tokenizer(folder, special_tokens=False).decode(ids["ignore"]) == text
