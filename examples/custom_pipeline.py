"""The packages as a library, in one process: convert a model, index a text, train ten steps, evaluate.

    python examples/custom_pipeline.py MODEL CORPUS MMLU OUT

MODEL is a Hugging Face folder with its tokenizer, CORPUS a file that data-prep reads (jsonl with a "text" key, say),
MMLU a folder of MMLU's CSV files; everything is written under OUT. `nox -s demo` leaves fitting inputs in build/demo:
hf-random, data/corpus.jsonl and data/mmlu.
"""

import sys
from pathlib import Path

from ckpt_tools import LlamaConfig, convert
from data_prep import prepare
from evaluator import evaluate
from llama_model import load_model
from trainer import TrainConfig, train


def main(model: Path, corpus: Path, mmlu: Path, out: Path) -> None:
    """Each step's result is a folder or a file that other tools of the field open too."""
    print(f"{LlamaConfig.from_hf(model)}")

    convert(model, out / "megatron", to="megatron-core")
    manifest = prepare([corpus], out / "corpus", tokenizer=model, append_eod=True)
    print(f"{manifest.vocab_size} pieces, handler {manifest.handler}")

    run = train(
        TrainConfig(
            data_path=(out / "corpus",),
            load_weights=out / "megatron",
            output_dir=out / "run",
            train_iters=10,
            seq_length=64,
            global_batch_size=4,
            lr=1e-3,
            split="9,1,0",
            eval_iters=2,
        )
    )
    print(f"loss {run.metrics()[0]['loss']:.3f} -> {run.metrics()[-1]['loss']:.3f}")

    report = evaluate(load_model(run.path), mmlu, protocol="perplexity", tokenizer=model, limit=20)
    print(f"accuracy {report.accuracy:.1%}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
