"""The whole evaluation against a second, plain one on transformers."""

import dataclasses
import hashlib
import json

import pytest
import torch
from conftest import EXAMPLES, QUESTIONS, independent
from data_prep import Tokenizer, templates
from evaluator import EvaluationError, evaluate
from evaluator.errors import UsageError


def block(row):
    return f"{row[0]}\nA. {row[1]}\nB. {row[2]}\nC. {row[3]}\nD. {row[4]}\nAnswer:"


def letters_by_hand(hf, tokenizer, subject, row):
    shots = "\n".join(f"{block(shot)} {shot[5]}" for shot in EXAMPLES[subject])
    name = subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about  {name}."
    prompt = f"{header}\n{shots}\n\n{block(row)}"
    ids = tokenizer.encode(prompt)
    scores = []
    for letter in "ABCD":
        whole = tokenizer.encode(f"{prompt} {letter}")
        assert whole[: len(ids)] == ids
        scores.append(sum(independent(hf, ids, whole[len(ids) :])))
    return prompt, scores


def texts_by_hand(hf, tokenizer, subject, row):
    prompt = templates.GENERAL_INSTRUCTION.prompt(row[0])
    ids = tokenizer.encode(prompt)
    scores = []
    for option in row[1:5]:
        tokens = tokenizer.encode(prompt + option)[len(ids) :]
        scores.append(sum(independent(hf, ids, tokens)) / len(tokens))
    return prompt, scores


CASES = [
    ({"protocol": "letter"}, letters_by_hand),
    ({"protocol": "perplexity", "prompt_template": "general-instruction"}, texts_by_hand),
]


@pytest.mark.parametrize(("options", "by_hand"), CASES, ids=["letter", "perplexity"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_every_question_is_scored_as_by_hand(model, hf, folder, mmlu, options, by_hand, batch_size):
    report = evaluate(model, mmlu, tokenizer=folder, batch_size=batch_size, **options)
    rows = [(subject, row) for subject in sorted(QUESTIONS) for row in QUESTIONS[subject]]
    assert len(report.questions) == len(rows)
    for (subject, row), found in zip(rows, report.questions, strict=True):
        prompt, scores = by_hand(hf, Tokenizer(folder), subject, row)
        assert found["subject"] == subject
        assert found["prompt_sha256"] == hashlib.sha256(prompt.encode()).hexdigest()
        assert list(found["logprobs"].values()) == pytest.approx(scores, abs=1e-5)
        assert found["prediction"] == "ABCD"[max(range(4), key=scores.__getitem__)]
        assert found["answer"] == row[5]


def test_the_reports_form(model, folder, mmlu):
    report = evaluate(model, mmlu, protocol="letter", tokenizer=folder, name="some/where", limit=2)
    content = json.loads(json.dumps(report.to_json()))
    assert set(content) == {
        "format_version", "benchmark", "protocol", "accuracy", "standard_error", "num_questions", "num_correct",
        "chance", "p_value", "model", "settings", "versions", "subjects", "questions",
    }  # fmt: skip
    assert [(row["subject"], row["index"]) for row in content["questions"]] == [
        ("animals", 0),
        ("big_cities", 0),
        ("big_cities", 1),
    ]
    for row in content["questions"]:
        assert set(row) == {
            "subject", "index", "prompt_sha256", "num_few_shot", "logprobs", "prediction", "answer",
        }  # fmt: skip
        assert set(row["logprobs"]) == set("ABCD")
        assert row["num_few_shot"] == 5
    assert content["settings"] | {"task_data_path": ""} == {
        "task_data_path": "",
        "subjects": ["animals", "big_cities"],
        "num_few_shot": 5,
        "prompt_template": "none",
        "batch_size": 32,
        "limit": 2,
    }
    facts = content["model"]
    assert (facts["path"], facts["dtype"], facts["device"]) == ("some/where", "float32", "cpu")
    assert facts["architecture"]["num_query_groups"] == 2
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["vocab_sha256"] == Tokenizer(folder).vocab_sha256
    assert content["versions"]["torch"] == torch.__version__


def test_examples_that_do_not_fit_are_left_out(model, folder, mmlu, monkeypatch):
    def asked_with(positions):
        smaller = dataclasses.replace(model.architecture, max_position_embeddings=positions)
        monkeypatch.setattr(model, "architecture", smaller)
        report = evaluate(model, mmlu, protocol="letter", tokenizer=folder, subjects=["animals"])
        return report.questions[0]["num_few_shot"]

    (row,) = QUESTIONS["animals"]
    header = "The following are multiple choice questions (with answers) about  animals."
    shots = [f"{block(shot)} {shot[5]}" for shot in EXAMPLES["animals"][:2]]
    prompt = "\n".join([header, *shots]) + f"\n\n{block(row)}"
    length = len(Tokenizer(folder).encode(prompt))
    assert [asked_with(length + more) for more in (-1, 0, 500)] == [1, 2, 5]
    with pytest.raises(EvaluationError, match=r"animals_test\.csv, line 1: .* the model has 8 positions"):
        asked_with(8)


def test_scores_that_are_no_numbers_are_refused(folder, mmlu):
    def broken(tokens):
        return torch.full((*tokens.shape, 1000), float("nan"))

    with pytest.raises(EvaluationError, match="--dtype"):
        evaluate(broken, mmlu, protocol="letter", tokenizer=folder)


def test_a_tokenizer_of_another_model_is_refused(model, folder, mmlu, monkeypatch):
    monkeypatch.setattr(model, "architecture", dataclasses.replace(model.architecture, vocab_size=100))
    with pytest.raises(EvaluationError, match="it is not the model's"):
        evaluate(model, mmlu, protocol="letter", tokenizer=folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protocol": "leter"}, "perhaps you meant 'letter'"),
        ({"protocol": "perplexity", "num_few_shot": 5}, "letter protocol"),
        ({"protocol": "letter", "batch_size": 0}, "--batch-size 0"),
        ({"protocol": "letter", "limit": 0}, "--limit 0"),
        ({"protocol": "letter", "subjects": ["animal"]}, "perhaps you meant 'animals'"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(model, folder, mmlu, options, words):
    with pytest.raises(UsageError, match=words):
        evaluate(model, mmlu, tokenizer=folder, **options)


def test_too_few_examples_are_refused(model, folder, mmlu):
    with pytest.raises(EvaluationError, match="has 5 examples of 'animals', not 6"):
        evaluate(model, mmlu, protocol="letter", tokenizer=folder, num_few_shot=6)
