"""Scores against transformers, reports, and what is refused."""

import math

import pytest
import torch
from evaluator import EvaluationError, Report
from evaluator.mmlu import letter_prompt, read_questions
from evaluator.scoring import loglikelihoods
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def hf():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.3, **sizes)).eval()


def model(hf):
    return lambda tokens: hf(tokens).logits


REQUESTS = [([1, 5, 9], [7, 8]), ([1], [3]), ([1, 2, 3, 4, 5, 6], [9, 9, 9]), ([1, 9], [60])]


def by_hand(hf, context, continuation):
    labels = torch.tensor([[-100] * len(context) + continuation])
    return -hf(torch.tensor([context + continuation]), labels=labels).loss.item() * len(continuation)


@torch.no_grad()
def test_scores_equal_transformers_whatever_the_batch(hf):
    expected = [by_hand(hf, *request) for request in REQUESTS]
    for size in (1, 3, 4):
        found = [sum(scores) for scores in loglikelihoods(model(hf), REQUESTS, size)]
        assert found == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_the_comparison_notices_a_shift(hf):
    expected = [by_hand(hf, *request) for request in REQUESTS]
    shifted = [sum(scores) for scores in loglikelihoods(lambda tokens: hf(tokens).logits.roll(1, 1), REQUESTS)]
    assert shifted != pytest.approx(expected, abs=1e-2)


def rows(hits, n):
    return [{"subject": "s", "answer": "A", "prediction": "A" if i < hits else "B"} for i in range(n)]


def test_p_value_by_hand():
    assert Report(protocol="letter", model="", questions=rows(3, 3)).p_value == pytest.approx(1 / 64)
    assert Report(protocol="letter", model="", questions=rows(0, 5)).p_value == pytest.approx(1.0)
    report = Report(protocol="letter", model="", questions=rows(2, 4))
    assert report.accuracy == 0.5
    assert math.isclose(report.subjects()["s"]["accuracy"], 0.5)
    assert "total" in report.table()


def test_questions_and_prompt(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "big_cities_test.csv").write_text('"Which, then?",NA,b,c,d,A\n', "utf-8")
    (question,) = read_questions(tmp_path, "test")["big_cities"]
    assert question.options[0] == "NA"
    expected = "about big cities.\n\nWhich, then?\nA. NA\nB. b\nC. c\nD. d\nAnswer:"
    assert letter_prompt(question, []).endswith(expected)


@pytest.mark.parametrize("row", ["question,a,b,c,d,0", "q,a,b,A", "q,a,b,c,d,AB"])
def test_a_broken_row_is_named(tmp_path, row):
    (tmp_path / "x_test.csv").write_text(row + "\n", "utf-8")
    with pytest.raises(EvaluationError, match="line 1"):
        read_questions(tmp_path, "test")


def test_a_missing_subject_is_refused_with_the_nearest(tmp_path):
    (tmp_path / "cities_test.csv").write_text("q,a,b,c,d,A\n", "utf-8")
    with pytest.raises(EvaluationError, match="cities"):
        read_questions(tmp_path, "test", ["citys"])
    with pytest.raises(EvaluationError, match="no such folder"):
        read_questions(tmp_path / "none", "test")
