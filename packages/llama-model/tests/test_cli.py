"""`llama-model generate` as a user types it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from data_prep import Tokenizer, templates
from llama_model import ModelError, load_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SCRIPT = str(Path(sys.executable).parent / "llama-model")
PROMPTS = ["the llama walks", "dry grass"]


def train_tokenizer(home, text="the llama walks over high grassland and eats dry grass", vocab_size=300):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 50),
        model_prefix=str(home / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (home / "tokenizer.vocab").unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer."""
    home = tmp_path_factory.mktemp("model")
    train_tokenizer(home)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=Tokenizer(home).vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=320, tie_word_embeddings=False,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(home)
    return home


def run(*arguments, cwd=None):
    return subprocess.run([SCRIPT, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False)


def outputs(*arguments):
    done = run("generate", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(done.stdout)["outputs"]


def test_several_prompts_and_modes_after_one_load(folder):
    both = [option for prompt in PROMPTS for option in ("--prompt", prompt)]
    found = outputs(folder, *both, "--decoding", "greedy", "sample", "--max-new-tokens", 10, "--top-k", 20)
    assert [output["decoding"] for output in found] == ["greedy", "greedy", "sample", "sample"]
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(folder), Tokenizer(folder)
    for prompt, output in zip(PROMPTS, found, strict=False):
        assert set(output) == {"decoding", "text", "tokens", "logprobs", "elapsed_s"}
        ids = torch.tensor([tokenizer.encode(prompt)])
        theirs = hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10)
        assert output["tokens"] == theirs[0, ids.shape[1] :].tolist()
        assert output["text"] == tokenizer.decode(output["tokens"])
        assert len(output["logprobs"]) == len(output["tokens"])
        assert all(logprob <= 0 for logprob in output["logprobs"])


def test_a_template_stands_around_the_prompt(folder):
    asked = outputs(folder, "--prompt", "eats", "--prompt-template", "general-instruction", "--max-new-tokens", 5)
    whole = templates.get("general-instruction").prompt("eats")
    assert asked[0]["tokens"] == outputs(folder, "--prompt", whole, "--max-new-tokens", 5)[0]["tokens"]


def test_people_see_prompt_and_answer(folder):
    done = run("generate", folder, "--prompt", "the llama", "--max-new-tokens", 3, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "greedy, 3 tokens" in done.stdout
    assert "the llama\n>>>" in done.stdout


MISTAKES = {
    "no prompt": ((), 2, "--prompt"),
    "beams": (("--prompt", "x", "--decoding", "beam"), 2, "beam"),
    "too long": (("--prompt", "x", "--max-new-tokens", "500"), 2, "320 positions"),
    "temperature": (("--prompt", "x", "--decoding", "sample", "--temperature", "0"), 2, "temperature"),
    "seed": (("--prompt", "x", "--decoding", "sample", "--seed", str(2**63)), 2, "seed"),
    "device": (("--prompt", "x", "--device", "npu"), 2, "npu"),
    "tokenizer": (("--prompt", "x", "--tokenizer-name-or-path", "nowhere"), 1, "nowhere"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(folder, tmp_path, case):
    arguments, code, words = MISTAKES[case]
    assert_one_line(run("generate", folder, *arguments, cwd=tmp_path), code, words)


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    shutil.copy(folder / "tokenizer.model", tmp_path)
    assert load_tokenizer(folder, tmp_path).vocab_sha256 == load_tokenizer(folder).vocab_sha256
    train_tokenizer(tmp_path, "a condor flies")  # with fewer pieces
    with pytest.raises(ModelError, match="another vocabulary"):
        load_tokenizer(folder, tmp_path)
    train_tokenizer(tmp_path, "the llama walks over high grassland while a condor flies home", vocab_size=310)
    assert_one_line(run("generate", folder, "--prompt", "x", "--tokenizer-name-or-path", tmp_path), 1, "pieces")


def test_no_model_is_one_line(tmp_path):
    assert_one_line(run("generate", "nowhere", "--prompt", "x", cwd=tmp_path), 1, "nowhere does not exist")
    assert_one_line(run("generate", ".", "--prompt", "x", cwd=tmp_path), 1, "not a checkpoint")


def assert_one_line(done, code, words):
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert not done.stdout


def test_help_has_an_example_and_no_torch():
    module = [sys.executable, "-X", "importtime", "-m", "llama_model", "generate", "--help"]
    done = subprocess.run(module, capture_output=True, text=True, check=True)
    assert "Example: llama-model generate" in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "numpy"}
