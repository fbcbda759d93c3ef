"""Questions from CSV files, and prompts to the letter."""

import pytest
from conftest import EXAMPLES, QUESTIONS, write_csv
from data_prep import DataError, templates
from evaluator.errors import EvaluationError, UsageError
from evaluator.mmlu import ask, letter_prompt, read_questions, template_named


def test_cells_are_text_as_they_stand(mmlu):
    found = read_questions(mmlu, "test")
    assert list(found) == ["animals", "big_cities"]
    first, second, third = found["big_cities"]
    assert (first.options, first.answer, first.index) == (("Lima", "La Paz", "NA", "Rome"), "B", 0)
    assert second.text == "Which city\nis old?"
    assert second.options[0] == "None"
    assert third.where.endswith("big_cities_test.csv, line 4")
    assert list(read_questions(mmlu, "test", ["animals"])) == ["animals"]


def test_the_files_may_lie_in_the_folder_itself(tmp_path):
    write_csv(tmp_path / "x_test.csv", QUESTIONS["animals"])
    write_csv(tmp_path / "x_dev.csv", EXAMPLES["animals"])
    assert len(read_questions(tmp_path, "test")["x"]) == 1
    assert len(read_questions(tmp_path, "dev")["x"]) == 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"q,a,b,c,d,A\nq,a,b,A\n", r"x_test\.csv, line 2 has 4 cells"),
        (b"q,a,b,c,d,A\nq,a,b,c,d,AB\n", r"line 2: the answer is 'AB', not one of ABCD"),
        (b"q,a,b,c,d,A\nq,a,b,c,d,0\n", r"line 2: .*a letter, not a number"),
        (b"question,A,B,C,D,answer\nq,a,b,c,d,0\n", r"line 1: .*no header"),
        (b"q,a,b,c,d,\n", r"line 1: the answer is ''"),
        (b'q,a,b,c,d,A\n"q,a,b,c,d,A\n', r"line 2 is not CSV"),
        (b"q\xff,a,b,c,d,A\n", r"x_test\.csv is not UTF-8"),
    ],
)
def test_a_broken_row_is_named(tmp_path, content, words):
    (tmp_path / "x_test.csv").write_bytes(content)
    with pytest.raises(EvaluationError, match=words):
        read_questions(tmp_path, "test")


def test_what_is_not_there_is_refused(mmlu, tmp_path):
    with pytest.raises(UsageError, match="perhaps you meant 'big_cities'"):
        read_questions(mmlu, "test", ["big_citys"])
    with pytest.raises(UsageError, match="has animals, big_cities"):
        read_questions(mmlu, "test", ["xyz"])
    with pytest.raises(EvaluationError, match="no such folder"):
        read_questions(tmp_path / "none", "test")
    with pytest.raises(EvaluationError, match="holds no test"):
        read_questions(tmp_path, "test")


def test_the_letter_prompt_is_ascendspeeds(mmlu):
    (question,) = read_questions(mmlu, "test")["animals"]
    shots = read_questions(mmlu, "dev")["animals"]
    own = "What eats grass?\nA. a llama\nB. a condor\nC. a puma\nD. a fish\nAnswer:"
    assert letter_prompt(question, shots[:2]) == (
        "The following are multiple choice questions (with answers) about  animals.\n"
        "Which of the animals is number 0?\nA. one\nB. two\nC. three\nD. four\nAnswer: A\n"
        "Which of the animals is number 1?\nA. one\nB. two\nC. three\nD. four\nAnswer: B\n\n" + own
    )
    (city, *_) = read_questions(mmlu, "test")["big_cities"]
    assert letter_prompt(city, []).startswith(
        "The following are multiple choice questions (with answers) about  big cities.\n\nWhich city is high, then?\n"
    )


def test_what_each_protocol_asks(mmlu):
    (question,) = read_questions(mmlu, "test")["animals"]
    template = templates.GENERAL_INSTRUCTION
    assert template_named("general-instruction") is template
    assert template_named("none") is None
    with pytest.raises(DataError, match="general-instruction"):
        template_named("general")
    letter = letter_prompt(question, [])
    options = ("a llama", "a condor", "a puma", "a fish")
    found = {
        (protocol, used): ask(question, [], protocol, used)
        for protocol in ("letter", "perplexity")
        for used in (None, template)
    }
    assert {key: (asked.prompt, asked.continuations) for key, asked in found.items()} == {
        ("letter", None): (letter, (" A", " B", " C", " D")),
        ("letter", template): (template.prompt(letter), ("A", "B", "C", "D")),
        ("perplexity", None): ("Question: What eats grass?\nAnswer:", tuple(f" {option}" for option in options)),
        ("perplexity", template): (template.prompt("What eats grass?"), options),
    }


def test_an_empty_option_has_no_likelihood(tmp_path):
    write_csv(tmp_path / "x_test.csv", [["q", "a", "", "c", "d", "A"]])
    (question,) = read_questions(tmp_path, "test")["x"]
    assert ask(question, [], "letter", None).prompt
    with pytest.raises(EvaluationError, match="line 1: option B is empty"):
        ask(question, [], "perplexity", None)
