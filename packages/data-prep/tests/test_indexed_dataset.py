"""The bytes of `.bin` and `.idx`, against a second description of the format, and what a reader refuses."""

import pickle
import re
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from data_prep import DataError, IndexedDataset
from data_prep.indexed_dataset import find_prefix, find_prefixes
from data_prep.indexed_writer import Block, IndexedWriter
from hypothesis import given, settings
from hypothesis import strategies as st

ids = st.integers(-100, 2**31 - 1)
documents = st.lists(st.lists(st.lists(ids, max_size=5), min_size=1, max_size=3), max_size=8)


def index_bytes(documents, code=4, size=4):
    """The format once more, as simply as it can be said."""
    sequences = [sequence for document in documents for sequence in document]
    offsets, ends = [0], [0]
    for sequence in sequences:
        offsets.append(offsets[-1] + size * len(sequence))
    for document in documents:
        ends.append(ends[-1] + len(document))
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(ends))
    lengths = struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    return head + lengths + struct.pack(f"<{len(sequences)}q", *offsets[:-1]) + struct.pack(f"<{len(ends)}q", *ends)


def block(documents):
    sequences = [sequence for document in documents for sequence in document]
    return Block(
        np.array([id for sequence in sequences for id in sequence], np.int32),
        np.array([len(sequence) for sequence in sequences], np.int32),
        np.array([len(document) for document in documents], np.int64),
    )


def write(prefix, blocks):
    writer = IndexedWriter(prefix)
    try:
        for each in blocks:
            writer.add(each)
        writer.finish()
        for suffix in (".bin", ".idx"):
            writer.put(suffix)
    finally:
        writer.discard()
    return writer


@given(documents, st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_bytes_and_reading_back_however_it_is_cut(documents, cut):
    with tempfile.TemporaryDirectory() as home:
        prefix = Path(home) / "a"
        write(prefix, [block(documents[at : at + cut]) for at in range(0, len(documents), cut)])
        assert sorted(path.name for path in Path(home).iterdir()) == ["a.bin", "a.idx"]
        assert Path(f"{prefix}.idx").read_bytes() == index_bytes(documents)
        data = IndexedDataset(prefix)
        sequences = [sequence for document in documents for sequence in document]
        assert [row.tolist() for row in data] == sequences
        assert len(data) == len(sequences)
        assert data.document_indices[-1] == len(sequences)
        again = pickle.loads(pickle.dumps(data))
        assert [row.tolist() for row in again] == sequences


def test_a_large_index_is_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.indexed_writer._BLOCK", 3)
    documents = [[[number] * (number % 4)] for number in range(20)]
    write(tmp_path / "a", [block(documents)])
    assert (tmp_path / "a.idx").read_bytes() == index_bytes(documents)


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_other_integer_types_and_modes_are_read(tmp_path, code, dtype):
    documents = [[[1, 2, 3], [4]], [[5]]]
    content = index_bytes(documents, code, np.dtype(dtype).itemsize) + bytes(3)  # Megatron-LM's multimodal tail
    (tmp_path / "a.idx").write_bytes(content)
    (tmp_path / "a.bin").write_bytes(np.arange(1, 6, dtype=dtype).tobytes())
    data = IndexedDataset(tmp_path / "a.bin")
    assert [row.tolist() for row in data] == [[1, 2, 3], [4], [5]]
    assert data.dtype == np.dtype(dtype)
    assert data.document_indices.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"TNTIDX\0\0" + bytes(50), "lazy or cached"),
        (b"something else", "no index"),
        (b"", "no index"),
        (index_bytes([[[1]]], code=6), "dtype code 6"),
        (index_bytes([[[1]]])[:-1], "truncated"),
        (index_bytes([[[1, 2]]]), "truncated"),  # of its .bin
        (index_bytes([[[1]]])[:-8] + (7).to_bytes(8, "little"), "does not go from 0 to its 1 sequences"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, words):
    (tmp_path / "a.idx").write_bytes(content)
    (tmp_path / "a.bin").write_bytes(bytes(4))
    with pytest.raises(DataError, match=words):
        IndexedDataset(tmp_path / "a")


