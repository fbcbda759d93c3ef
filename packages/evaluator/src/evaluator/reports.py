"""What an evaluation found: a JSON file and a table."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
NUM_OPTIONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Every question with its scores, and what follows from them."""

    benchmark: str = "mmlu"
    protocol: str
    questions: list[dict[str, Any]]
    """One a question: subject, index (the row in the subject's file, from 0), prompt_sha256 (of the prompt's UTF-8
    bytes), num_few_shot, logprobs (letter to nats: `letter` the log-probability of the letter, `perplexity` the mean
    over the tokens of the option's text), prediction (the likeliest; of equals the first), answer."""
    model: dict[str, Any] = field(default_factory=dict)
    """Where it came from, its architecture, type, place and size."""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def num_questions(self) -> int:
        """How many were asked."""
        return len(self.questions)

    @property
    def num_correct(self) -> int:
        """How many were answered rightly."""
        return sum(map(_is_correct, self.questions))

    @property
    def accuracy(self) -> float:
        """Share of right answers over all questions."""
        return self.num_correct / self.num_questions

    @property
    def standard_error(self) -> float:
        """Of the accuracy: sqrt(accuracy (1 - accuracy) / questions)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.num_questions)

    @property
    def p_value(self) -> float:
        """Probability of at least as many right answers by guessing among four."""
        return guessing_tail(self.num_correct, self.num_questions, NUM_OPTIONS)

    @property
    def subjects(self) -> dict[str, dict[str, float]]:
        """Subject to num_questions, num_correct and accuracy."""
        found: dict[str, list[bool]] = {}
        for question in self.questions:
            found.setdefault(question["subject"], []).append(_is_correct(question))
        return {
            name: {"num_questions": len(right), "num_correct": sum(right), "accuracy": sum(right) / len(right)}
            for name, right in found.items()
        }

    def summary(self) -> dict[str, Any]:
        """The report without its questions."""
        return {
            "format_version": FORMAT_VERSION,
            "benchmark": self.benchmark,
            "protocol": self.protocol,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "num_questions": self.num_questions,
            "num_correct": self.num_correct,
            "chance": 1 / NUM_OPTIONS,
            "p_value": self.p_value,
            "subjects": self.subjects,
            "model": self.model,
            "settings": self.settings,
            "versions": self.versions,
        }

    def to_json(self) -> dict[str, Any]:
        """The report as it is written."""
        return {**self.summary(), "questions": self.questions}

    def write(self, path: Path) -> None:
        """Writes the file; it appears whole, over what is there."""
        part = path.with_name(f".{path.name}.part")
        try:
            with part.open("w", encoding="utf-8") as file:
                json.dump(self.to_json(), file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def table(self) -> str:
        """One line a subject, and the total with what it is worth."""
        rows = [("subject", "questions", "right", "accuracy")]
        for name, row in self.subjects.items():
            rows.append((name, f"{row['num_questions']:,}", f"{row['num_correct']:,}", f"{row['accuracy']:.1%}"))
        rows.append(("total", f"{self.num_questions:,}", f"{self.num_correct:,}", f"{self.accuracy:.1%}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{row[0]:<{widths[0]}}  "
            + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        worth = f"standard error {self.standard_error:.1%}; by guessing (25 %) p = {self.p_value:.2g}"
        return "\n".join([*lines, f"{self.benchmark}, {self.protocol}: {worth}"])


def is_report(path: Path) -> bool:
    """Whether the file is one that `Report.write` wrote, of any version."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and {"format_version", "benchmark", "questions"} <= content.keys()


def _is_correct(question: dict[str, Any]) -> bool:
    return bool(question["prediction"] == question["answer"])


def guessing_tail(num_correct: int, num_questions: int, num_options: int) -> float:
    """The probability of `num_correct` or more right answers of `num_questions` by guessing among `num_options`.

    The binomial tail in whole numbers: exact before the one division at the end, for any number of questions.
    """
    wrong = num_options - 1
    term = math.comb(num_questions, num_correct) * wrong ** (num_questions - num_correct)
    tail: int = 0
    for k in range(num_correct, num_questions + 1):
        tail += term
        term = term * (num_questions - k) // ((k + 1) * wrong)
    return float(tail / num_options**num_questions)
