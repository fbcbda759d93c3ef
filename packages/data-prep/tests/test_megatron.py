"""megatron-core's own reader opens what is written here, and its builder writes the same bytes."""

import json
import warnings

import numpy as np
import pytest
from conftest import ROWS, TEXTS
from data_prep import IndexedDataset, Tokenizer, prepare
from data_prep.merging import merge

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it misses on a CPU
    import torch
    from megatron.core.datasets import indexed_dataset as megatron

CHAT = {
    "turn_1": {"Human": "<|Human|>: where?<eoh>\n", "MOSS": "<|MOSS|>: over the grassland<eom>\n"},
    "turn_2": {"Human": "<|Human|>: why?<eoh>\n", "MOSS": "<|MOSS|>: dry grass<eom>\n"},
}


@pytest.fixture
def chats(tmp_path):
    """Two MOSS conversations, of two turns and of one."""
    path = tmp_path / "chats.jsonl"
    rows = [{"chat": CHAT}, {"chat": {"turn_1": CHAT["turn_1"]}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def same_bytes(documents, dtype, prefix, home):
    """Whether megatron-core's builder writes the files of `prefix`, given the documents."""
    builder = megatron.IndexedDatasetBuilder(str(home / "theirs.bin"), dtype=dtype)
    for document in documents:
        ids = torch.tensor([id for sequence in document for id in sequence])
        builder.add_document(ids, [len(sequence) for sequence in document])
    builder.finalize(str(home / "theirs.idx"))
    files = ((home / f"theirs{suffix}", prefix.with_name(prefix.name + suffix)) for suffix in (".bin", ".idx"))
    return all(theirs.read_bytes() == ours.read_bytes() for theirs, ours in files)


@pytest.mark.parametrize("dtype", ["int32", "uint16"])
def test_pretraining_data(folder, corpus, tmp_path, dtype):
    prepare([corpus], tmp_path / "out", tokenizer=folder, append_eod=True, dtype=dtype)
    documents = [[Tokenizer(folder).encode(text, eos=True)] for text in TEXTS]
    prefix = tmp_path / "out_text_document"
    assert same_bytes(documents, np.dtype(dtype).type, prefix, tmp_path)
    theirs = megatron.IndexedDataset(str(prefix))
    assert [theirs[number].tolist() for number in range(len(theirs))] == [document[0] for document in documents]
    assert theirs.index.dtype is np.dtype(dtype).type
    documents[1][0][0] += 1  # the control
    assert not same_bytes(documents, np.dtype(dtype).type, prefix, tmp_path)


def test_conversations_of_several_sequences(folder, chats, tmp_path):
    prepare([chats], tmp_path / "out", tokenizer=folder, handler_name="MOSSInstructionHandler")
    for key in ("input_ids", "attention_mask", "labels"):
        prefix = tmp_path / f"out_packed_{key}_document"
        data = IndexedDataset(prefix)
        assert data.document_indices.tolist() == [0, 2, 3]
        sequences = [ids.tolist() for ids in data]
        assert same_bytes([sequences[:2], sequences[2:]], np.int32, prefix, tmp_path)
        assert not same_bytes([sequences[:1], sequences[1:]], np.int32, prefix, tmp_path)  # the control
        theirs = megatron.IndexedDataset(str(prefix))
        assert [theirs[number].tolist() for number in range(len(theirs))] == sequences
        assert theirs.document_indices.tolist() == [0, 2, 3]


def test_merged_data(folder, corpus, chats, rows, tmp_path):
    options = {"tokenizer": folder, "append_eod": True}
    prepare([rows], tmp_path / "a", handler_name="GeneralInstructionHandler", **options)
    prepare([chats], tmp_path / "b", handler_name="MOSSInstructionHandler", **options)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    for key in ("input_ids", "attention_mask", "labels"):
        builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
        for name in ("a", "b"):
            builder.add_index(str(tmp_path / f"{name}_packed_{key}_document"))
        builder.finalize(str(tmp_path / "theirs.idx"))
        for suffix in (".bin", ".idx"):
            ours = (tmp_path / f"ab_packed_{key}_document{suffix}").read_bytes()
            assert ours == (tmp_path / f"theirs{suffix}").read_bytes()
    assert len(IndexedDataset(tmp_path / "ab")) == len(ROWS) + 3
