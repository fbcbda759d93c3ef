"""Asks a model a benchmark's questions by one of the protocols."""

import difflib
import hashlib
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from data_prep import Tokenizer
from data_prep.templates import Template

from evaluator.errors import EvaluationError, UsageError
from evaluator.mmlu import DEFAULT_FEW_SHOT, LETTERS, PROTOCOLS, Asked, Question, ask, read_questions, template_named
from evaluator.reports import Report
from evaluator.scoring import Request, loglikelihoods

_PACKAGES = ("puna-evaluator", "puna-llama-model", "puna-npu-kernels", "puna-ckpt-tools", "puna-data-prep", "torch")


def evaluate(
    model: Callable[..., Any],
    task_data_path: str | Path,
    *,
    protocol: str,
    tokenizer: str | Path | Tokenizer,
    subjects: Sequence[str] = (),
    num_few_shot: int | None = None,
    prompt_template: str = "none",
    batch_size: int = 32,
    limit: int | None = None,
    name: str = "",
    progress: bool = True,
) -> Report:
    """The report of MMLU's questions.

    Where a prompt with all its examples is longer than the model's positions, it has as many of the first examples as
    fit; each question's number of them is in the report.

    Args:
        model: Called with ids [b, s], gives logits [b, s, v], like LlamaModel.
        task_data_path: Folder of MMLU's CSV files: `test/{subject}_test.csv` and `dev/{subject}_dev.csv`.
        protocol: "letter": MMLU's prompt, the likeliest of the letters. "perplexity": the option whose text has the
            highest mean token log-probability after the question. See `evaluator.mmlu.ask`.
        tokenizer: The model's, or where it lies.
        subjects: Which; all unless given.
        num_few_shot: Examples before a question (letter), from the dev files; 5 unless given.
        prompt_template: What stands around a question: a name of `data_prep.templates`, or "none".
        batch_size: Rows at a time; the results do not depend on it.
        limit: The first questions of each subject only.
        name: What the report calls the model: its path, say.
        progress: Show a bar on stderr, where that is a terminal.

    Raises:
        EvaluationError: The questions are missing or broken, do not fit the model, or get scores that are no numbers.
        UsageError: No such protocol or subject, or options that contradict each other.
    """
    num_few_shot = _check(protocol, num_few_shot, batch_size, limit)
    template = template_named(prompt_template)
    encoder = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.find(tokenizer)
    _check_vocabulary(model, encoder)
    folder = Path(task_data_path)
    questions = [question for rows in read_questions(folder, "test", subjects).values() for question in rows[:limit]]
    if not questions:
        raise EvaluationError(f"{folder} holds no questions")
    shots = _shots(folder, questions, num_few_shot)
    longest = getattr(getattr(model, "architecture", None), "max_position_embeddings", None)
    asked = [_ask(encoder, question, shots[question.subject], protocol, template, longest) for question in questions]
    requests = [request for each in asked for request in each.requests]
    found = loglikelihoods(model, requests, batch_size=batch_size, progress=progress)
    rows = []
    for at, (question, each) in enumerate(zip(questions, asked, strict=True)):
        four = found[len(LETTERS) * at : len(LETTERS) * (at + 1)]
        rows.append(_row(question, each, [_score(tokens, protocol) for tokens in four]))
    return Report(
        protocol=protocol,
        questions=rows,
        model=_model_facts(model, encoder, name),
        settings={
            "task_data_path": str(folder),
            "subjects": sorted(shots),
            "num_few_shot": num_few_shot,
            "prompt_template": prompt_template,
            "batch_size": batch_size,
            "limit": limit,
        },
        versions={"python": platform.python_version()} | {package: metadata.version(package) for package in _PACKAGES},
    )


def _check(protocol: str, num_few_shot: int | None, batch_size: int, limit: int | None) -> int:
    """The number of examples, once the options make sense."""
    if protocol not in PROTOCOLS:
        near = difflib.get_close_matches(protocol, PROTOCOLS, 1)
        advice = f"perhaps you meant {near[0]!r}" if near else f"there are {' and '.join(PROTOCOLS)}"
        raise UsageError(f"unknown protocol {protocol!r}: {advice}")
    if protocol == "perplexity" and num_few_shot:
        raise UsageError(f"--num-few-shot {num_few_shot}: examples belong to the letter protocol")
    if batch_size < 1 or (limit is not None and limit < 1) or (num_few_shot or 0) < 0:
        raise UsageError(f"--batch-size {batch_size}, --limit {limit}, --num-few-shot {num_few_shot}: too small")
    return DEFAULT_FEW_SHOT[protocol] if num_few_shot is None else num_few_shot


