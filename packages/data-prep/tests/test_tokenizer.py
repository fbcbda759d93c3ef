"""Ids are SentencePiece's on each stretch between literal special tokens, and come back as the text they were."""

import json
import re
import shutil

import numpy as np
import pytest
import sentencepiece
from conftest import SYMBOL, TEXTS
from data_prep import DataError, Tokenizer
from data_prep.tokenizer import PROBE, fingerprint
from hypothesis import example, given, settings
from hypothesis import strategies as st

WORDS = [
    "llama",
    " ",
    "  ",
    "\n",
    "\t",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "▁",
    "é",
    "🦙",
    "the",
    "\x00",
    "\r\n",
    "<",
    "5",
]
texts = st.lists(st.sampled_from(WORDS), max_size=12).map("".join) | st.text(max_size=40)


def expected(pieces, text):
    ids = [1]
    for stretch in re.split("(<s>|</s>|<unk>)", text):
        ids += {"<unk>": [0], "<s>": [1], "</s>": [2]}.get(stretch) or (pieces.encode(stretch) if stretch else [])
    return ids


@given(texts)
@example(PROBE)
@settings(max_examples=300, deadline=None)
def test_ids_are_sentencepieces_between_special_tokens(folder, pieces, text):
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode(text) == expected(pieces, text)
    assert tokenizer.encode(text, bos=False, eos=True) == [*expected(pieces, text)[1:], 2]


@given(texts)
@settings(max_examples=300, deadline=None)
def test_a_tokenizer_json_alone_gives_the_same_ids(json_folder, pieces, text):
    """As long as its merges stand in the order of scores, and the text holds no `▁` of its own."""
    if "▁" not in text:
        assert Tokenizer(json_folder).encode(text) == expected(pieces, text)


@pytest.mark.parametrize("kind", ["folder", "json_folder", "symbols"])
@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_a_text_from_its_beginning_comes_back(kind, request, text):
    text = text.replace("▁", "").replace("<", "").replace("\x00", "")
    tokenizer = Tokenizer(request.getfixturevalue(kind))
    assert tokenizer.decode(tokenizer.encode(text, eos=True)) == text


@pytest.mark.parametrize("kind", ["folder", "json_folder", "symbols"])
@pytest.mark.parametrize("text", TEXTS)
def test_prompt_and_continuation_are_the_whole(kind, text, request):
    tokenizer = Tokenizer(request.getfixturevalue(kind))
    ids = tokenizer.encode(text)
    for cut in range(2, len(ids)):  # behind <s> alone, nothing has been said that could be continued
        assert tokenizer.decode(ids[:cut]) + tokenizer.decode(ids[cut:]) == text


@pytest.mark.parametrize("kind", ["folder", "json_folder", "symbols", "spanning"])
@given(before=texts, after=texts)
@settings(max_examples=150, deadline=None)
def test_the_length_of_a_prefix_is_that_of_its_own_ids(kind, request, before, after):
    tokenizer, text = Tokenizer(request.getfixturevalue(kind)), before + "\n" + after
    for end in (len(before) + 1, len(before)):
        assert tokenizer.prefix_length(text, end, tokenizer.encode(text)) == len(tokenizer.encode(text[:end]))


def test_a_prefix_is_counted_without_encoding_it_again(folder, symbols, json_folder, spanning):
    assert Tokenizer(folder)._encoder.newline_id is not None
    assert Tokenizer(symbols)._encoder.newline_id is not None
    assert Tokenizer(spanning)._encoder.newline_id is None
    assert Tokenizer(json_folder)._encoder.newline_id is None  # its rules may be anything: encodes again


def test_newlines_that_the_model_turns_into_spaces_are_not_counted_on(tmp_path):
    from conftest import train

    tokenizer = Tokenizer(train(tmp_path, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True))
    text = "the llama\nwalks over"
    assert tokenizer._encoder.newline_id is None
    assert tokenizer.prefix_length(text, 10, tokenizer.encode(text)) == len(tokenizer.encode(text[:10]))


def test_user_defined_symbols_are_one_piece_each(symbols):
    tokenizer = Tokenizer(symbols)
    model = sentencepiece.SentencePieceProcessor(model_file=str(symbols / "tokenizer.model"))
    ids = tokenizer.encode(f"{SYMBOL}\n\nllama")
    assert ids == [1, *model.encode(f"{SYMBOL}\n\nllama")]
    assert model.piece_to_id("\n") in ids
    assert model.piece_to_id(SYMBOL.replace(" ", "▁")) in ids


