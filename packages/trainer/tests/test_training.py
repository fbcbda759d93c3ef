"""Whole runs through the console script, on several processes, against Hugging Face with PyTorch's AdamW in fp32."""

import json
import shutil

import numpy as np
import pytest
import reference
import torch
from ckpt_tools import open_checkpoint
from data_prep import prepare
from llama_model import parallel
from scripts import trainer
from trainer import TrainConfig, open_run
from trainer.config_file import read_yaml
from trainer.data import InstructionSamples, Loader, pretraining_samples

STEPS = 8
RECIPE = dict(lr=0.01, min_lr=0.001, weight_decay=0.1)
OPTIONS = [
    *("--train-iters", str(STEPS), "--seq-length", "24", "--global-batch-size", "8", "--eval-iters", "2"),
    *("--lr", "0.01", "--min-lr", "0.001", "--lr-warmup-iters", "2", "--weight-decay", "0.1"),
    *("--adam-beta2", "0.95", "--adam-eps", "1e-6", "--clip-grad", "0.5", "--split", "80,20,0", "--log-interval", "4"),
]
LAYOUTS = {
    "one": ["--micro-batch-size", "4"],
    "tp2": ["--nproc-per-node", "2", "--tensor-model-parallel-size", "2", "--micro-batch-size", "8"],
    "dp2": ["--nproc-per-node", "2", "--micro-batch-size", "2", "--use-distributed-optimizer"],
}


def run_of(workspace, verb, data, name, *options):
    out = workspace / f"{verb}-{name}"
    data = data if isinstance(data, tuple) else (workspace / data,)
    where = ("--data-path", *data, "--load-weights", workspace / "hf", "--output-dir", out)
    done = trainer(verb, *where, *OPTIONS, *options, "--json")
    return open_run(out), done


@pytest.fixture(scope="module")
def runs(workspace):
    return {name: run_of(workspace, "pretrain", "text", name, *options)[0] for name, options in LAYOUTS.items()}


@pytest.fixture(scope="module")
def batches(workspace, runs):
    return pretraining_batches(workspace, runs["one"])


def pretraining_batches(workspace, run):
    """The steps' global batches, read in this process."""
    config = TrainConfig(**read_yaml(run.config_file))
    parallel.initialize()
    try:
        samples, _, _ = pretraining_samples(config, vocab_size=10**6, eod_token_id=2, cache=workspace / "cache")
        return global_batches(samples)
    finally:
        parallel.destroy()


def global_batches(samples):
    whole = Loader(samples=samples, vocab_size=10**6, micro_batch_size=8, num_microbatches=1, dp_rank=0, dp_size=1)
    return [(batch.tokens, batch.labels) for step in range(STEPS) for batch in whole.step(step * 8)]


def reference_run(workspace, batches, shift=0):
    rules = dict(warmup=2, betas=(0.9, 0.95), eps=1e-6, clip=0.5, shift=shift)
    return reference.train(workspace / "hf", batches, **RECIPE, **rules)


def column(run, name):
    return np.array([line[name] for line in run.metrics()])


def weights(path):
    with open_checkpoint(path) as checkpoint:
        return {name: np.array(checkpoint.read(name), np.float64) for name in checkpoint.names()}


