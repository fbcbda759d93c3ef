"""What follows from the answers: shares, the chance of guessing so well, the file."""

import json
import math

import pytest
from evaluator import Report
from evaluator.reports import guessing_tail

SCIPY = {
    (82, 271): 0.02867948281453724,
    (3650, 14042): 0.0034787767389829975,
    (261, 271): 2.0675933123938363e-141,
}
"""scipy.stats.binomtest(right, all, 0.25, alternative="greater").pvalue of scipy 1.17.1."""


def report(*hits):
    """One subject for each (right, all) pair."""
    questions = [
        {"subject": f"s{n}", "index": i, "answer": "A", "prediction": "A" if i < right else "B"}
        for n, (right, total) in enumerate(hits)
        for i in range(total)
    ]
    return Report(protocol="letter", questions=questions)


def test_p_values_by_hand():
    assert guessing_tail(0, 5, 4) == 1
    assert guessing_tail(3, 3, 4) == 1 / 64
    assert guessing_tail(1, 2, 4) == 7 / 16
    assert guessing_tail(5, 5, 2) == 1 / 32


def test_p_values_of_scipy():
    for (right, total), expected in SCIPY.items():
        assert guessing_tail(right, total, 4) == pytest.approx(expected, rel=1e-9)
    assert guessing_tail(14042, 14042, 4) == 0  # too small for a float, not an error


def test_accuracy_is_over_questions_not_subjects():
    found = report((1, 1), (1, 3))
    assert (found.num_correct, found.num_questions, found.accuracy) == (2, 4, 0.5)
    assert found.standard_error == 0.25
    assert found.subjects == {
        "s0": {"num_questions": 1, "num_correct": 1, "accuracy": 1.0},
        "s1": {"num_questions": 3, "num_correct": 1, "accuracy": 1 / 3},
    }
    assert math.isclose(found.p_value, guessing_tail(2, 4, 4))


def test_the_table_has_a_line_for_each_subject():
    lines = report((1, 1), (1, 3)).table().splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["subject", "questions", "right", "accuracy"],
        ["s0", "1", "1", "100.0%"],
        ["s1", "3", "1", "33.3%"],
        ["total", "4", "2", "50.0%"],
    ]
    assert "p = 0.26" in lines[4]


def test_the_file_appears_whole(tmp_path):
    found, path = report((1, 2)), tmp_path / "report.json"
    found.write(path)
    content = json.loads(path.read_text("utf-8"))
    assert content == found.to_json()
    broken = Report(protocol="letter", questions=found.questions, model={"path": object()})
    with pytest.raises(TypeError):
        broken.write(path)
    assert json.loads(path.read_text("utf-8")) == content
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]
