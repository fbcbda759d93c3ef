"""A tiny LLaMA, its tokenizer and two small data sets, made once for all of the package's tests."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from data_prep import prepare, templates
from engine_case import GROUPS, make
from ranks import Ranks
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = ["the", "llama", "walks", "over", "high", "grassland", "and", "eats", "dry", "grass", "while", "a", "condor"]
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    initializer_range=0.1,
    tie_word_embeddings=False,
)


def sentences(count):
    rng = random.Random(3)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(count)]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """Holds hf/ (model and tokenizer), text_text_document and tune_packed_*_document."""
    home = tmp_path_factory.mktemp("workspace")
    hf = home / "hf"
    hf.mkdir()
    texts = sentences(200)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts + 20 * [templates.GENERAL_INSTRUCTION.prompt("eats")]),
        model_prefix=str(hf / "tokenizer"),
        vocab_size=401,  # odd: tensor parallelism has to pad it
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (hf / "tokenizer.vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(hf / "tokenizer.model")).get_piece_size()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=pieces, **SIZES)).save_pretrained(hf)
    (home / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    rows = [{"instruction": text[:20], "input": "", "output": text[-25:]} for text in texts[:50]]
    (home / "tune.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    prepare([home / "text.jsonl"], home / "text", tokenizer=hf, append_eod=True)
    prepare(
        [home / "tune.jsonl"], home / "tune", tokenizer=hf, append_eod=True, handler_name="GeneralInstructionHandler"
    )
    return home


@pytest.fixture(scope="session")
def ranks():
    """Four processes in one group."""
    with Ranks(4, timeout_s=120) as pool:
        yield pool


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """One engine case for each kind of attention."""
    return {name: make(tmp_path_factory.mktemp(name), groups) for name, groups in GROUPS.items()}
