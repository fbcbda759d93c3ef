"""The whole road in one go, each step the console command that a user would type: from raw text to an evaluated model.

    python demo/run.py [--quick]

Everything is written under build/demo; build/demo/summary.json has the figures of the table that it ends with.
`--quick` trains a few steps only, under build/demo-quick: the road is passable, it says, not that the model learns.

Exit code 3 where a figure is not what the demo promises.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from data_prep import IndexedDataset, templates

ROOT = Path(__file__).resolve().parent.parent
QUICK = sys.argv[1:] == ["--quick"]
OUT = Path("build/demo-quick" if QUICK else "build/demo")
DATA = OUT / "data"
QUESTION = "What country is the city Lima in?"
PERPLEXITY = ("--protocol", "perplexity", "--prompt-template", "general-instruction")


class Demo:
    """Runs commands from the repository's root, with this interpreter's console scripts, and times them."""

    def __init__(self) -> None:
        self._scripts = Path(sys.executable).parent
        self._began = time.perf_counter()

    def run(self, *command: str | Path) -> str:
        """The stdout of `command`, which is shown too; any exit code but 0 ends the demo."""
        words = [str(word) for word in command]
        print(
            f"\n\033[1m$ {shlex.join(words)}\033[0m" if sys.stdout.isatty() else f"\n$ {shlex.join(words)}", flush=True
        )
        program = sys.executable if words[0] == "python" else str(self._scripts / words[0])
        begin = time.perf_counter()
        done = subprocess.run([program, *words[1:]], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=False)
        print(done.stdout, end="")
        print(f"[{time.perf_counter() - begin:.1f} s]", flush=True)
        if done.returncode:
            raise SystemExit(done.returncode)
        return done.stdout

    @property
    def elapsed_s(self) -> float:
        """Seconds since the demo began."""
        return time.perf_counter() - self._began


def prepare(demo: Demo) -> None:
    """Raw text, tokenizer, random model, indexed data sets."""
    demo.run("python", "demo/make_data.py", DATA)
    demo.run("python", "demo/make_tokenizer.py", DATA, OUT / "tokenizer")
    demo.run("python", "demo/make_model.py", OUT / "tokenizer", OUT / "hf-random")
    tokenizer = ("--tokenizer-name-or-path", OUT / "tokenizer", "--append-eod")
    demo.run("data-prep", "run", "--input", DATA / "corpus.jsonl", *tokenizer, "--output-prefix", DATA / "corpus")
    facts = ("--handler-name", "GeneralInstructionHandler", *tokenizer, "--output-prefix", DATA / "facts")
    demo.run("data-prep", "run", "--input", DATA / "instructions.parquet", *facts)


def train(demo: Demo) -> None:
    """HF weights to Megatron's layout at TP 2, pretraining and fine-tuning on two processes, curves, back to HF."""
    few = ("--train-iters", "6", "--lr-warmup-iters", "1", "--eval-iters", "1") if QUICK else ()
    split = (ROOT / DATA / "split.txt").read_text("utf-8").strip()
    layout = ("--to", "megatron-core", "--tensor-model-parallel-size", "2")
    demo.run("ckpt-tools", "convert", OUT / "hf-random", OUT / "megatron-tp2", *layout)
    demo.run(
        "trainer", "pretrain", "--config", "demo/pretrain.yaml", "--data-path", DATA / "corpus", "--split", split,
        "--load-weights", OUT / "megatron-tp2", "--output-dir", OUT / "pretrained", *few,
    )  # fmt: skip
    demo.run(
        "trainer", "finetune", "--config", "demo/finetune.yaml", "--data-path", DATA / "facts",
        "--load-weights", OUT / "pretrained", "--output-dir", OUT / "tuned", *few,
    )  # fmt: skip
    demo.run("trainer", "report", OUT / "pretrained", OUT / "tuned")
    demo.run("ckpt-tools", "convert", OUT / "tuned", OUT / "hf", "--to", "hf")
    demo.run("ckpt-tools", "verify", OUT / "tuned", OUT / "hf")


def generate(demo: Demo) -> dict[str, Any]:
    """The greedy answer to a question in words that training did not use, and the same from plain transformers."""
    prompt = templates.GENERAL_INSTRUCTION.prompt(QUESTION)
    said = demo.run("llama-model", "generate", OUT / "hf", "--prompt", prompt, "--max-new-tokens", "24", "--json")
    result = {"prompt": prompt, **json.loads(said)}
    (ROOT / OUT / "generated.json").write_text(json.dumps(result), "utf-8")
    demo.run("python", "demo/check_transformers.py", OUT / "hf", OUT / "generated.json")
    return result


def evaluate(demo: Demo, model: Path, report: Path, *protocol: str) -> dict[str, Any]:
    """The evaluation report of `model` on the demo's questions."""
    demo.run("evaluator", "run", "mmlu", model, "--task-data-path", DATA / "mmlu", *protocol, "--output", report)
    content: dict[str, Any] = json.loads((ROOT / report).read_text("utf-8"))
    return content


