"""Packs hold whole documents, as many as fit, and come apart into what was packed."""

import json

import numpy as np
import pytest
from conftest import ROWS, TEXTS
from data_prep import IndexedDataset, Tokenizer, prepare
from data_prep.errors import UsageError
from data_prep.indexed_writer import Block
from data_prep.packing import Packer
from data_prep.verification import verify
from hypothesis import given, settings
from hypothesis import strategies as st

lengths = st.lists(st.integers(1, 12), max_size=30)


def blocks_of(lengths):
    """A block a key, of sequences with these lengths."""
    total, rows = sum(lengths), len(lengths)
    made = Block(np.arange(total, dtype=np.int32), np.array(lengths, np.int32), np.ones(rows, np.int64))
    mask = Block(np.ones(total, np.int32), made.lengths, made.documents)
    return {"_packed_input_ids_document": made, "_packed_attention_mask_document": mask}


def expected(lengths, size):
    """Next fit, as simply as it can be said: the packs as lists of lengths."""
    packs = []
    for length in lengths:
        if packs and sum(packs[-1]) + length <= size:
            packs[-1].append(length)
        else:
            packs.append([length])
    return packs


@given(lengths, st.integers(1, 15), st.integers(1, 7), st.booleans())
@settings(max_examples=200, deadline=None)
def test_packs_are_next_fit_however_they_are_batched(lengths, size, batch, merge):
    packer, ids, mask, bounds, documents = Packer(size, merge), [], [], [], []
    found = [packer.pack(blocks_of(lengths[at : at + batch])) for at in range(0, len(lengths), batch)]
    found.append(packer.rest(("_packed_input_ids_document", "_packed_attention_mask_document")))
    for blocks in filter(None, found):
        ids += blocks["_packed_input_ids_document"].ids.tolist()
        bounds += blocks["_packed_input_ids_document"].lengths.tolist()
        documents += blocks["_packed_input_ids_document"].documents.tolist()
        mask += blocks["_packed_attention_mask_document"].ids.tolist()
    packs = expected(lengths, size)
    assert len(ids) == len(mask) == sum(lengths)
    assert packer.too_long == sum(length > size for length in lengths)
    if merge:
        assert bounds == [sum(pack) for pack in packs]
        assert documents == [1] * len(packs)
        assert mask == [number for pack in packs for number, length in enumerate(pack, 1) for _ in range(length)]
    else:
        assert bounds == lengths
        assert documents == [len(pack) for pack in packs]


def test_pretraining_documents_are_sequences_of_a_pack(folder, corpus, tmp_path):
    prepare([corpus], tmp_path / "plain", tokenizer=folder)
    manifest = prepare([corpus], tmp_path / "packed", tokenizer=folder, pack_length=80)
    plain, packed = IndexedDataset(tmp_path / "plain"), IndexedDataset(tmp_path / "packed")
    assert [ids.tolist() for ids in packed] == [ids.tolist() for ids in plain]
    sizes = np.diff(packed.document_indices).tolist()
    assert sizes == [len(pack) for pack in expected(plain.sequence_lengths.tolist(), 80)]
    assert len(sizes) < len(TEXTS)
    assert manifest.options == {"pack_length": 80}


@pytest.mark.parametrize("workers", [1, 3])
def test_instruction_packs_come_apart(folder, rows, tmp_path, monkeypatch, workers):
    rows.write_text(json.dumps(ROWS * 20), "utf-8")
    options = {"tokenizer": folder, "handler_name": "GeneralInstructionHandler", "append_eod": True}
    prepare([rows], tmp_path / "plain", **options)
    monkeypatch.setattr("data_prep.batching.BATCH_BYTES", 300)
    monkeypatch.setattr("data_prep.pool.START_AFTER_S", 0)
    prepare([rows], tmp_path / "packed", pack_length=1000, workers=workers, **options)
    assert verify(tmp_path / "packed") == []
    keys = ("input_ids", "labels", "attention_mask")
    plain = {key: IndexedDataset(tmp_path / f"plain_packed_{key}_document") for key in keys}
    packed = {key: IndexedDataset(tmp_path / f"packed_packed_{key}_document") for key in keys}
    assert max(packed["labels"].sequence_lengths) <= 1000
    assert len(packed["labels"]) < len(plain["labels"])
    for key in ("input_ids", "labels"):
        apart = []
        for ids, mask in zip(packed[key], packed["attention_mask"], strict=True):
            apart += [ids[mask == number].tolist() for number in range(1, mask.max() + 1)]
        assert apart == [ids.tolist() for ids in plain[key]]


def test_verify_finds_a_mask_that_numbers_no_documents(folder, rows, tmp_path):
    prepare([rows], tmp_path / "a", tokenizer=folder, handler_name="GeneralInstructionHandler", pack_length=10**6)
    file = tmp_path / "a_packed_attention_mask_document.bin"
    mask = np.fromfile(file, np.int32)
    assert set(mask) == {1, 2, 3}
    for at, value in ((0, 2), (5, 3)):
        broken = mask.copy()
        broken[at] = value
        broken.tofile(file)
        assert any("sequence 0 does not go with the ids" in problem for problem in verify(tmp_path / "a"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pack_length": 0}, "--seq-length 0"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"dtype": "uint16", "handler_name": "GeneralInstructionHandler"}, "writes labels, and -100"),
        ({"special_tokens_in_text": "x"}, "--special-tokens-in-text x"),
        ({"executor": "x"}, "--executor x"),
    ],
)
def test_what_cannot_be_asked_for_is_a_usage_error(folder, corpus, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        prepare([corpus], tmp_path / "out", tokenizer=folder, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_ids_that_do_not_fit_in_uint16_are_refused(folder, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "vocab_size", 65537, raising=False)
    real = Tokenizer.__init__

    def with_many(self, *arguments, **options):
        real(self, *arguments, **options)
        self.vocab_size = 65537

    monkeypatch.setattr(Tokenizer, "__init__", with_many)
    with pytest.raises(UsageError, match="65537 ids, above 65536"):
        prepare([corpus], tmp_path / "out", tokenizer=folder, dtype="uint16")
