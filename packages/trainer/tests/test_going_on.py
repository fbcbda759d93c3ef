"""Runs that are killed, terminated, extended, resumed elsewhere: through the console script, on two processes."""

import json
import math
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from ckpt_tools import open_checkpoint
from data_prep import IndexedDataset
from scripts import start, trainer
from trainer import open_run, output

STEPS = 60
OPTIONS = [
    *("--train-iters", str(STEPS), "--seq-length", "24", "--global-batch-size", "4", "--eval-iters", "1"),
    *("--lr", "0.01", "--min-lr", "0.001", "--lr-warmup-iters", "5", "--split", "80,20,0", "--log-interval", "20"),
    *("--save-interval", "10", "--adam-beta2", "0.95", "--micro-batch-size", "2"),
]
TWO = ["--nproc-per-node", "2", "--tensor-model-parallel-size", "2", "--sequence-parallel"]
OTHER = [
    *("--nproc-per-node", "2", "--tensor-model-parallel-size", "1", "--no-sequence-parallel"),
    *("--use-distributed-optimizer", "--micro-batch-size", "1"),
]


def where(workspace, out):
    return ["--data-path", workspace / "text", "--load-weights", workspace / "hf", "--output-dir", out]


def columns(run, *names):
    return [[line[name] for name in names] for line in run.metrics()]


SAME = ("step", "consumed_samples", "loss", "loss_tokens", "lr", "grad_norm", "loss_scale")


@pytest.fixture(scope="module")
def straight(workspace):
    """The uninterrupted run."""
    out = workspace / "straight"
    trainer("pretrain", *where(workspace, out), *OPTIONS, *TWO)
    return open_run(out)


def interrupted(workspace, out, send, *options):
    """A run that is sent a signal, or killed with all its processes, once its second checkpoint is there: its exit."""
    process = start("pretrain", *where(workspace, out), *OPTIONS, *TWO, *options)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "iter_0000020").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    send(process)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def kill_all(process):
    os.killpg(process.pid, signal.SIGKILL)


def weights(folder):
    with open_checkpoint(folder) as checkpoint:
        return {name: np.array(checkpoint.read(name)) for name in checkpoint.names()}


@pytest.fixture(scope="module")
def killed(workspace):
    """A run that was killed on its way."""
    out = workspace / "killed"
    interrupted(workspace, out, kill_all)
    assert len(open_run(out).metrics()) < STEPS
    return open_run(out)


def test_a_killed_run_that_is_resumed_is_the_uninterrupted_one_bit_for_bit(workspace, straight, killed, tmp_path):
    out = tmp_path / "killed"
    shutil.copytree(killed.path, out)
    done = trainer("pretrain", "--resume", out)
    assert f"resumed from {out}/checkpoints/iter_00000" in done.stderr
    assert columns(open_run(out), *SAME) == columns(straight, *SAME)
    last = open_run(out).metrics()[-1]
    assert last["valid_loss"] == straight.metrics()[-1]["valid_loss"]
    theirs = weights(straight.path)
    assert all(np.array_equal(value, theirs[name]) for name, value in weights(out).items())


def test_it_goes_on_in_another_layout_and_folder_too(straight, killed, tmp_path):
    trainer("pretrain", "--resume", killed.path, "--output-dir", tmp_path / "other", *OTHER)
    other = open_run(tmp_path / "other")
    first = other.metrics()[0]["step"]
    assert 20 < first < STEPS
    np.testing.assert_allclose(columns(other, "loss", "lr"), columns(straight, "loss", "lr")[first - 1 :], rtol=2e-5)
    assert len(killed.metrics()) < STEPS, "the run that was resumed elsewhere stays as it was"


def test_a_terminated_run_saves_what_it_has_and_goes_on(workspace, straight, tmp_path):
    out = tmp_path / "run"
    code, err = interrupted(workspace, out, lambda process: process.send_signal(signal.SIGTERM), "--keep-last", "2")
    assert code == 143, err
    assert "error: terminated after step" in err
    assert f"go on with --resume {out}" in err
    saved = open_run(out).iterations()
    assert saved[-1] == len(open_run(out).metrics()) < STEPS
    assert len(saved) == 2, "--keep-last"
    trainer("pretrain", "--resume", out, "--async-save")
    assert columns(open_run(out), *SAME) == columns(straight, *SAME)
    assert open_run(out).iterations() == [50, 60]


