"""From raw files to indexed datasets and back, on small data made here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from data_prep import DataError, IndexedDataset, Tokenizer, prepare, read_manifest, templates
from hypothesis import given, settings
from hypothesis import strategies as st

TEXTS = ["the llama walks over the grassland", "  two leading spaces", "a condor\ncircles above", "", "x" * 300]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    return path


def pieces(model):
    return sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_ids_are_sentencepieces(model, text):
    if "<" not in text:
        assert Tokenizer(model).encode(text) == [1, *pieces(model).encode(text)]


def test_literal_special_tokens_become_their_ids(model):
    encode = pieces(model).encode
    assert Tokenizer(model).encode("the</s>llama", eos=True) == [1, *encode("the"), 2, *encode("llama"), 2]


def test_documents_read_back(model, corpus, tmp_path):
    manifest = prepare([corpus], tmp_path / "out", tokenizer=model, append_eod=True)
    data = IndexedDataset(tmp_path / "out")
    kept = [text for text in TEXTS if text]
    assert [row.tolist() for row in data] == [[1, *pieces(model).encode(text), 2] for text in kept]
    assert data.document_indices.tolist() == list(range(len(kept) + 1))
    assert manifest == read_manifest(tmp_path / "out_text_document")
    size = 34 + 12 * len(kept) + 8 * (len(kept) + 1)
    assert Path(f"{tmp_path}/out_text_document.idx").stat().st_size == size


def test_labels_carry_the_response_only(model, tmp_path):
    row = {"instruction": "walk", "input": "", "output": "over the grassland"}
    (tmp_path / "rows.json").write_text(json.dumps([row]), "utf-8")
    options = {"tokenizer": model, "handler_name": "GeneralInstructionHandler", "append_eod": True}
    prepare([tmp_path / "rows.json"], tmp_path / "out", **options)
    ids, mask, labels = (
        IndexedDataset(tmp_path / f"out_packed_{key}_document")[0] for key in ("input_ids", "attention_mask", "labels")
    )
    prompt = 1 + len(pieces(model).encode(templates.GENERAL_INSTRUCTION.prompt("walk")))
    assert labels[:prompt].tolist() == [-100] * prompt
    np.testing.assert_array_equal(labels[prompt:], ids[prompt:])
    assert labels[-1] == 2
    assert mask.tolist() == [1] * len(ids)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{oops\n', "line 2"),
        ('{"other": "a"}\n', "no column"),
        ('{"text": null}\n', "null"),
        ("[1]\n", "not an object"),
        ("", "no document"),
    ],
)
def test_broken_input_is_named_and_leaves_nothing(model, tmp_path, content, words):
    (tmp_path / "in.jsonl").write_text(content, "utf-8")
    with pytest.raises(DataError, match=words):
        prepare([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer=model)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_what_is_there_is_replaced_only_when_asked(model, corpus, tmp_path):
    prepare([corpus], tmp_path / "out", tokenizer=model)
    with pytest.raises(DataError, match="--overwrite"):
        prepare([corpus], tmp_path / "out", tokenizer=model)
    prepare([corpus], tmp_path / "out", tokenizer=model, overwrite=True)


def test_an_unknown_handler_is_refused_with_the_nearest(model, corpus, tmp_path):
    with pytest.raises(DataError, match="GeneralPretrainHandler"):
        prepare([corpus], tmp_path / "out", tokenizer=model, handler_name="GeneralPretrainHandle")


def test_the_console_script_answers_in_one_line(tmp_path):
    command = [str(Path(sys.executable).parent / "data-prep"), "inspect", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no such data set")
    assert len(done.stderr.splitlines()) == 1
