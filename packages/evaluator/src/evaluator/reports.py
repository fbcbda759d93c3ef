"""What an evaluation found: a JSON file and a table."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANCE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Every question with its scores, and what follows from them."""

    protocol: str
    model: str
    questions: list[dict[str, Any]]

    @property
    def hits(self) -> int:
        """Right answers."""
        return sum(question["prediction"] == question["answer"] for question in self.questions)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.hits / len(self.questions)

    @property
    def p_value(self) -> float:
        """Probability of at least as many right answers by guessing (exact binomial tail)."""
        n = len(self.questions)
        return sum(math.comb(n, k) * CHANCE**k * (1 - CHANCE) ** (n - k) for k in range(self.hits, n + 1))

    def subjects(self) -> dict[str, dict[str, float]]:
        """Subject to number of questions and accuracy."""
        found: dict[str, list[bool]] = {}
        for question in self.questions:
            found.setdefault(question["subject"], []).append(question["prediction"] == question["answer"])
        return {name: {"questions": len(hits), "accuracy": sum(hits) / len(hits)} for name, hits in found.items()}

    def to_json(self) -> dict[str, Any]:
        """The report's file."""
        return {
            "protocol": self.protocol,
            "model": self.model,
            "accuracy": self.accuracy,
            "p_value": self.p_value,
            "subjects": self.subjects(),
            "questions": self.questions,
        }

    def write(self, path: Path) -> None:
        """Writes the file; it appears whole."""
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(self.to_json()) + "\n", "utf-8")
        part.replace(path)

    def table(self) -> str:
        """One line a subject, and the total."""
        rows = [(name, f"{row['questions']:.0f}", f"{row['accuracy']:.1%}") for name, row in self.subjects().items()]
        rows.append(("total", str(len(self.questions)), f"{self.accuracy:.1%} (p against chance {self.p_value:.1e})"))
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{name:<{width}}  {count:>6}  {share}" for name, count, share in rows)
