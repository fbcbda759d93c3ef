"""Asks a model a benchmark's questions by one of the protocols."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from data_prep import Tokenizer, templates

from evaluator.errors import EvaluationError
from evaluator.mmlu import LETTERS, Question, letter_prompt, read_questions
from evaluator.reports import Report
from evaluator.scoring import Request, loglikelihoods

Protocol = Literal["letter", "perplexity"]


def evaluate(
    model: Callable[..., Any],
    task_data_path: str | Path,
    *,
    protocol: Protocol,
    tokenizer: str | Path | Tokenizer,
    subjects: Sequence[str] = (),
    num_few_shot: int = 5,
    prompt_template: str = "none",
    batch_size: int = 32,
    limit: int | None = None,
    name: str = "",
) -> Report:
    """The report of MMLU's questions.

    Args:
        model: Called with ids [b, s], gives logits [b, s, v], like LlamaModel.
        task_data_path: Folder of MMLU's CSV files.
        protocol: "letter": MMLU's prompt, the likeliest of the letters. "perplexity": the option whose text has the
            highest mean token log-probability after the question.
        tokenizer: The model's.
        subjects: Which; all unless given.
        num_few_shot: Examples before a question (letter), from the dev files.
        prompt_template: What stands around a question (perplexity): a name of data_prep.templates, or "none".
        batch_size: Rows at a time; the results do not depend on it.
        limit: The first questions of each subject only.
        name: The model's name in the report.

    Raises:
        EvaluationError: The questions are missing or broken.
    """
    encoder = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.find(tokenizer)
    folder = Path(task_data_path)
    asked = [question for rows in read_questions(folder, "test", subjects).values() for question in rows[:limit]]
    if not asked:
        raise EvaluationError(f"{folder} holds no questions")
    shots = read_questions(folder, "dev", subjects) if protocol == "letter" and num_few_shot else {}
    prompts = [
        letter_prompt(question, shots.get(question.subject, [])[:num_few_shot])
        if protocol == "letter"
        else _question_prompt(question, prompt_template)
        for question in asked
    ]
    requests = [
        request
        for prompt, question in zip(prompts, asked, strict=True)
        for request in _requests(
            encoder, prompt, [f" {x}" for x in LETTERS] if protocol == "letter" else question.options
        )
    ]
    means = [sum(scores) / len(scores) for scores in loglikelihoods(model, requests, batch_size)]
    rows = [
        _row(question, prompt, means[4 * at : 4 * at + 4])
        for at, (question, prompt) in enumerate(zip(asked, prompts, strict=True))
    ]
    return Report(protocol=protocol, model=name, questions=rows)


def _question_prompt(question: Question, template: str) -> str:
    return f"{question.text}\n" if template == "none" else templates.get(template).prompt(question.text)


def _requests(encoder: Tokenizer, prompt: str, options: Sequence[str]) -> list[Request]:
    """Contexts and continuations, tokenized together: a piece may span the border, which then belongs to the answer."""
    requests = []
    for option in options:
        context, whole = encoder.encode(prompt), encoder.encode(prompt + option)
        same = next((at for at, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), len(context))
        border = min(same, len(whole) - 1)
        requests.append((whole[:border], whole[border:]))
    return requests


def _row(question: Question, prompt: str, means: Sequence[float]) -> dict[str, Any]:
    scores = dict(zip(LETTERS, means, strict=True))
    return {
        "subject": question.subject,
        "index": question.index,
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "logprobs": scores,
        "prediction": max(scores, key=lambda letter: scores[letter]),
        "answer": question.answer,
    }