def unigram_entropy() -> float:
    """Cross-entropy, in nats a token, of the held-out documents under the training documents' token frequencies.

    The floor of a model that knows how often each token occurs and nothing else; counts are smoothed by one.
    """
    num_train = int((ROOT / DATA / "split.txt").read_text("utf-8").split(",")[0])
    documents = IndexedDataset(ROOT / DATA / "corpus_text_document")
    train = np.concatenate([documents[at] for at in range(num_train)])
    held_out = np.concatenate([documents[at] for at in range(num_train, len(documents))])
    counts = np.bincount(train, minlength=int(max(train.max(), held_out.max())) + 1) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


def binomial_tail(hits: int, trials: int, p: float) -> float:
    """The probability of at least `hits` successes by chance."""
    return sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(hits, trials + 1))


def summarize(demo: Demo, before: dict[str, Any], after: dict[str, Any], letters: dict[str, Any]) -> dict[str, Any]:
    """The figures of the whole road."""
    lines = (ROOT / OUT / "pretrained/metrics.jsonl").read_text("utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    questions = len(after["questions"])
    hits = sum(question["prediction"] == question["answer"] for question in after["questions"])
    return {
        "loss_first": steps[0]["loss"],
        "loss_last": steps[-1]["loss"],
        "valid_loss": steps[-1]["valid_loss"],
        "unigram_entropy": unigram_entropy(),
        "tokens_per_second": 2 * sorted(step["tokens_per_second_per_device"] for step in steps)[len(steps) // 2],
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "accuracy_after_letters": letters["accuracy"],
        "questions": questions,
        "p_value": binomial_tail(hits, questions, 0.25),
        "hf_model": str(OUT / "hf"),
        "elapsed_s": demo.elapsed_s,
    }


def failures(summary: dict[str, Any]) -> list[str]:
    """What the demo promises and these figures do not show."""
    checks = {
        "the held-out loss is at least 0.5 nats below the unigram entropy": summary["valid_loss"]
        < summary["unigram_entropy"] - 0.5,
        "at least 200 questions": summary["questions"] >= 200,
        "accuracy after training is above chance with p < 0.001": summary["p_value"] < 0.001,
        "accuracy before training is chance": abs(summary["accuracy_before"] - 0.25) < 0.1,
    }
    return [promise for promise, holds in checks.items() if not holds]


def table(summary: dict[str, Any], answer: str) -> str:
    """What was made, where it lies, and what it can do."""
    rows = [
        ("raw data, tokenizer", f"{DATA}, {OUT / 'tokenizer'}"),
        ("indexed data sets", f"{DATA / 'corpus'}_text_document, {DATA / 'facts'}_packed_..._document"),
        ("Megatron checkpoint, TP 2", str(OUT / "megatron-tp2")),
        ("runs, loss curves", f"{OUT / 'pretrained'}, {OUT / 'tuned'} (loss-curve.png in each)"),
        ("trained model (Hugging Face)", summary["hf_model"]),
        ("loss, first to last step", f"{summary['loss_first']:.2f} -> {summary['loss_last']:.2f}"),
        ("loss on held-out prose", f"{summary['valid_loss']:.2f} (unigram entropy {summary['unigram_entropy']:.2f})"),
        ("pretraining speed", f"{summary['tokens_per_second']:,.0f} tokens/s on two processes"),
        ("accuracy before", f"{summary['accuracy_before']:.1%} of {summary['questions']} questions (chance 25 %)"),
        ("accuracy after", f"{summary['accuracy_after']:.1%} (p = {summary['p_value']:.1e})"),
        (
            "accuracy after, by letters",
            f"{summary['accuracy_after_letters']:.1%} (small models learn facts, not letters)",
        ),
        (QUESTION, answer),
        ("time", f"{summary['elapsed_s']:.0f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main(arguments: Sequence[str]) -> int:
    """The road from its beginning: what an older one wrote is removed."""
    if arguments and not QUICK:
        print("usage: python demo/run.py [--quick]", file=sys.stderr)
        return 2
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    demo = Demo()
    prepare(demo)
    before = evaluate(demo, OUT / "hf-random", OUT / "before.json", *PERPLEXITY)
    train(demo)
    said = generate(demo)
    after = evaluate(demo, OUT / "hf", OUT / "after.json", *PERPLEXITY)
    letters = evaluate(demo, OUT / "hf", OUT / "after-letters.json", "--protocol", "letter")
    summary = summarize(demo, before, after, letters)
    summary |= {"prompt": said["prompt"], "answer_tokens": said["outputs"][0]["tokens"]}
    (ROOT / OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    print("\n" + table(summary, said["outputs"][0]["text"].strip()))
    failed = [] if QUICK else failures(summary)
    for promise in failed:
        print(f"error: not so: {promise}", file=sys.stderr)
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
