"""The packages together: the demo's road with a few steps, and the example pipeline."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build/demo-quick"


@pytest.fixture(scope="module")
def summary():
    subprocess.run([sys.executable, "demo/run.py", "--quick"], cwd=ROOT, check=True)
    return json.loads((OUT / "summary.json").read_text("utf-8"))


def test_the_road_is_passable_in_a_few_steps(summary):
    assert summary["questions"] >= 200
    assert summary["loss_last"] < summary["loss_first"]
    assert 0 < summary["unigram_entropy"] < math.log(2048)
    assert 0.1 < summary["accuracy_before"] < 0.4
    assert summary["answer_tokens"]
    assert (ROOT / summary["hf_model"] / "config.json").exists()


def test_every_run_has_its_curve(summary):
    for run in "pretrained", "tuned":
        picture = (OUT / run / "loss-curve.png").read_bytes()
        assert picture.startswith(b"\x89PNG")


def test_right_letters_are_balanced_and_no_question_is_in_the_training_text(summary):
    report = json.loads((OUT / "after.json").read_text("utf-8"))
    counts = [sum(question["answer"] == letter for question in report["questions"]) for letter in "ABCD"]
    assert max(counts) - min(counts) <= 6


def test_the_example_pipeline_runs(tmp_path, summary):
    inputs = [OUT / "hf-random", OUT / "data/corpus.jsonl", OUT / "data/mmlu"]
    command = [sys.executable, "examples/custom_pipeline.py", *map(str, inputs), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
