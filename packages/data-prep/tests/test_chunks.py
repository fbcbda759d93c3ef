"""Each distinct chunk encoded once gives the library's own ids, where the vocabulary allows it and only there."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from conftest import SYMBOL, TEXTS, train
from data_prep import Tokenizer, chunks
from data_prep.tokenizer import PROBE
from hypothesis import example, given, settings
from hypothesis import strategies as st

WORDS = [
    "llama",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "</s>",
    "<unk>",
    "▁",
    "é",
    "🦙",
    "the",
    "\x00",
    "\r\n",
    "\u00a0",
    "\u3000",
]
WORDS += [SYMBOL, "<", "x", "東京"]
texts = st.lists(st.sampled_from(WORDS), max_size=12).map("".join) | st.text(max_size=40)
KINDS = ["folder", "json_folder", "symbols", "spanning", "spaced"]


@pytest.fixture(scope="session")
def spaced(folder, tmp_path_factory):
    """The model, with an added token in which a space and a newline stand."""
    home = tmp_path_factory.mktemp("spaced") / "hf"
    shutil.copytree(folder, home)
    size = Tokenizer(folder).vocab_size
    (home / "added_tokens.json").write_text(json.dumps({"the llama\nwalks": size}), "utf-8")
    return home


@pytest.mark.parametrize("kind", KINDS)
@given(batch=st.lists(texts, max_size=6))
@example(batch=[PROBE, "", "  x", "x  ", "\n", "the llama\nwalks on"])
@settings(max_examples=200, deadline=None)
def test_a_batch_has_the_ids_of_the_library(kind, batch, request):
    tokenizer = tokenizer_of(request, kind)
    assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]


@pytest.mark.parametrize("kind", KINDS)
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_the_tokens_of_prefixes_are_counted(kind, pairs, request):
    tokenizer = tokenizer_of(request, kind)
    for end in ("\n", ""):
        column = pa.array([before + end + after for before, after in pairs], pa.string())
        places = np.array([len((before + end).encode()) for before, _ in pairs])
        expected = [len(tokenizer.encode(before + end, bos=False)) for before, _ in pairs]
        assert tokenizer.encode_column(column, places).before.tolist() == expected


made = {}


def tokenizer_of(request, kind):
    """One tokenizer for all examples: its cache is what is tested."""
    if kind not in made:
        made[kind] = Tokenizer(request.getfixturevalue(kind))
    return made[kind]


def test_where_chunks_are_kept_apart(folder, json_folder, symbols, spanning, tmp_path):
    assert Tokenizer(folder).counts is not None
    assert Tokenizer(json_folder).counts is not None
    assert Tokenizer(spanning).counts is not None
    assert Tokenizer(symbols).counts is None  # a symbol holds spaces
    for number, options in enumerate(
        (
            {"model_type": "unigram"},
            {"normalization_rule_name": "nmt_nfkc"},
            {"remove_extra_whitespaces": True},
            {"add_dummy_prefix": False},
            {"split_by_whitespace": False},
            {"treat_whitespace_as_suffix": True},
        )
    ):
        assert Tokenizer(train(tmp_path / str(number), **options)).counts is None, options


def test_without_the_condition_ids_would_differ(symbols, folder, tmp_path):
    """The control: the same encoder on vocabularies that it is kept from."""
    across = train(tmp_path, split_by_whitespace=False)
    for home, text in ((symbols, SYMBOL), (across, TEXTS[0])):
        tokenizer = Tokenizer(home)
        encoder = tokenizer._encoder
        forced = chunks.ChunkEncoder(encoder.encode_rows, encoder.pieces.index("▁"), False, ["▁"])
        assert forced.encode(pa.array([text])).ids.tolist() != tokenizer.encode(text, bos=False)
    encoder = Tokenizer(folder)._encoder
    forced = chunks.ChunkEncoder(encoder.encode_rows, encoder.pieces.index("▁"), False, ["never there"])
    text = "the</s> llama"
    assert forced.encode(pa.array([text])).ids.tolist() != encoder.encode(text)


def test_the_cache_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(chunks, "_CACHE_BYTES", 20 * chunks._ENTRY_BYTES)
    tokenizer = Tokenizer(folder)
    encoder = tokenizer._encoder.chunks
    for number in range(40):
        batch = [f"llama {number} walks {number * number} up", "x" * 1000]
        assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]
        assert len(encoder._young) <= 10
        assert len(encoder._old) <= 10
        assert not any(len(key) > 200 for key in encoder._young)
    assert b" llama" in encoder._young or b" llama" in encoder._old


def test_the_library_gets_texts_whole_where_the_cache_is_no_help(folder, monkeypatch):
    monkeypatch.setattr(chunks, "_LEARNT", 10)
    tokenizer = Tokenizer(folder)
    for number in range(30):
        batch = [f"{number * 7919 + at:09}" for at in range(20)]
        assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]
    assert tokenizer.counts.bypassed_bytes > 20 * 20 * 9
    counts = tokenizer.counts.take()
    assert (counts.chunks, counts.misses) == (0, 0)
    assert tokenizer.counts.bypassed_bytes == 0


def test_a_large_batch_is_tried_by_a_part(folder, monkeypatch):
    monkeypatch.setattr(chunks, "_LEARNT", 2000)
    tokenizer = Tokenizer(folder)
    distinct = [f"{at:09}" for at in range(1000)]
    for batch in (distinct, TEXTS * 20, ["</s>", *TEXTS * 20]):
        for _ in range(chunks._PAUSE + 2):
            assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]
            counts = tokenizer.counts.take()
        assert (counts.bypassed_bytes > 0) == (batch is distinct)
