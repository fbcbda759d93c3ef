"""The `evaluator` console script: its verbs, and nothing of what they do."""

import json as jsonlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from ckpt_tools import commandline

Benchmark = Annotated[Literal["mmlu"], tyro.conf.Positional]
Model = Annotated[Path, tyro.conf.Positional]
Reports = Annotated[list[Path], tyro.conf.Positional]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `evaluator VERB ...`."""
    commands: dict[str, Callable[..., int]] = {"run": run, "show": show}
    return commandline.run("evaluator", "Asks a LLaMA model questions.", commands, argv)


def run(
    *,
    benchmark: Benchmark,
    model: Model,
    task_data_path: Path,
    output: Path,
    protocol: Literal["letter", "perplexity"] = "letter",
    subjects: list[str] = [],  # noqa: B006  (the parser shows it; it is never changed)
    num_few_shot: int = 5,
    prompt_template: str = "none",
    tokenizer_name_or_path: Path | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    device: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> int:
    """Asks a benchmark's questions and writes a report.

    Args:
        benchmark: mmlu.
        model: Any folder that `ckpt-tools inspect` recognises.
        task_data_path: Folder of the benchmark's files.
        output: The report to write.
        protocol: letter: the likeliest of A to D. perplexity: the likeliest of the answers' texts.
        subjects: Which; all unless given.
        num_few_shot: Examples before a question (letter).
        prompt_template: general-instruction, or none (perplexity).
        tokenizer_name_or_path: Hugging Face folder, where the model has no tokenizer.
        batch_size: Rows at a time.
        limit: The first questions of each subject only.
        device: npu, cuda or cpu.
        overwrite: Replace the report.
        json: Print the result as JSON.
    """
    from evaluator.errors import EvaluationError

    if output.exists() and not overwrite:
        raise EvaluationError(f"{output} exists: give --overwrite to replace it, or choose another --output")
    if not output.absolute().parent.is_dir():
        raise EvaluationError(f"{output.parent} is no folder: the report cannot be written there")
    from data_prep import Tokenizer
    from llama_model import load_model

    from evaluator.evaluation import evaluate

    network = load_model(model, device=device)
    report = evaluate(
        network,
        task_data_path,
        protocol=protocol,
        tokenizer=Tokenizer.find(model, tokenizer_name_or_path),
        subjects=subjects,
        num_few_shot=num_few_shot,
        prompt_template=prompt_template,
        batch_size=batch_size,
        limit=limit,
        name=str(model),
    )
    report.write(output)
    facts = {"accuracy": report.accuracy, "questions": len(report.questions), "p_value": report.p_value}
    print(jsonlib.dumps(facts) if json else report.table())
    return 0


def show(*, reports: Reports, json: bool = False) -> int:
    """Shows the accuracy that reports hold.

    Args:
        reports: Files that `run` wrote.
        json: Print it as JSON.
    """
    from evaluator.errors import EvaluationError

    rows = []
    for path in reports:
        try:
            content = jsonlib.loads(path.read_text("utf-8"))
            rows.append({"report": str(path), "protocol": content["protocol"], "accuracy": content["accuracy"]})
        except (jsonlib.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path} is no report: {error}") from None
    print(
        jsonlib.dumps(rows) if json else "\n".join(f"{r['report']}  {r['protocol']}  {r['accuracy']:.1%}" for r in rows)
    )
    return 0
