"""The network on megatron-core's tensor-parallel layers: parity, padding, training, checkpoints, on two processes."""

import numpy as np
import pytest
import rank_cases
import torch
from ckpt_tools import open_checkpoint
from conftest import LAYERS
from llama_model import generate, load_model

LOGITS, LOSS, GRADIENT = 1e-5, 5e-6, 1e-5
STEPS = 6


def assert_parity(results, case):
    for logits, loss, gradients in results:
        np.testing.assert_allclose(logits, case.logits.numpy(), atol=LOGITS, rtol=0)
        np.testing.assert_allclose(loss, case.loss.numpy(), atol=LOSS, rtol=0)
        assert max(gradients.values()) < GRADIENT, gradients


def arguments(case, folder=None, labels=None):
    return (folder or case.folder, case.gradients, case.tokens, case.labels if labels is None else labels)


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_loss_and_every_gradient_are_hugging_faces(ranks, case, tp):
    results = ranks.run(rank_cases.parity, tp, *arguments(case))
    assert_parity(results, case)
    assert len(results[0][2]) == 3 + 6 * LAYERS


@pytest.mark.parametrize("mistake", ["interleaved", "swapped", "not shifted"])
def test_the_comparison_notices_mistakes(ranks, gqa, mistake):
    folder = None if mistake == "not shifted" else gqa.wrong(mistake)
    labels = gqa.tokens if mistake == "not shifted" else None
    for logits, loss, gradients in ranks.run(rank_cases.parity, 2, *arguments(gqa, folder, labels)):
        assert np.abs(loss - gqa.loss.numpy()).max() > 100 * LOSS
        assert max(gradients.values()) > 100 * GRADIENT
        if mistake != "not shifted":
            assert np.abs(logits - gqa.logits.numpy()).max() > 100 * LOGITS


def sequence_parallel(*args):
    return rank_cases.parity(*args, sequence_parallel=True)


def test_sequence_parallelism_changes_nothing(ranks, gqa):
    assert_parity(ranks.run(sequence_parallel, 2, *arguments(gqa)), gqa)


@pytest.mark.parametrize(("tp", "divisible_by"), [(1, 128), (2, 1), (2, 8), (2, 128)])
def test_padding_rows_never_enter_loss_or_logits(ranks, gqa, tp, divisible_by):
    results = ranks.run(rank_cases.padding, tp, gqa.folder, gqa.tokens, gqa.labels, divisible_by)
    for logits, loss, gradient, _ in results:
        np.testing.assert_allclose(logits, gqa.logits.numpy(), atol=LOGITS, rtol=0)
        np.testing.assert_allclose(loss, gqa.loss.numpy(), atol=LOSS, rtol=0)
        assert gradient == 0
    assert sum(rows for *_, rows in results) > 0
    if (tp, divisible_by) == (2, 128):
        assert results[1][3] == 128, "a rank with nothing but padding"


def test_the_padding_check_notices_rows_that_are_not_masked(ranks, gqa):
    for _, loss, gradient, _ in ranks.run(rank_cases.padding, 2, gqa.folder, gqa.tokens, gqa.labels, 8, False):
        assert np.abs(loss - gqa.loss.numpy()).max() > 1
        assert np.isfinite(gradient)


def test_generation_under_tensor_parallelism_is_that_of_one_device(ranks, gqa):
    prompts = [[1, 5, 7], [3], [9, 8, 7, 6, 5]]
    model = load_model(gqa.folder)
    for options in ({}, {"decoding": "sample", "seed": 5, "top_k": 20}):
        expected = [[] for _ in prompts]
        for step in generate(model, prompts, max_new_tokens=12, **options):
            for row, token in zip(step.rows, step.tokens, strict=True):
                expected[row].append(token)
        run = sampled if options else rank_cases.continuations
        assert ranks.run(run, 2, gqa.folder, prompts, 12) == [expected] * 2


def sampled(*args):
    return rank_cases.continuations(*args, decoding="sample", seed=5, top_k=20)