def test_an_extended_run_reads_on_where_it_stopped(straight, tmp_path):
    out = tmp_path / "longer"
    shutil.copytree(straight.path, out)
    trainer("pretrain", "--resume", out, "--train-iters", "70")
    lines = open_run(out).metrics()
    assert columns(open_run(out), *SAME)[:STEPS] == columns(straight, *SAME)
    assert [line["step"] for line in lines[STEPS:]] == list(range(61, 71))
    assert lines[-1]["consumed_samples"] == 280
    assert {line["lr"] for line in lines[STEPS + 1 :]} == {0.001}, "the schedule's end stays where it was"


REFUSED = {
    "a run that is not there": (["--resume", "nowhere"], 1, "no such run: nowhere"),
    "another precision": (["--bf16"], 2, "trains in float32, the options say bfloat16"),
    "another schedule": (["--lr", "0.02"], 2, "--lr is 0.01 there, 0.02 here"),
    "nothing left to do": (["--train-iters", "60"], 2, "has done 60 steps"),
    "other data": (["--seed", "5"], 2, "--seed 1234, not 5"),
    "other documents": (["--reset-attention-mask"], 2, "--reset-attention-mask False, not True"),
    "other rules of the optimizer": (["--adam-beta2", "0.9"], 2, "--adam-beta2 is 0.95 there, 0.9 here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_run_is_refused(straight, tmp_path, case):
    options, code, words = REFUSED[case]
    out = tmp_path / "out"
    more = ["--resume", straight.path, "--output-dir", out, "--train-iters", "80"]
    said = trainer("pretrain", *more, *options, code=code).stderr.strip().splitlines()
    assert [line for line in said if line.startswith("error: ")] == said[-1:]
    assert words in said[-1]
    assert not (out / "metrics.jsonl").exists()


def test_a_damaged_checkpoint_is_named_and_not_trained_on(straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight.path, out)
    file = next((out / "checkpoints" / "iter_0000060").glob("__0_*.distcp"))
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte[0] ^ 1]))
    said = trainer("pretrain", "--resume", out, "--train-iters", "70", code=1).stderr
    assert f"{file.name} is damaged" in said
    assert "resume from an earlier checkpoint" in said


def test_a_hostile_checkpoint_runs_nothing(straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight.path, out)
    folder = out / "checkpoints" / "iter_0000060"
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch hostile-ran'\ntR.")
    from trainer.hashes import write_manifest

    (folder / "manifest.json").unlink()
    write_manifest(folder)
    said = trainer("pretrain", "--resume", out, "--train-iters", "70", code=1).stderr
    assert ".metadata" in said
    assert not os.path.exists("hostile-ran")


def test_weights_alone_start_a_run_but_resume_none(workspace, tmp_path):
    out = tmp_path / "run"
    trainer("pretrain", *where(workspace, out), *OPTIONS, "--train-iters", "6", "--no-save-optimizer")
    assert not list((out / "checkpoints" / "iter_0000006").glob("trainer_state.json"))
    said = trainer("pretrain", "--resume", out, "--train-iters", "8", code=1).stderr
    assert "no run resumes from it; --load-weights starts a new one" in said


def test_fresh_weights_do_not_depend_on_the_layout_and_the_result_opens_in_transformers(workspace, tmp_path):
    from transformers import LlamaForCausalLM

    options = [*OPTIONS, "--train-iters", "6", "--save-interval", "0", "--split", "100,0,0"]
    runs = []
    for name, layout in (("one", []), ("two", [*TWO, "--tensorboard-dir", tmp_path / "board"])):
        begin = ["--data-path", workspace / "text", "--model-config", workspace / "hf" / "config.json"]
        out = ["--output-dir", tmp_path / name, "--export-hf", tmp_path / f"{name}-hf"]
        trainer("pretrain", *begin, *out, *options, *layout, "--init-method-std", "0.02")
        runs.append(open_run(tmp_path / name))
    one, two = (np.array([loss for (loss,) in columns(run, "loss")]) for run in runs)
    np.testing.assert_allclose(one, two, atol=2e-6)
    vocabulary = json.loads((workspace / "hf" / "config.json").read_text("utf-8"))["vocab_size"]
    assert abs(one[0] - math.log(vocabulary)) < 0.05
    model = LlamaForCausalLM.from_pretrained(tmp_path / "two-hf")
    head = torch.from_numpy(weights(runs[1].path)["output_layer.weight"])
    assert torch.equal(model.lm_head.weight, head)
    assert list((tmp_path / "board").glob("events.*"))


