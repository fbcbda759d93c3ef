"""Log-likelihoods equal transformers', whatever the batch."""

import random

import pytest
import torch
from conftest import independent
from evaluator.scoring import loglikelihoods


@pytest.fixture(scope="module")
def requests(hf):
    rng = random.Random(1)

    def ids(low, high):
        return [rng.randrange(hf.config.vocab_size) for _ in range(rng.randint(low, high))]

    different = [(ids(1, 30), ids(1, 6)) for _ in range(20)]
    shared = [(different[0][0], [token]) for token in (3, 4, 5)]  # like letters: one row for all
    return [*different, *shared, ([1], [7]), ([1, 7], [8, 9]), ([1], [7, 8, 9])]


@pytest.fixture(scope="module")
def expected(hf, requests):
    return [independent(hf, *request) for request in requests]


def flat(scores):
    return [score for tokens in scores for score in tokens]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_scores_equal_transformers_whatever_the_batch(model, requests, expected, batch_size):
    found = loglikelihoods(model, requests, batch_size=batch_size)
    assert [len(tokens) for tokens in found] == [len(continuation) for _, continuation in requests]
    assert flat(found) == pytest.approx(flat(expected), abs=1e-5)


def test_any_callable_will_do(hf, requests, expected):
    found = loglikelihoods(lambda tokens: hf(tokens).logits, requests, batch_size=5)
    assert flat(found) == pytest.approx(flat(expected), abs=1e-5)


def test_logits_in_parts_are_the_same(model, requests, expected, monkeypatch):
    monkeypatch.setattr("evaluator.scoring._POSITIONS", 3)
    assert flat(loglikelihoods(model, requests)) == pytest.approx(flat(expected), abs=1e-5)


def test_the_comparison_notices_a_shift_by_one(hf, requests, expected):
    """The control: scores of the position after the right one."""
    found = loglikelihoods(lambda tokens: hf(tokens).logits.roll(1, dims=1), requests)
    assert flat(found) != pytest.approx(flat(expected), abs=1e-2)


def test_the_comparison_notices_padding_on_the_left(hf, requests, expected):
    """The control for the padding: put where attention sees it, it changes the scores."""

    def padded(tokens):
        logits = hf(torch.nn.functional.pad(tokens, (2, 0))).logits
        return logits[:, 2:]

    assert flat(loglikelihoods(padded, requests)) != pytest.approx(flat(expected), abs=1e-2)


def test_requests_with_the_same_input_share_a_row(hf):
    rows = []

    def counted(tokens):
        rows.append(len(tokens))
        return hf(tokens).logits

    loglikelihoods(counted, [([1, 2], [letter]) for letter in (3, 4, 5, 6)])
    assert rows == [1]


def test_the_longest_rows_come_first(hf):
    lengths = []

    def measured(tokens):
        lengths.append(tokens.shape[1])
        return hf(tokens).logits

    loglikelihoods(measured, [([1] * n, [2]) for n in (3, 9, 5, 7)], batch_size=2)
    assert lengths == [9, 5]


def test_nothing_is_asked_of_no_requests(model):
    assert loglikelihoods(model, []) == []
