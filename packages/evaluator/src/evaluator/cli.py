"""The `evaluator` console script: its verbs, and nothing of what they do."""

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from ckpt_tools import commandline

Benchmark = Annotated[Literal["mmlu"], tyro.conf.Positional]
Model = Annotated[Path, tyro.conf.Positional]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `evaluator VERB ...`."""
    return commandline.run("evaluator", "Asks a LLaMA model questions.", {"run": run}, argv)


def run(
    benchmark: Benchmark,
    model: Model,
    *,
    task_data_path: Path,
    output: Path,
    protocol: Literal["letter", "perplexity"] = "letter",
    subjects: list[str] = [],  # noqa: B006  (the parser shows it; it is never changed)
    num_few_shot: int | None = None,
    prompt_template: str = "none",
    limit: int | None = None,
    batch_size: int = 32,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    device: Literal["npu", "cuda", "cpu"] | None = None,
    tokenizer_name_or_path: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> int:
    """Asks a benchmark's questions and writes a report.

    Example: evaluator run mmlu llama-2-7b-hf --task-data-path mmlu --output report.json

    Args:
        benchmark: mmlu.
        model: A Hugging Face folder, a Megatron checkpoint, or a training run (its latest checkpoint).
        task_data_path: Folder with test/{subject}_test.csv and dev/{subject}_dev.csv.
        output: The report to write.
        protocol: letter: the likeliest of A to D. perplexity: the likeliest of the answers' texts.
        subjects: Which; all unless given.
        num_few_shot: Examples before a question (letter); 5 unless given.
        prompt_template: What stands around each question: none, or general-instruction, as fine-tuning data has it.
        limit: The first questions of each subject only.
        batch_size: Rows at a time; the results do not depend on it.
        dtype: Type to compute in; the checkpoint's unless given.
        device: Where to compute; the machine's accelerator unless given.
        tokenizer_name_or_path: A tokenizer's folder; the model's own unless given.
        overwrite: Replace the report that is there; any other file stays.
        json: Print the result as JSON, without the questions.
    """
    from llama_model import load_tokenizer

    from evaluator.mmlu import read_questions, template_named

    # What cannot work is refused before anything slow.
    _check_output(output, overwrite)
    tokenizer = load_tokenizer(model, tokenizer_name_or_path)
    template_named(prompt_template)
    read_questions(task_data_path, "test", subjects)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)

    from llama_model import load_model

    from evaluator.evaluation import evaluate

    report = evaluate(
        load_model(model, device=device, dtype=dtype),
        task_data_path,
        protocol=protocol,
        tokenizer=tokenizer,
        subjects=subjects,
        num_few_shot=num_few_shot,
        prompt_template=prompt_template,
        batch_size=batch_size,
        limit=limit,
        name=str(model),
    )
    report.write(output)
    print(jsonlib.dumps(report.summary()) if json else report.table())
    return 0


def _check_output(output: Path, overwrite: bool) -> None:
    from evaluator.errors import EvaluationError
    from evaluator.reports import is_report

    if output.is_dir():
        raise EvaluationError(f"{output} is a folder: give --output the name of a file")
    if output.exists() and not overwrite:
        raise EvaluationError(f"{output} exists: give --overwrite to replace it, or choose another --output")
    if output.exists() and not is_report(output):
        raise EvaluationError(f"{output} is no evaluation report: choose another --output")