def assert_equal_runs(run, losses, norms):
    np.testing.assert_allclose(column(run, "loss"), losses, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(column(run, "grad_norm"), norms, rtol=2e-5)


def test_every_layout_trains_as_hugging_face_does(workspace, runs, batches, tmp_path):
    losses, norms, model = reference_run(workspace, batches)
    assert losses[-1] < losses[0] - 0.3, "the model has to learn, or the comparison shows nothing"
    model.save_pretrained(tmp_path)
    expected = weights(tmp_path)
    for run in runs.values():
        assert_equal_runs(run, losses, norms)
        for name, value in weights(run.path).items():
            np.testing.assert_allclose(value, expected[name], atol=2e-5, err_msg=f"{run.path.name} {name}")


def test_the_comparison_notices_labels_that_are_not_shifted(workspace, runs, batches):
    losses, norms, _ = reference_run(workspace, batches, shift=1)
    with pytest.raises(AssertionError):
        assert_equal_runs(runs["tp2"], losses, norms)


def test_a_blend_is_the_same_on_every_rank(workspace, runs):
    prepare([workspace / "text.jsonl"], workspace / "again", tokenizer=workspace / "hf")
    data = ("0.25", workspace / "text", "0.75", workspace / "again")
    run, _ = run_of(workspace, "pretrain", data, "blend", *LAYOUTS["dp2"])
    losses, norms, _ = reference_run(workspace, pretraining_batches(workspace, run))
    assert_equal_runs(run, losses, norms)
    assert abs(losses[-1] - column(runs["dp2"], "loss")[-1]) > 1e-3, "one data set alone has to differ"


def test_schedule_and_counts_stand_in_the_metrics(runs):
    for run in runs.values():
        assert column(run, "step").tolist() == list(range(1, STEPS + 1))
        assert column(run, "consumed_samples")[-1] == STEPS * 8
        assert set(column(run, "loss_tokens")) == {8 * 24}
        rule = dict(warmup=2, steps=STEPS, lr=0.01, min_lr=0.001)
        expected = [reference.learning_rate(step, **rule) for step in range(STEPS)]
        np.testing.assert_allclose(column(run, "lr"), expected, rtol=1e-6)
    valid = [run.metrics()[-1]["valid_loss"] for run in runs.values()]
    np.testing.assert_allclose(valid, valid[0], rtol=1e-5)


def test_a_checkpoint_is_a_whole_model(workspace, runs):
    folder = runs["tp2"].checkpoint(STEPS)
    written = json.loads((folder / "config.json").read_text("utf-8"))
    source = json.loads((workspace / "hf" / "config.json").read_text("utf-8"))
    for key in ("vocab_size", "hidden_size", "num_key_value_heads", "rms_norm_eps", "intermediate_size"):
        assert written[key] == source[key]
    assert (folder / "tokenizer.model").read_bytes() == (workspace / "hf" / "tokenizer.model").read_bytes()


def test_fine_tuning_takes_the_loss_of_the_answers_only(workspace):
    options = ("--nproc-per-node", "2", "--micro-batch-size", "4", "--seq-length", "200")
    run, done = run_of(workspace, "finetune", "tune", "dp2", *options)
    samples = InstructionSamples(workspace / "tune", 200, 2, 1234)
    expected = global_batches(samples)
    losses, norms, _ = reference_run(workspace, expected)
    assert_equal_runs(run, losses, norms)
    answered = [int((labels != -100).sum()) for _, labels in expected]
    assert column(run, "loss_tokens").tolist() == answered
    assert 0 < answered[0] < 8 * 200 / 3
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: --split has no effect: it is for pretraining"]
    assert "kernels  on cpu: " in done.stderr
    assert "attention by F.scaled_dot_product_attention" in done.stderr


def test_rows_that_are_too_long_are_counted(workspace):
    assert InstructionSamples(workspace / "tune", 16, 2, seed=5).num_cut == 50
    assert InstructionSamples(workspace / "tune", 250, 2, seed=5).num_cut == 0


def test_each_epoch_sees_every_row_once_in_another_order(workspace):
    samples = InstructionSamples(workspace / "tune", 16, 2, seed=5)
    first, second = ([samples._row(epoch * len(samples) + at) for at in range(len(samples))] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(len(samples)))
    assert first != second


def test_tokens_outside_the_vocabulary_are_refused(workspace):
    samples = InstructionSamples(workspace / "tune", 16, 2, seed=5)
    loader = Loader(samples=samples, vocab_size=40, micro_batch_size=2, num_microbatches=1, dp_rank=0, dp_size=1)
    with pytest.raises(Exception, match="vocabulary has 40 entries"):
        next(loader.step(0))


REFUSED = {
    "a world that does not divide": (
        ["--tensor-model-parallel-size", "3", "--nproc-per-node", "2"], 2, "do not divide",
    ),
    "more tensor parallelism than heads": (
        ["--tensor-model-parallel-size", "4", "--nproc-per-node", "4"], 2, "key/value heads",
    ),
    "samples longer than the positions": (["--seq-length", "257"], 2, "256 positions"),
    "data that is not there": (["--data-path", "nowhere"], 2, "no such data set"),
    "weights that are not there": (["--load-weights", "nowhere"], 1, "nowhere"),
    "no text for validation": (["--split", "999,1,0"], 2, "no text for validation of the 200 documents"),
    "no text for training": (["--split", "1,999,0"], 2, "no text for training of the 200 documents"),
    "a batch that does not divide": (["--global-batch-size", "7", "--micro-batch-size", "2"], 2, "no multiple"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_one_line_and_writes_nothing(workspace, tmp_path, case):
    options, code, words = REFUSED[case]
    where = ("--data-path", workspace / "text", "--load-weights", workspace / "hf", "--output-dir", tmp_path / "run")
    done = trainer("pretrain", *where, *OPTIONS, *options, code=code)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert not (tmp_path / "run").exists()


def test_data_of_another_vocabulary_is_refused(workspace, tmp_path):
    other = tmp_path / "text_text_document"
    for suffix in (".bin", ".idx", ".manifest.json"):
        content = (workspace / f"text_text_document{suffix}").read_bytes()
        (tmp_path / f"{other.name}{suffix}").write_bytes(content)
    manifest = tmp_path / f"{other.name}.manifest.json"
    facts = json.loads(manifest.read_text("utf-8"))
    manifest.write_text(json.dumps(facts | {"vocab_sha256": "0" * 64}), "utf-8")
    where = ("--data-path", other, "--load-weights", workspace / "hf", "--output-dir", tmp_path / "run")
    done = trainer("pretrain", *where, *OPTIONS, code=2)
    assert "another vocabulary" in done.stderr


def test_a_run_is_not_replaced_unasked(workspace, runs):
    where = ("--data-path", workspace / "text", "--load-weights", workspace / "hf", "--output-dir", runs["one"].path)
    assert "--overwrite" in trainer("pretrain", *where, *OPTIONS, code=2).stderr
    assert len(runs["one"].metrics()) == STEPS


def test_a_run_never_replaces_what_it_reads(workspace, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["one"].path, run)
    for weights_from, data in ((run, workspace / "text"), (workspace / "hf", run / "text")):
        where = ("--data-path", data, "--load-weights", weights_from, "--output-dir", run, "--overwrite")
        if data.parent == run:
            prepare([workspace / "text.jsonl"], data, tokenizer=workspace / "hf", append_eod=True)
        said = trainer("pretrain", *where, *OPTIONS, code=2).stderr
        assert said.count("\n") == 1
        assert "which the run would replace" in said
    assert len(open_run(run).metrics()) == STEPS


def test_a_small_corpus_trains_with_the_default_split_or_says_why_not(workspace, tmp_path):
    lines = (workspace / "text.jsonl").read_text("utf-8").splitlines()[:20]
    (tmp_path / "few.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    prepare([tmp_path / "few.jsonl"], tmp_path / "few", tokenizer=workspace / "hf", append_eod=True)
    where = ("--data-path", tmp_path / "few", "--load-weights", workspace / "hf", "--output-dir", tmp_path / "run")
    options = [*OPTIONS, "--train-iters", "1", "--split", "949,50,1"]  # 19, 1 and 0 documents
    trainer("pretrain", *where, *options, "--lr-warmup-iters", "0")
    assert "valid_loss" in open_run(tmp_path / "run").metrics()[-1]


def test_steps_without_a_loss_are_no_training(workspace, tmp_path):
    where = ("--data-path", workspace / "tune", "--load-weights", workspace / "hf", "--output-dir", tmp_path / "run")
    said = trainer("finetune", *where, *OPTIONS, "--seq-length", "8", code=1).stderr
    assert "step 1 has no token with a loss" in said
    assert "--seq-length 8" in said


def test_describe_counts_what_the_model_holds(workspace):
    where = ("--data-path", workspace / "text", "--load-weights", workspace / "hf", "--output-dir", "unused")
    layout = ("--nproc-per-node", "2", "--tensor-model-parallel-size", "2", "--json")
    said = json.loads(trainer("describe", *where, *OPTIONS, *layout).stdout)
    total = sum(value.size for value in weights(workspace / "hf").values())
    assert said["parameters"] == total
    assert total / 2 < said["parameters_per_rank"] < total * 0.6
    assert said["tokens_per_step"] == 8 * 24


def test_a_loss_that_is_no_number_stops_the_run(workspace, tmp_path):
    where = ("--data-path", workspace / "text", "--load-weights", workspace / "hf", "--output-dir", tmp_path / "run")
    done = trainer("pretrain", *where, *OPTIONS, "--lr", "1e30", "--min-lr", "1e30", "--clip-grad", "0", code=1)
    assert "the gradient of step" in done.stderr or "the loss of step" in done.stderr
    assert torch.isfinite(torch.tensor([line["loss"] for line in open_run(tmp_path / "run").metrics()])).all()
    assert not (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").exists()
