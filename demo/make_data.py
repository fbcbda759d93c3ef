"""Writes the demo's raw data from what Python ships: prose to pretrain on, instructions that teach facts, questions.

    python demo/make_data.py OUT

OUT/corpus.jsonl          one document a line, key "text"; the last tenth is held out whole (OUT/split.txt)
OUT/instructions.parquet  Alpaca's schema: instruction, input, output, text
OUT/mmlu/{dev,test}/      MMLU's CSV layout, in wordings that the instructions do not use
OUT/split.txt             documents for training, validation and test, as the trainer's --split takes them

The same Python, C library and time zone tables give the same bytes.
"""

import ast
import csv
import json
import random
import re
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from facts import SUBJECTS, Fact, Subject

SEED = 20
NUM_DEV = 5
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
Row = dict[str, str]
Question = list[str]


def documents() -> list[str]:
    """Real English: Python's reference topics, its modules' docstrings, its licence."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [topics[name] for name in sorted(topics)]
    for path in sorted(library.glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text("utf-8")))
        if text and len(text) > 200:
            texts.append(text)
    if (licence := library / "LICENSE.txt").exists():
        texts.append(licence.read_text("utf-8"))
    clean = [re.sub(r"\n{3,}", "\n\n", text.replace("\r", "").replace("\f", "")).strip() for text in texts]
    held_out = clean[::10]
    return [text for at, text in enumerate(clean) if at % 10] + held_out


def alpaca_row(instruction: str, given: str, output: str) -> Row:
    """One row in Alpaca's schema, `text` being Alpaca's own template."""
    text = ALPACA.format(", paired with an input that provides further context" if given else "")
    text += f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
    return {"instruction": instruction, "input": given, "output": output, "text": f"{text}### Response:\n{output}"}


def question(subject: Subject, fact: Fact, letter: int, answers: list[str], rng: random.Random) -> Question:
    """One row of MMLU's CSV: the question, four options of the same kind in random order, the right letter."""
    key, answer = fact
    options = rng.sample([other for other in answers if other != answer], 3)
    options.insert(letter, answer)
    return [subject.held_out[0].format(key), *options, "ABCD"[letter]]


def make(subject: Subject, rng: random.Random) -> tuple[list[Row], list[Question]]:
    """The instruction rows and the questions of one subject, the right letters balanced."""
    facts = subject.facts()
    rng.shuffle(facts)
    answers = sorted({answer for _, answer in facts})
    letters = [at % 4 for at in range(len(facts))]
    rng.shuffle(letters)
    rows, questions = [], []
    for (key, answer), letter in zip(facts, letters, strict=True):
        questions.append(question(subject, (key, answer), letter, answers, rng))
        rows += [alpaca_row(ask.format(key), given.format(key), answer) for ask, given in subject.training]
    return rows, questions


def write_questions(folder: Path, subject: str, questions: list[Question]) -> None:
    """The first few as examples (dev), the rest as the test."""
    for split, part in ("dev", questions[:NUM_DEV]), ("test", questions[NUM_DEV:]):
        (folder / split).mkdir(parents=True, exist_ok=True)
        with (folder / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(part)


def main(out: Path) -> None:
    """Everything, under `out`."""
    rng, rows, held_out = random.Random(SEED), [], []
    out.mkdir(parents=True, exist_ok=True)
    for subject in SUBJECTS:
        taught, questions = make(subject, rng)
        rows += taught
        held_out += [row[0] for row in questions]
        write_questions(out / "mmlu", subject.name, questions)
        print(f"{subject.name}: {len(taught)} instruction rows, {len(questions) - NUM_DEV} test questions")
    rng.shuffle(rows)
    texts = documents()
    everything = "\n".join([*texts, *(row["text"] for row in rows)])
    if leaked := [ask for ask in held_out if ask in everything]:
        raise SystemExit(f"error: a test question is in the training text: {leaked[0]}")
    (out / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    num_valid = len(range(0, len(texts), 10))
    (out / "split.txt").write_text(f"{len(texts) - num_valid},{num_valid},0\n", "utf-8")
    pq.write_table(pa.Table.from_pylist(rows), out / "instructions.parquet")
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts)} documents of {size:,} bytes, {len(rows)} instruction rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