FP16 = ["--fp16", "--eval-iters", "0"]
BROKEN = {
    "by weight decay": (["--weight-decay", "1e38", "--lr", "1e30", "--eval-iters", "0"], "weights are no numbers any"),
    "in validation": (["--lr", "3e38"], "the validation loss after step 1 is nan"),
    "in float16": ([*FP16, "--lr", "1e8", "--initial-loss-scale", "128"], "weights are no numbers any more"),
    "at the smallest loss scale": (
        [*FP16, "--initial-loss-scale", "1e9", "--min-loss-scale", "1e9"],
        "overflowed float16 at the smallest loss scale",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_are_no_numbers_are_never_saved(workspace, tmp_path, case):
    options, words = BROKEN[case]
    out = tmp_path / "run"
    few = ["--train-iters", "1", "--lr-warmup-iters", "0", "--min-lr", "0", "--lr-decay-style", "constant"]
    said = trainer("pretrain", *where(workspace, out), *OPTIONS, *few, *options, code=1).stderr
    assert words in said.splitlines()[-1]
    assert not open_run(out).iterations()


@pytest.mark.parametrize("mode", [[], ["--async-save"], ["--mode", "zero"]], ids=lambda mode: " ".join(mode) or "ptd")
def test_a_disk_that_is_full_is_one_line(workspace, tmp_path, mode):
    """A limit on the size of files stands for it: the system refuses to write on, as it does then."""
    out = tmp_path / "run"
    few = ["--train-iters", "2", "--lr-warmup-iters", "0"]
    process = start("pretrain", *where(workspace, out), *OPTIONS, *few, *mode, largest_file=100_000)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith(f"error: rank 0 could not write its part of {out}/checkpoints/")
    assert "Traceback" not in said
    assert not open_run(out).iterations()


def test_a_run_is_written_by_one_process_at_a_time(workspace, straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight.path, out)
    with output.lock(open_run(out)):
        for more in (["--resume", out, "--train-iters", "70"], [*where(workspace, out), *OPTIONS, "--overwrite"]):
            said = trainer("pretrain", *more, "--nproc-per-node", "1", "--tensor-model-parallel-size", "1",
                           "--no-sequence-parallel", code=1).stderr  # fmt: skip
            assert f"{out} is being written by another run (process {os.getpid()} on " in said
    assert len(open_run(out).metrics()) == STEPS


def test_an_extended_run_says_that_its_schedule_is_over(straight, tmp_path):
    more = ["--resume", straight.path, "--output-dir", tmp_path / "run", "--train-iters", "61", *OTHER]
    assert "the schedule is over since step 60: the rest runs at --min-lr 0.001" in trainer("pretrain", *more).stderr


def test_a_loss_that_is_no_number_names_its_samples(workspace, tmp_path):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(workspace / "hf")
    tokens = np.concatenate(list(IndexedDataset(workspace / "text_text_document")))
    seen, counts = np.unique(tokens, return_counts=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[int(seen[counts.argmin()])] = float("nan")  # the rarest token
    model.save_pretrained(tmp_path / "hf")
    shutil.copy(workspace / "hf" / "tokenizer.model", tmp_path / "hf")
    out = tmp_path / "run"
    more = ["--load-weights", tmp_path / "hf", "--nproc-per-node", "2", "--save-interval", "0"]
    said = trainer("pretrain", *where(workspace, out), *OPTIONS, *more, code=1).stderr
    assert "the loss of step" in said
    sample = int(re.search(r"is nan \(samples? (\d+)", said)[1])
    steps = len(open_run(out).metrics())
    assert steps * 4 <= sample < steps * 4 + 4
    assert all(math.isfinite(line["loss"]) for line in open_run(out).metrics())
