"""The trainer itself, unchanged, on the emulated NPU: megatron-core's loss and optimizer, HCCL for one, checkpoints."""

import dataclasses
import json
import os
import random
import subprocess
import sys

import pytest
import torch

pytest.importorskip("trainer", reason="trainer is another package: `nox -s npu_contract` has it")
import sentencepiece
from ckpt_tools import open_checkpoint, write_checkpoint
from data_prep import prepare
from npu_kernels.installation import AUTOLOAD

from contract.test_llama import CONFIG, TESTS, llama_model

WORDS = ["the", "llama", "walks", "over", "high", "grassland", "and", "eats", "dry", "grass", "while", "a", "condor"]
ON_NPU = """
import sys
from pathlib import Path
import emulator
emulator.start(Path(sys.argv.pop(1)))
from trainer.cli import main
sys.exit(main())
"""
OPTIONS = [
    *("--train-iters", "4", "--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "4"),
    *("--lr", "0.01", "--clip-grad", "0.5", "--weight-decay", "0.1", "--split", "80,20,0", "--eval-iters", "1"),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A small model with its tokenizer, hf/, and a corpus, text_text_document."""
    home = tmp_path_factory.mktemp("workspace")
    rng = random.Random(3)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(100)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(home / "tokenizer"), vocab_size=330, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(home / "tokenizer.model")).get_piece_size()
    config = dataclasses.replace(CONFIG, vocab_size=pieces)
    torch.manual_seed(0)
    weights = {name: weight.detach().numpy() for name, weight in llama_model.LlamaModel(config).named_parameters()}
    write_checkpoint(home / "hf", config, weights, "hf", files=[home / "tokenizer.model"])
    (home / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    prepare([home / "text.jsonl"], home / "text", tokenizer=home / "hf", append_eod=True)
    return home


def train(workspace, place, folder, *options):
    """The metrics of a run in a process of its own, on an NPU or, since nothing is emulated there, on the CPU."""
    out = workspace / "".join([place, *options])
    start = [ON_NPU, folder] if place == "npu" else ["import sys; from trainer.cli import main; sys.exit(main())"]
    paths = ["--data-path", workspace / "text", "--load-weights", workspace / "hf", "--output-dir", out]
    command = [sys.executable, "-W", "ignore", "-c", *start, "pretrain", *paths, *OPTIONS, *options]
    env = os.environ | {AUTOLOAD: "0", "OMP_NUM_THREADS": "1", "PUNA_KERNELS": "require-fused"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=TESTS, env=env,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()], done.stderr, out


def curve(steps):
    return [step[name] for step in steps for name in ("loss", "grad_norm", "valid_loss") if name in step]


def test_the_trainer_trains_on_an_npu_as_on_a_cpu(workspace, request):
    folder = request.config.cache.mkdir("emulator")
    npu, said, out = train(workspace, "npu", folder)
    cpu, _, _ = train(workspace, "cpu", folder)
    assert curve(npu) == pytest.approx(curve(cpu), rel=2e-5)
    assert len(npu) == 4
    assert npu[-1]["loss"] < npu[0]["loss"] - 0.05, "it learns"
    assert npu[-1]["max_memory_bytes"] > 0, "an NPU counts its memory"
    assert "max_memory_bytes" not in cpu[-1], "the control: the other run was on the CPU"
    assert "fall back" not in said
    with open_checkpoint(out) as trained, open_checkpoint(workspace / "cpu") as other, open_checkpoint(
        workspace / "hf"
    ) as before:  # fmt: skip
        for name in trained.names():
            mine, theirs = (torch.from_numpy(checkpoint.read(name)) for checkpoint in (trained, other))
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(mine, torch.from_numpy(before.read(name)), atol=1e-3), "the control: it moved"


def test_the_trainer_trains_in_bf16_on_an_npu(workspace, request):
    npu, _, _ = train(workspace, "npu", request.config.cache.mkdir("emulator"), "--bf16")
    cpu, _, _ = train(workspace, "cpu", None, "--bf16")
    losses = [[step["loss"] for step in steps] for steps in (npu, cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02), "upstream's own bound for another device"
    assert npu[-1]["mfu"] > 0, "the peak of a 910B3 in bf16 is known"
