"""MMLU: questions from its CSV files, and what each protocol asks.

Source: Hendrycks et al., "Measuring Massive Multitask Language Understanding", https://arxiv.org/abs/2009.03300.
"""

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep import templates
from data_prep.templates import Template

from evaluator.errors import EvaluationError, UsageError

LETTERS = "ABCD"
PROTOCOLS = ("letter", "perplexity")
DEFAULT_FEW_SHOT = {"letter": 5, "perplexity": 0}
_LARGEST_CELL = 1 << 24


@dataclass(frozen=True, slots=True)
class Question:
    """One row: the question, four options, the right letter."""

    subject: str
    index: int
    """Number of the row in its file, from 0."""
    where: str
    """File and line, for messages."""
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
    if not files:
        advice = " (--num-few-shot 0 asks without examples)" if split == "dev" else ""
        raise EvaluationError(f"{folder} holds no {split}/*_{split}.csv files{advice}")
    for name in subjects:
        if name not in files:
            near = difflib.get_close_matches(name, files, 1)
            advice = f"perhaps you meant {near[0]!r}" if near else f"{home} has {', '.join(files)}"
            raise UsageError(f"no {split} questions of the subject {name!r}: {advice}")
    return {name: _rows(path, name) for name, path in files.items() if not subjects or name in subjects}


def _rows(path: Path, subject: str) -> list[Question]:
    """The questions of one file. Cells are text as they stand: an option `NA` or `None` too, or an empty one."""
    questions: list[Question] = []
    csv.field_size_limit(_LARGEST_CELL)  # of the process: passages may be longer than the module's 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, strict=True)
        try:
            for row in rows:
                if row:
                    where = f"{path}, line {rows.line_num}"
                    questions.append(_question(subject, len(questions), where, row))
        except csv.Error as error:
            raise EvaluationError(f"{path}, line {rows.line_num} is not CSV: {error}") from None
        except UnicodeDecodeError as error:
            raise EvaluationError(f"{path} is not UTF-8: {error.reason}") from None
    return questions


def _question(subject: str, index: int, where: str, row: list[str]) -> Question:
    if len(row) != 6:
        raise EvaluationError(f"{where} has {len(row)} cells: a row is a question, four options and a letter")
    *options, answer = row[1:]
    if answer not in tuple(LETTERS):
        hint = "the files have no header" if index == 0 else "a letter, not a number" if answer.isdigit() else ""
        raise EvaluationError(
            f"{where}: the answer is {answer!r}, not one of {LETTERS}" + (f" ({hint})" if hint else "")
        )
    a, b, c, d = options
    return Question(subject, index, where, row[0], (a, b, c, d), answer)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the model is asked about one question: which of four continuations is the likeliest after the prompt."""

    prompt: str
    continuations: tuple[str, ...]


def ask(question: Question, shots: Sequence[Question], protocol: str, template: Template | None) -> Asked:
    """One question under a protocol.

    - `letter`: AscendSpeed's prompt for MMLU (see `letter_prompt`), then " A" to " D". Inside a template, that prompt
      is the instruction, and the response is the bare letter.
    - `perplexity`: the question alone, then the text of each option. Inside a template, the question is the instruction
      and the option the response; without one, `Question: {question}`, a newline, `Answer:`, and the option behind a
      space, as lm-evaluation-harness words its cloze form.

    Raises:
        EvaluationError: An option that would be scored is empty.
    """
    if protocol == "letter":
        text, options = letter_prompt(question, shots), tuple(LETTERS)
    else:
        text, options = question.text, question.options
        if "" in options:
            letter = LETTERS[options.index("")]
            raise EvaluationError(f"{question.where}: option {letter} is empty, its likelihood cannot be asked")
    if template is not None:
        return Asked(template.prompt(text), options)
    prompt = text if protocol == "letter" else f"Question: {text}\nAnswer:"
    return Asked(prompt, tuple(f" {option}" for option in options))


def letter_prompt(question: Question, shots: Sequence[Question]) -> str:
    """AscendSpeed's prompt for MMLU, up to "Answer:".

    The header has two spaces before the subject, as in the paper's own code; the examples follow it line by line, and a
    blank line stands only before the question itself. (The paper's code has one behind the header and each example.)
    """
    subject = question.subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about  {subject}."
    examples = [f"{_block(shot)} {shot.answer}" for shot in shots]
    return "\n".join([header, *examples]) + f"\n\n{_block(question)}"


def _block(question: Question) -> str:
    options = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=True))
    return f"{question.text}{options}\nAnswer:"


def template_named(name: str) -> Template | None:
    """The prompt template of that name; None for "none".

    Raises:
        data_prep.errors.UsageError: There is none; the nearest name is in the message.
    """
    return None if name == "none" else templates.get(name)