# --- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(gqa, tmp_path_factory):
    """Batches, the losses and gradient norms of Hugging Face with torch's AdamW on them, the weights at the end."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(gqa.folder)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": rank_cases.WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=rank_cases.LR, betas=rank_cases.BETAS, eps=rank_cases.EPS)
    text = torch.randint(0, 101, (STEPS, 4, 17), generator=torch.Generator().manual_seed(2))
    batches, history = [], []
    for rows in text:
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].clone()
        labels[0, :6] = labels[3, 9:] = -100  # unequal shares of the loss
        batches.append((tokens, labels))
        adam.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), rank_cases.CLIP)
        adam.step()
        history.append((loss.item(), norm.item()))
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    return batches, np.array(history), folder


def train_distributed_optimizer(*args):
    return rank_cases.train(*args, distributed_optimizer=True)


def train_sequence_parallel(*args):
    return rank_cases.train(*args, sequence_parallel=True)


LAYOUTS = {
    "tp2": (rank_cases.train, 2, 1),
    "dp2": (rank_cases.train, 1, 1),
    "dp2, distributed optimizer": (train_distributed_optimizer, 1, 1),
    "tp2, sequence parallel": (train_sequence_parallel, 2, 1),
    "pp2": (rank_cases.train, 1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_hugging_faces_with_adamw(ranks, gqa, reference, layout):
    run, tp, pp = LAYOUTS[layout]
    batches, expected, weights = reference
    for history, errors in ranks.run(run, tp, pp, gqa.folder, batches, weights):
        np.testing.assert_allclose(np.array(history)[:, 0], expected[:, 0], atol=5e-6, rtol=0)
        np.testing.assert_allclose(np.array(history)[:, 1], expected[:, 1], rtol=1e-5)
        assert max(errors.values()) < 1e-5, errors


def train_bfloat16(*args):
    return rank_cases.train(*args, dtype="bfloat16")


def train_bfloat16_distributed(*args):
    return rank_cases.train(*args, dtype="bfloat16", distributed_optimizer=True)


def train_float16(*args):
    return rank_cases.train(*args, dtype="float16")


@pytest.mark.parametrize("run", [train_bfloat16, train_bfloat16_distributed, train_float16])
def test_half_precision_trains_within_its_rounding(ranks, gqa, reference, run):
    batches, expected, weights = reference
    for history, _ in ranks.run(run, 1, 1, gqa.folder, batches, weights):
        np.testing.assert_allclose(np.array(history)[:, 0], expected[:, 0], atol=0.05)


def resume_distributed(*args):
    return rank_cases.resume(*args, distributed_optimizer=True)


@pytest.mark.parametrize(("run", "tp"), [(rank_cases.resume, 2), (resume_distributed, 1)])
def test_training_resumes_bit_for_bit_from_a_distributed_checkpoint(ranks, gqa, reference, tmp_path, run, tp):
    assert ranks.run(run, tp, gqa.folder, reference[0], str(tmp_path / "state")) == [(True, True)] * 2


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2])
def test_gpt_model_loads_our_checkpoint_strictly_and_we_its(ranks, gqa, tmp_path, tp):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    keys = ranks.run(rank_cases.save, tp, gqa.folder, ours)[0]
    assert "decoder.layers.mlp.linear_fc1.weight" in keys
    for loaded, back, their_keys, learnt in ranks.run(rank_cases.both_ways, tp, gqa.folder, ours, theirs, gqa.tokens):
        np.testing.assert_allclose(loaded, gqa.logits.numpy(), atol=LOGITS, rtol=0)
        np.testing.assert_allclose(back, gqa.logits.numpy(), atol=LOGITS, rtol=0)
        assert learnt > 0.1, "fresh weights must not do already"
        assert their_keys == keys


def test_our_checkpoint_of_two_padded_ranks_is_read_without_megatron_core(ranks, gqa, tmp_path):
    ranks.run(rank_cases.save, 2, gqa.folder, tmp_path / "saved", 64)
    (tmp_path / "saved" / "config.json").write_bytes((gqa.folder / "config.json").read_bytes())
    with open_checkpoint(gqa.folder) as expected, open_checkpoint(tmp_path / "saved") as saved:
        assert saved.format == "torch_dist"
        for name in expected.names():
            assert np.array_equal(saved.read(name), expected.read(name)), name
    assert torch.equal(load_model(tmp_path / "saved")(gqa.tokens), load_model(gqa.folder)(gqa.tokens))


# --- mistakes -------------------------------------------------------------------------------------------------------

REFUSED = {
    "groups": "1 query groups (key and value heads) do not divide among 2 tensor-parallel ranks",
    "fixed": "hidden_size is not an option",
    "unheeded": "does not heed recompute_granularity",
}


@pytest.mark.parametrize("call", REFUSED)
def test_what_the_network_cannot_do_is_refused(ranks, call):
    for message in ranks.run(rank_cases.refused, call):
        assert REFUSED[call] in message


def test_a_world_that_does_not_divide_is_refused(ranks):
    message = ranks.run(rank_cases.three_of_two)[0]
    assert "2 processes do not divide into tensor_model_parallel_size 3" in message
