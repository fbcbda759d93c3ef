"""A long text in segments has the ids of the whole."""

import pyarrow as pa
import pytest
from conftest import TEXTS
from data_prep import Tokenizer, encoders, long_texts
from hypothesis import example, given, settings
from hypothesis import strategies as st

WORDS = [
    "llama",
    " ",
    "  ",
    "\n",
    "\n ",
    "\t",
    "é",
    "🦙",
    "the",
    "\x00",
    "\r\n",
    "東京",
    "中",
    "over",
    "x",
    "</s>",
    "▁",
    "<s> ",
]
texts = st.lists(st.sampled_from(WORDS), max_size=30).map("".join)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


@given(texts, st.integers(1, 9), st.integers(1, 9))
@example("the llama walks over  the  ", 1, 9)
@example("東京東京中中中x", 1, 1)
@settings(max_examples=400, deadline=None)
def test_segments_have_the_ids_of_the_whole(tokenizer, text, size, sought):
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "_SEGMENT", size)
        patch.setattr(long_texts, "_SOUGHT", sought)
        patch.setattr(encoders, "LONG", 2)
        assert tokenizer.encode(text) == whole
        assert tokenizer.encode_batch([text, "the", text]) == [whole, tokenizer.encode("the"), whole]


def test_segments_are_bounded_with_and_without_spaces(tokenizer, monkeypatch):
    monkeypatch.setattr(long_texts, "_SEGMENT", 50)
    monkeypatch.setattr(long_texts, "_SOUGHT", 20)
    pairs = tokenizer._encoder._pairs
    for text in (" ".join(TEXTS) * 5, "東京中" * 300, "x" * 40 + "\n" * 500):
        parts = [segment for segment, _ in long_texts.segments(text, pairs)]
        assert len(parts) >= len(text) // 80
        assert max(map(len, parts)) <= 80


def test_a_text_without_a_place_to_cut_is_encoded_whole(folder, monkeypatch):
    tokenizer = Tokenizer(folder)
    whole = tokenizer.encode("ll" * 100)
    monkeypatch.setattr(encoders, "LONG", 20)
    monkeypatch.setattr(long_texts, "_SEGMENT", 10)
    monkeypatch.setattr(type(tokenizer._encoder), "_pairs", frozenset(["ll"]))
    assert tokenizer.encode("ll" * 100) == whole


def test_a_cut_anywhere_would_differ(tokenizer):
    """The control: one inside a piece."""
    text, ids = "the llama", tokenizer.encode("the llama", bos=False)
    apart = [tokenizer.encode(text[:6], bos=False), tokenizer.encode("\n" + text[6:], bos=False)[2:]]
    assert [*apart[0], *apart[1]] != ids
    assert all(text[at - 1 : at + 1] in tokenizer._encoder._pairs for at in range(5, len(text)))


def test_a_model_whose_pieces_span_newlines_gets_texts_whole(spanning, monkeypatch):
    tokenizer = Tokenizer(spanning)
    whole = tokenizer.encode(TEXTS[2])
    monkeypatch.setattr(encoders, "LONG", 2)
    monkeypatch.setattr(long_texts, "segments", None)
    assert tokenizer.encode(TEXTS[2]) == whole
    assert tokenizer.encode_column(pa.array([TEXTS[2]])).ids.tolist() == whole[1:]
