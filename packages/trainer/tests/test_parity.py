"""The engine in many layouts against Hugging Face with PyTorch's AdamW in one process, fp32: four ranks, one pool."""

import dataclasses

import engine_case
import numpy as np
import pytest
import rank_cases
from layouts import pairs, title

LOSS, GRADIENT, NORM, WEIGHT = 2e-6, 1e-5, 1e-5, 1e-5
"""Absolute, relative to the tensor's largest, relative, absolute."""


def assert_parity(results, case):
    for history, gradient, weight in results:
        losses, norms = np.array(history).T
        expected_losses, expected_norms = np.array(case.history).T
        np.testing.assert_allclose(losses, expected_losses, atol=LOSS, rtol=0)
        np.testing.assert_allclose(norms, expected_norms, rtol=NORM)
        assert gradient < GRADIENT
        assert weight < WEIGHT


def without_groups(options):
    return {name: value for name, value in options.items() if name != "groups"}


@pytest.mark.parametrize("options", list(pairs()), ids=title)
def test_training_is_hugging_faces(ranks, cases, options):
    case = cases[options["groups"]]
    assert_parity(ranks.run(rank_cases.train, case, without_groups(options)), case)


def test_the_model_learns_or_the_comparison_shows_nothing(cases):
    for case in cases.values():
        assert case.history[-1][0] < case.history[0][0] - 0.1


def test_the_comparison_notices_a_wrong_weight(ranks, cases, tmp_path):
    case = cases["gqa"]
    wrong = engine_case.swapped(case, tmp_path)
    options = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert min(ranks.run(rank_cases.first_gradient_error, case, options, wrong)) > 100 * GRADIENT


def test_the_comparison_notices_a_loss_that_is_a_mean_of_means(ranks, cases):
    """With other numbers of labels in each micro-batch, averaging their means is not the mean over all tokens."""
    case = cases["gqa"]
    tokens, labels = case.batches[0]
    moved = labels.clone()
    moved[0] = -100  # the same mean over micro-batches if this one's were taken for the others'
    other = dataclasses.replace(case, batches=[(tokens, moved), *case.batches[1:]])
    with pytest.raises(AssertionError):
        assert_parity(ranks.run(rank_cases.train, other, dict(micro_batch_size=2)), case)


def test_half_precision_stays_near(ranks, cases):
    case = cases["gqa"]
    layout = dict(tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=True)
    for precision in ("bf16", "fp16"):
        for history, _, _ in ranks.run(rank_cases.train, case, {precision: True, **layout}):
            np.testing.assert_allclose(np.array(history)[:, 0], np.array(case.history)[:, 0], atol=0.03)


def test_a_run_leaves_no_thread_behind(ranks, cases):
    """Each of gloo's groups has some, which look around a hundred times a second."""
    for first, *others in ranks.run(rank_cases.threads_left, cases["gqa"], dict(use_distributed_optimizer=True)):
        assert set(others) == {first}