def test_half_a_data_set_is_refused(tmp_path):
    write(tmp_path / "a", [block([[[1]]])])
    (tmp_path / "a.idx").rename(tmp_path / "b.idx")
    for name in ("a", "b"):
        with pytest.raises(DataError, match="no such data set"):
            IndexedDataset(tmp_path / name)


def test_bytes_behind_the_last_id_are_left_alone(tmp_path):
    write(tmp_path / "a", [block([[[1, 2]]])])
    with (tmp_path / "a.bin").open("ab") as file:
        file.write(b"xyz")
    assert [row.tolist() for row in IndexedDataset(tmp_path / "a")] == [[1, 2]]


def test_a_prefix_stands_for_its_keys(tmp_path):
    for name in ("a_text_document", "a_title_document", "b_packed_input_ids_document", "b_packed_labels_document"):
        write(tmp_path / name, [block([[[len(name)]]])])
    assert find_prefix(tmp_path / "a").name == "a_text_document"
    assert find_prefix(tmp_path / "b").name == "b_packed_input_ids_document"
    assert find_prefix(tmp_path / "a_title_document.idx").name == "a_title_document"
    assert [path.name for path in find_prefixes(tmp_path / "b")] == [
        "b_packed_input_ids_document",
        "b_packed_labels_document",
    ]
    assert find_prefix(tmp_path / "none") == tmp_path / "none"
    (tmp_path / "a_text_document.idx").rename(tmp_path / "a_other_document.idx")
    with pytest.raises(DataError, match="several keys"):
        find_prefix(tmp_path / "a")


def test_two_writers_of_one_data_set_do_not_mix(tmp_path):
    writer = IndexedWriter(tmp_path / "a")
    with pytest.raises(DataError, match="another run"):
        IndexedWriter(tmp_path / "a")
    writer.add(block([[[7]]]))
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_overwritten(tmp_path):
    (tmp_path / ".a.bin.part").write_bytes(bytes(1000))
    write(tmp_path / "a", [block([[[7]]])])
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<i", 7)


def test_a_name_that_is_nearly_right_is_corrected(tmp_path):
    write(tmp_path / "corpus_text_document", [block([[[1]]])])
    words = f"no such data set: {tmp_path}/corpus_txt_document.idx; perhaps you meant {tmp_path}/corpus_text_document"
    with pytest.raises(DataError, match=re.escape(words) + "$"):
        IndexedDataset(tmp_path / "corpus_txt_document")


@pytest.mark.parametrize("dtype", ["int32", "uint16"])
def test_offsets_go_beyond_what_32_bits_hold(tmp_path, dtype):
    """Of a sparse file, whose few real ids stand at its end."""
    lengths = [2**31 - 1, 2**30, 3]
    writer = IndexedWriter(tmp_path / "a", dtype)
    writer.add(Block(np.empty(0, np.int32), np.array(lengths, np.int32), np.array([1, 2], np.int64)))
    writer.finish()
    for suffix in (".bin", ".idx"):
        writer.put(suffix)
    writer.discard()
    size = np.dtype(dtype).itemsize
    with (tmp_path / "a.bin").open("r+b") as file:
        file.truncate(size * sum(lengths))
        file.seek(size * sum(lengths[:2]))
        file.write(np.array([7, 8, 9], dtype).tobytes())
    data = IndexedDataset(tmp_path / "a")
    assert data.offsets.tolist() == [0, size * lengths[0], size * sum(lengths[:2])]
    assert data[2].tolist() == data.span(2, 3).tolist() == [7, 8, 9]
    assert list(data.pieces(2**30)) == [(0, 1), (1, 2), (2, 3)]
    assert data.document_indices.tolist() == [0, 1, 3]
