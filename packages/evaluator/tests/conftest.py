"""A small random model as a Hugging Face folder with its tokenizer, and a few questions."""

import csv

import pytest
import sentencepiece
import torch
from llama_model import load_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(2)

QUESTIONS = {
    "big_cities": [
        ["Which city is high, then?", "Lima", "La Paz", "NA", "Rome", "B"],
        ["Which city\nis old?", "None", "Rome", "La Paz and Lima together", "Quito", "B"],
        ["Where?", "a", "b", "c", "d", "D"],
    ],
    "animals": [["What eats grass?", "a llama", "a condor", "a puma", "a fish", "A"]],
}
EXAMPLES = {
    name: [[f"Which of the {name} is number {n}?", "one", "two", "three", "four", "ABCDA"[n]] for n in range(5)]
    for name in QUESTIONS
}


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="session")
def mmlu(tmp_path_factory):
    """MMLU's layout: test and dev folders."""
    home = tmp_path_factory.mktemp("mmlu")
    for name in QUESTIONS:
        write_csv(home / f"test/{name}_test.csv", QUESTIONS[name])
        write_csv(home / f"dev/{name}_dev.csv", EXAMPLES[name])
    return home


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The model, in fp32, with weights large enough for its opinions to differ."""
    home = tmp_path_factory.mktemp("model") / "hf"
    home.mkdir()
    texts = [" ".join(row) for rows in (*QUESTIONS.values(), *EXAMPLES.values()) for row in rows]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, "The following are multiple choice questions (with answers) about"] * 20),
        model_prefix=str(home / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(home / "tokenizer.model")).get_piece_size()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=pieces, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(home)
    return home


@pytest.fixture(scope="session")
def hf(folder):
    """The same weights in transformers: an independent implementation."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def model(folder):
    return load_model(folder, device="cpu")


@torch.no_grad()
def independent(hf, context, continuation):
    """Each continuation token's log-probability: one request, no padding, transformers, float64 softmax."""
    logits = hf(torch.tensor([[*context, *continuation]])).logits[0].double().log_softmax(-1)
    return [logits[len(context) + at - 1, token].item() for at, token in enumerate(continuation)]
