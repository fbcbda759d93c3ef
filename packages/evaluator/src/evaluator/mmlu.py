"""MMLU's questions from its CSV files, and its prompts."""

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluator.errors import EvaluationError, UsageError

LETTERS = "ABCD"


@dataclass(frozen=True, slots=True)
class Question:
    """One row: the question, four options, the right letter."""

    subject: str
    index: int
    text: str
    options: tuple[str, str, str, str]
    answer: str


def read_questions(folder: Path, split: str, subjects: Sequence[str] = ()) -> dict[str, list[Question]]:
    """Subject to questions, in the order of the subjects' names.

    Args:
        folder: Holds `{split}/{subject}_{split}.csv`, or those files themselves.
        split: "test" or "dev".
        subjects: Which ones; all of them unless given.

    Raises:
        EvaluationError: There are no such files, or a row is broken (file and line are named).
        UsageError: A subject is not there; the nearest is named.
    """
    if not folder.is_dir():
        raise EvaluationError(f"no such folder: {folder}")
    home = folder / split if (folder / split).is_dir() else folder
    files = {path.name.removesuffix(f"_{split}.csv"): path for path in sorted(home.glob(f"*_{split}.csv"))}
    if not files and split == "test":
        raise EvaluationError(f"{folder} holds no *_{split}.csv files")
    for name in subjects:
        if name not in files and split == "test":
            near = difflib.get_close_matches(name, files, 1)
            raise UsageError(f"unknown subject {name!r}" + (f"; perhaps you meant {near[0]!r}" if near else ""))
    return {name: _rows(path, name) for name, path in files.items() if not subjects or name in subjects}


def _rows(path: Path, subject: str) -> list[Question]:
    questions = []
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines)
        for index, row in enumerate(rows):
            if len(row) != 6 or row[5] not in tuple(LETTERS):
                raise EvaluationError(
                    f"{path}, line {rows.line_num}: a row is a question, four options and one of {LETTERS}; no header"
                )
            questions.append(Question(subject, index, row[0], (row[1], row[2], row[3], row[4]), row[5]))
    return questions


def letter_prompt(question: Question, shots: Sequence[Question]) -> str:
    """MMLU's own prompt, up to "Answer:": a header with the subject, the examples, the question."""
    header = (
        f"The following are multiple choice questions (with answers) about {question.subject.replace('_', ' ')}.\n\n"
    )
    examples = "".join(f"{_block(shot)} {shot.answer}\n\n" for shot in shots)
    return header + examples + _block(question)


def _block(question: Question) -> str:
    options = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=True))
    return f"{question.text}{options}\nAnswer:"
