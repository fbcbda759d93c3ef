"""Compressed files, zips and Arrow files hold the same records; what is broken or no data is named."""

import bz2
import gzip
import json
import lzma
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_prep import DataError, prepare
from data_prep.errors import UsageError
from data_prep.readers import batches
from data_prep.sources import sources_of

ROWS = [{"text": f"the llama {number} walks ü"} for number in range(50)]
PACKERS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def content(kind):
    """A file of this kind, as bytes."""
    if kind in (".parquet", ".arrow", ".stream.arrow"):
        sink, table = pa.BufferOutputStream(), pa.Table.from_pylist([row | {"n": 1} for row in ROWS])
        if kind == ".parquet":
            pq.write_table(table, sink, row_group_size=7)
        else:
            opener = pa.ipc.new_file if kind == ".arrow" else pa.ipc.new_stream
            with opener(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=9)
        return sink.getvalue().to_pybytes()
    texts = [row["text"] for row in ROWS]
    made = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        ".json": json.dumps(ROWS),
        ".csv": "text\n" + "\n".join(texts),
        ".txt": "\n".join(texts),
    }
    return made[kind].encode()


def read(path, **options):
    (source,), _ = sources_of([path])
    found = []
    for batch in batches(source, ("text",), (), skip_bad=False):
        rows = batch.rows(skip_bad=False).content
        found += rows if isinstance(rows, list) else rows.to_pylist()
    return found


KINDS = [".parquet", ".arrow", ".stream.arrow", ".jsonl", ".json", ".csv", ".txt"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_is_read_as_what_is_not(tmp_path, kind):
    plain = content(kind)
    (tmp_path / f"a{kind}").write_bytes(plain)
    assert read(tmp_path / f"a{kind}") == ROWS
    for suffix, pack in PACKERS.items():
        path = tmp_path / f"a{kind}{suffix}"
        path.write_bytes(pack(plain[:40]) + pack(plain[40:]))  # two members in a row are one file
        assert read(path) == ROWS, path
    with pa.CompressedOutputStream(str(tmp_path / f"a{kind}.zst"), "zstd") as file:
        file.write(plain)
    assert read(tmp_path / f"a{kind}.zst") == ROWS
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"in/b{kind}", plain)
        archive.writestr("in/.hidden.csv", "x")
        archive.writestr("README.md", "x")
    assert read(tmp_path / "a.zip") == ROWS
    assert sources_of([tmp_path / "a.zip"])[1] == [f"{tmp_path}/a.zip/README.md"]


def test_a_zip_stands_for_its_most_frequent_kind_and_a_folder_for_its_zips(tmp_path):
    for name in ("a.zip", "b.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member in ("2.jsonl", "1.jsonl.gz", "c.txt"):
                packed = gzip.compress(content(".jsonl")) if member.endswith(".gz") else content(".jsonl")
                archive.writestr(member, packed)
    (tmp_path / "c.txt").write_bytes(b"x")
    found, left = sources_of([tmp_path])
    assert [(source.path.name, source.member) for source in found] == [
        ("a.zip", "1.jsonl.gz"),
        ("a.zip", "2.jsonl"),
        ("b.zip", "1.jsonl.gz"),
        ("b.zip", "2.jsonl"),
    ]
    assert [name.removeprefix(f"{tmp_path}/") for name in left] == ["c.txt", "a.zip/c.txt", "b.zip/c.txt"]


@pytest.mark.parametrize("suffix", [*PACKERS, ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".csv"])
def test_a_cut_file_is_named(folder, tmp_path, suffix, kind):
    path = tmp_path / f"a{kind}{suffix}"
    if suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content(kind))
    else:
        path.write_bytes(PACKERS[suffix](content(kind)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"a{kind}{suffix} is (broken|no parquet file)"):
        prepare([path], tmp_path / "out", tokenizer=folder)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz is broken"),
        ("a.jsonl.zst", b"plain", r"a\.jsonl\.zst is broken"),
        ("a.zip", b"plain", r"a\.zip is no zip file"),
        ("a.zip", b"version https://git-lfs.github.com/spec/v1\n", r"a\.zip is a Git LFS pointer"),
        ("a.csv", b"\n <!doctype HTML><head>", r"a\.csv is an HTML page"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid x", r"a\.txt is a Git LFS pointer"),
        ("a.arrow", b"ARROW1 nothing", r"a\.arrow is no arrow file"),
        ("a.arrow", b"nothing", r"a\.arrow is no arrow file"),
    ],
)
def test_what_is_no_data_is_named(folder, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        prepare([tmp_path / name], tmp_path / "out", tokenizer=folder)


def test_a_web_page_as_text_is_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"<html>\nx")
    assert read(tmp_path / "a.txt") == [{"text": "<html>"}, {"text": "x"}]


def test_a_zip_without_data_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("README.md", "x")
    with pytest.raises(DataError, match=r"a\.zip holds no \.parquet"):
        sources_of([tmp_path / "a.zip"])


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([1, 2]), "row 1: 'text' is int, not text"),
        (pa.array(["a", None]), "row 2: 'text' is null, not text"),
        (pa.array([None, None]), "row 1: 'text' is null"),
        (pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers()), r"row 1: 'text' is not UTF-8"),
    ],
)
def test_a_column_that_is_no_text_is_named(folder, tmp_path, column, words):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=words):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", tokenizer=folder)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_any_kind_of_text_column_is_text(folder, tmp_path, kind):
    for name, column in (("a", pa.array(["one", "two"])), ("b", pa.array(["one", "two"]).cast(kind))):
        with pa.ipc.new_file(str(tmp_path / f"{name}.arrow"), pa.schema([("text", column.type)])) as writer:
            writer.write_table(pa.table({"text": column}))
        prepare([tmp_path / f"{name}.arrow"], tmp_path / name, tokenizer=folder)
    assert (tmp_path / "a_text_document.bin").read_bytes() == (tmp_path / "b_text_document.bin").read_bytes()


def test_weights_must_be_numbers_of_times(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x")
    with pytest.raises(UsageError, match="names 2 numbers for 1 inputs"):
        sources_of([tmp_path / "a.txt"], [1, 2])
    with pytest.raises(UsageError, match="--input-weights -1"):
        sources_of([tmp_path / "a.txt"], [-1])


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".stream.arrow"])
@pytest.mark.parametrize("where", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("change", ["cut", "zeros"])
def test_a_broken_table_is_named_or_read(folder, tmp_path, kind, where, change):
    """Some bytes matter to nobody; where they do, there is one line and no file."""
    whole = content(kind)
    at = int(len(whole) * where)
    broken = whole[:at] if change == "cut" else whole[:at] + bytes(40) + whole[at + 40 :]
    path = tmp_path / f"a{kind}"
    path.write_bytes(broken)
    said = None
    try:
        prepare([path], tmp_path / "out", tokenizer=folder)
    except DataError as error:
        said = str(error)
    if said is None:
        assert change == "zeros"
    else:
        assert str(path) in said
        assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_line_without_end_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.lines.LONGEST_LINE", 1 << 21)
    (tmp_path / "a.txt").write_bytes(b"x\n" + b"y" * (5 << 20))
    with pytest.raises(DataError, match=r"a\.txt, line 2 does not end within \d+ bytes"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=folder)