def _check_vocabulary(model: Callable[..., Any], tokenizer: Tokenizer) -> None:
    vocab_size = getattr(getattr(model, "architecture", None), "vocab_size", tokenizer.vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise EvaluationError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, the model only {vocab_size}: it is not the model's"
        )


def _shots(folder: Path, questions: Sequence[Question], num_few_shot: int) -> dict[str, list[Question]]:
    names = list(dict.fromkeys(question.subject for question in questions))
    if not num_few_shot:
        return {name: [] for name in names}
    try:
        found = read_questions(folder, "dev", names)
    except UsageError as error:
        raise EvaluationError(f"{error} (--num-few-shot 0 asks without examples)") from None
    for name in names:
        if len(found[name]) < num_few_shot:
            there = len(found[name])
            raise EvaluationError(f"{folder} has {there} examples of {name!r}, not {num_few_shot}: give --num-few-shot")
    return {name: found[name][:num_few_shot] for name in names}


class _Encoded:
    """What is asked about one question, in ids."""

    def __init__(self, asked: Asked, tokenizer: Tokenizer, num_few_shot: int) -> None:
        self.prompt_sha256 = hashlib.sha256(asked.prompt.encode()).hexdigest()
        self.num_few_shot = num_few_shot
        context = tokenizer.encode(asked.prompt)
        wholes = [tokenizer.encode(asked.prompt + continuation) for continuation in asked.continuations]
        self.requests = [_request(context, whole) for whole in wholes]
        self.length = max(map(len, wholes)) - 1  # the last token is never fed to the model


def _request(context: list[int], whole: list[int]) -> Request:
    """Prompt and continuation were tokenized together: a piece that spans the border belongs to the continuation."""
    same = (a == b for a, b in zip(context, whole[:-1], strict=False))
    border = sum(takewhile(bool, same))
    # the four requests of a question share one list: over all of MMLU that is hundreds of megabytes
    return (context if border == len(context) else whole[:border]), whole[border:]


def _ask(
    tokenizer: Tokenizer,
    question: Question,
    shots: Sequence[Question],
    protocol: str,
    template: Template | None,
    longest: int | None,
) -> _Encoded:
    for count in range(len(shots), -1, -1):
        encoded = _Encoded(ask(question, shots[:count], protocol, template), tokenizer, count)
        if longest is None or encoded.length <= longest:
            return encoded
    raise EvaluationError(f"{question.where}: {encoded.length} tokens, but the model has {longest} positions")


def _score(logprobs: Sequence[float], protocol: str) -> float:
    total = sum(logprobs)
    if not math.isfinite(total):
        raise EvaluationError(f"a score is {total}: the model computes no numbers; try another --dtype")
    return total if protocol == "letter" else total / len(logprobs)


def _row(question: Question, asked: _Encoded, scores: Sequence[float]) -> dict[str, Any]:
    by_letter = dict(zip(LETTERS, scores, strict=True))
    return {
        "subject": question.subject,
        "index": question.index,
        "prompt_sha256": asked.prompt_sha256,
        "num_few_shot": asked.num_few_shot,
        "logprobs": by_letter,
        "prediction": max(by_letter, key=lambda letter: by_letter[letter]),
        "answer": question.answer,
    }


def _model_facts(model: Callable[..., Any], tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"path": name, "vocab_sha256": tokenizer.vocab_sha256}
    architecture = getattr(model, "architecture", None)
    if is_dataclass(architecture) and not isinstance(architecture, type):
        facts["architecture"] = asdict(architecture)
    if isinstance(model, torch.nn.Module):
        parameters = list(model.parameters())
        facts["parameters"] = sum(parameter.numel() for parameter in parameters)
        facts["dtype"] = str(parameters[0].dtype).removeprefix("torch.")
        facts["device"] = str(parameters[0].device)
    return facts