@pytest.fixture
def extended(folder, pieces, tmp_path):
    """The model, with tokens that only Hugging Face's files know: one special, one not, with a gap before it."""
    home, size = tmp_path / "extended", pieces.get_piece_size()
    shutil.copytree(folder, home)
    decoder = {str(size): {"content": "<pad>", "special": True}, "2": {"content": "</s>", "special": True}}
    (home / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}), "utf-8")
    (home / "added_tokens.json").write_text(json.dumps({"<pad>x": size + 2}), "utf-8")
    return home


def test_added_tokens_are_matched_literally_the_longest_first(extended, pieces):
    tokenizer, size = Tokenizer(extended), pieces.get_piece_size()
    assert tokenizer.vocab_size == size + 3
    ids = tokenizer.encode("the<pad>x llama<pad>")
    assert ids == [1, *pieces.encode("the"), size + 2, *pieces.encode(" llama"), size]
    assert tokenizer.decode(ids) == "the<pad>x llama"
    assert tokenizer.decode([size + 2, *pieces.encode("llama")]) == "<pad>xllama"
    own = [pieces.id_to_piece(i) for i in range(size)]
    assert tokenizer.vocab_sha256 == fingerprint([*own, "<pad>", "", "<pad>x"])


def test_a_model_that_is_named_itself_stands_alone(extended, pieces):
    assert Tokenizer(extended / "tokenizer.model").vocab_size == pieces.get_piece_size()


def test_the_end_token_is_the_configured_one(extended, pieces):
    file = extended / "tokenizer_config.json"
    content = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(content | {"eos_token": {"content": "<pad>"}, "bos_token": "<s>"}), "utf-8")
    assert (Tokenizer(extended).bos_id, Tokenizer(extended).eos_id) == (1, pieces.get_piece_size())


def test_files_of_two_vocabularies_are_refused(extended):
    (extended / "added_tokens.json").write_text(json.dumps({"<mask>": 5}), "utf-8")
    with pytest.raises(DataError, match="two vocabularies: id 5"):
        Tokenizer(extended)
    (extended / "added_tokens.json").unlink()
    (extended / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"</s>": 3}}}), "utf-8")
    with pytest.raises(DataError, match="two vocabularies: id 3"):
        Tokenizer(extended)


def test_ids_of_no_piece_and_special_ones_decode_to_nothing(folder, json_folder):
    for home in (folder, json_folder):
        assert Tokenizer(home).decode([1, 0, 2, -100, 10**6]) == ""
        assert Tokenizer(home).decode([]) == ""


def test_a_batch_is_each_text(folder):
    tokenizer = Tokenizer(folder)
    rows = [tokenizer.encode(text, eos=True) for text in TEXTS]
    assert tokenizer.encode_batch(TEXTS, eos=True) == rows
    ids, lengths = tokenizer.encode_flat(TEXTS, eos=True)
    assert ids.dtype == lengths.dtype == np.int32
    assert ids.tolist() == [id for row in rows for id in row]
    assert lengths.tolist() == list(map(len, rows))


def test_fingerprints(folder, json_folder, symbols):
    assert fingerprint(["<unk>", "<s>", "</s>", "▁a"]) == (
        "c2d7e55e4a84ffa85b2d4c3bb48d5c4720013b188eb96d132145cfe1d1228bbd"
    )
    model, fast = Tokenizer(folder), Tokenizer(json_folder)
    assert (model.encoder, fast.encoder) == ("sentencepiece", "tokenizers")
    assert model.vocab_sha256 == fast.vocab_sha256 != Tokenizer(symbols).vocab_sha256
    assert len(model.probe_sha256) == 64


def test_a_run_has_its_latest_checkpoints_tokenizer(folder, tmp_path):
    checkpoint = tmp_path / "run/checkpoints/iter_0000010"
    shutil.copytree(folder, checkpoint)
    (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("10", "utf-8")
    assert Tokenizer.find(tmp_path / "run").path == checkpoint / "tokenizer.model"
    assert Tokenizer.find(checkpoint).path == checkpoint / "tokenizer.model"
    assert Tokenizer.find(tmp_path / "elsewhere", folder).path == folder / "tokenizer.model"
    with pytest.raises(DataError, match="--tokenizer-name-or-path"):
        Tokenizer.find(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.model", b"not a model", "no SentencePiece model"),
        ("tokenizer.json", b"{}", "no tokenizer"),
        ("tokenizer.json", b"\xff", "no tokenizer"),
        ("other.txt", b"", "neither tokenizer.model nor tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        Tokenizer(tmp_path)
    with pytest.raises(DataError, match="no such tokenizer"):
        Tokenizer(tmp_path / "none")
