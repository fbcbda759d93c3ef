"""The network on megatron-core's tensor-parallel layers: parity, padding, training, checkpoints, on two processes."""

import datetime
import functools

import numpy as np
import pytest
import rank_cases
import torch
from ckpt_tools import Layout, open_checkpoint, sharding
from conftest import LAYERS
from llama_model import LlamaModel, Recompute, generate, init_weights, load_model

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


def test_sequence_parallelism_changes_nothing(ranks, gqa):
    run = functools.partial(rank_cases.parity, sequence_parallel=True)
    assert_parity(ranks.run(run, 2, *arguments(gqa)), gqa)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_in_float64_two_ranks_equal_hugging_face_to_rounding(ranks, gqa, exact, sequence_parallel):
    options = {"sequence_parallel": sequence_parallel, "params_dtype": torch.float64}
    run = functools.partial(rank_cases.loss_and_gradients, **options)
    rules = sharding(load_model(gqa.folder).architecture)
    for rank, (loss, grads) in enumerate(ranks.run(run, 2, gqa.folder, gqa.tokens, {"labels": gqa.labels})):
        torch.testing.assert_close(loss, exact.loss, atol=1e-12, rtol=0)
        assert grads.keys() == rules.keys()
        for name, grad in grads.items():
            expected = shard(exact.gradients[name], rules[name].view(rank, 2))
            torch.testing.assert_close(grad[: len(expected)], expected, atol=1e-12, rtol=1e-12)


def shard(whole, view):
    """The part of a whole tensor that a view names, without padding."""
    rows = torch.cat([whole[slice(*part)] for part in view.rows])
    return rows if view.columns is None else rows[:, slice(*view.columns)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [1, 99])
def test_a_vocabulary_that_ranks_share_has_the_loss_of_a_whole_one(ranks, dtype, padding):
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, weight, factors = draw(30, 16), draw(99, 16), draw(30)
    labels = torch.randint(0, 99, (30,), generator=torch.Generator().manual_seed(1))
    labels[3:7] = -100
    exact = [z.to(dtype).double().requires_grad_() for z in (x, weight)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="none")
    (expected * factors.to(torch.float32).double()).sum().backward()
    near = {torch.float64: 1e-12, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    results = ranks.run(rank_cases.shared_head_loss, x, weight, labels, factors, dtype, padding)
    for loss, dx, _ in results:
        torch.testing.assert_close(loss.double(), expected.detach(), atol=near, rtol=near)
        torch.testing.assert_close(dx.double(), exact[0].grad, atol=near, rtol=near)
    dweight = torch.cat([result[2] for result in results]).double()
    torch.testing.assert_close(dweight[:99], exact[1].grad, atol=near, rtol=near)
    assert not dweight[99:].any()
    assert (exact[1].grad.abs() > 10 * near).any(), "a comparison that zeros would pass"


def test_rows_of_a_batch_flattened_into_one_with_their_documents_give_the_same(ranks, gqa):
    """Four rows of 20 tokens are more than the model's 64 positions."""
    tokens, labels = torch.cat((gqa.tokens, gqa.tokens.flip(1))), torch.cat((gqa.labels, gqa.labels.flip(1)))
    b, s = tokens.shape
    positions, bounds = torch.arange(s).repeat(b)[None], torch.arange(0, b * s + 1, s, dtype=torch.int32)
    model = load_model(gqa.folder).requires_grad_(True)
    expected = model(tokens, labels=labels)
    expected.sum().backward()
    flat = tokens.flatten()[None]
    inputs = {"labels": labels.flatten()[None], "position_ids": positions, "cu_seqlens": bounds}
    for options in ({}, {"sequence_parallel": True}):
        run = functools.partial(rank_cases.loss_and_gradients, **options)
        for loss, grads in ranks.run(run, 2, gqa.folder, flat, inputs):
            torch.testing.assert_close(loss.view(b, s), expected.detach(), atol=LOSS, rtol=0)
            for name in ("decoder.final_layernorm.weight", "decoder.layers.0.input_layernorm.weight"):
                grad = model.get_parameter(name).grad
                torch.testing.assert_close(grads[name], grad, atol=GRADIENT * grad.abs().max().item(), rtol=0)
    inputs["cu_seqlens"] = bounds[[0, -1]]  # one document
    loss, _ = ranks.run(rank_cases.loss_and_gradients, 2, gqa.folder, flat, inputs)[0]
    assert (loss.view(b, s) - expected).abs().max() > 100 * LOSS, "the control must leak"


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
        run = functools.partial(rank_cases.continuations, **options)
        assert ranks.run(run, 2, gqa.folder, prompts, 12) == [expected] * 2


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


OPTIONS = {
    "tp2": (Layout(tensor_model_parallel_size=2), {}),
    "tp2, sequence parallel": (Layout(tensor_model_parallel_size=2), {"sequence_parallel": True}),
    "tp2, sequence parallel, all recomputed": (
        Layout(tensor_model_parallel_size=2),
        {"sequence_parallel": True, "recompute": Recompute(granularity="full", num_layers=3)},
    ),
    "dp2": (Layout(), {}),
    "dp2, distributed optimizer": (Layout(), {"distributed_optimizer": True}),
    "dp2, gradients summed while others are computed": (Layout(), {"overlap": True}),
    "pp2": (Layout(pipeline_model_parallel_size=2), {}),
    "pp2, uneven": (Layout(pipeline_model_parallel_size=2, num_layer_list=(1, 3)), {}),
    "pp2, virtual": (Layout(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1), {}),
    "pp2, virtual, parts recomputed": (
        Layout(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1),
        {"recompute": Recompute(granularity="selective", modules=("core_attn", "mlp"))},
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_training_is_hugging_faces_with_adamw(ranks, gqa, reference, case):
    layout, options = OPTIONS[case]
    batches, expected, weights = reference
    trained = set()
    run = functools.partial(rank_cases.train, **options)
    for history, errors in ranks.run(run, layout, gqa.folder, batches, weights):
        np.testing.assert_allclose(np.array(history)[:, 0], expected[:, 0], atol=5e-6, rtol=0)
        np.testing.assert_allclose(np.array(history)[:, 1], expected[:, 1], rtol=1e-5)
        assert max(errors.values()) < 1e-5, errors
        trained |= errors.keys()
    assert len(trained) == 3 + 6 * LAYERS


HALF = [
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "distributed_optimizer": True},
    {"dtype": "float16"},
]


@pytest.mark.parametrize("options", HALF, ids=str)
def test_half_precision_trains_within_its_rounding(ranks, gqa, reference, options):
    batches, expected, weights = reference
    run = functools.partial(rank_cases.train, **options)
    for history, _ in ranks.run(run, Layout(), gqa.folder, batches, weights):
        np.testing.assert_allclose(np.array(history)[:, 0], expected[:, 0], atol=0.05)


@pytest.mark.parametrize(("options", "tp"), [({}, 2), ({"distributed_optimizer": True}, 1)])
def test_training_resumes_bit_for_bit_from_a_distributed_checkpoint(ranks, gqa, reference, tmp_path, options, tp):
    run = functools.partial(rank_cases.resume, **options)
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
    "another layout": "the layout has tensor_model_parallel_size 1, parallel.initialize was called with 2",
}


@pytest.mark.parametrize("call", REFUSED)
def test_what_the_network_cannot_do_is_refused(ranks, call):
    for message in ranks.run(rank_cases.refused, call):
        assert REFUSED[call] in message


def test_a_world_that_does_not_divide_is_refused(ranks):
    message = ranks.run(rank_cases.three_of_two)[0]
    assert "2 processes do not divide into tensor_model_parallel_size 3" in message


def test_a_virtual_pipeline_of_one_stage_is_refused(ranks):
    message = ranks.run(rank_cases.virtual_of_one_stage)[0]
    assert "virtual_pipeline_model_parallel_size 2 needs a pipeline_model_parallel_size of 2 or more" in message


def test_collectives_time_out_as_asked(ranks):
    asked = datetime.timedelta(seconds=45)
    assert ranks.run(rank_cases.timeouts, asked) == [[asked] * 3] * 2
    assert asked not in ranks.run(rank_cases.timeouts, None)[0]


# --- fresh weights --------------------------------------------------------------------------------------------------

FRESH = [
    Layout(tensor_model_parallel_size=2, make_vocab_size_divisible_by=8),
    Layout(pipeline_model_parallel_size=2, num_layer_list=(3, 1)),
    Layout(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1),
]


@pytest.mark.parametrize("layout", FRESH, ids=str)
def test_fresh_weights_do_not_depend_on_the_layout(ranks, gqa, layout):
    whole = LlamaModel(load_model(gqa.folder).architecture)
    init_weights(whole, 5)
    config, expected = whole.architecture, dict(whole.named_parameters())
    size = layout.tensor_model_parallel_size
    padded = config.padded_vocab_size(size, layout.make_vocab_size_divisible_by or 1)
    seen = set()
    for rank, weights in enumerate(ranks.run(rank_cases.fresh, layout, config, 5)):
        for name, value in weights.items():
            view = sharding(config)[name].view(rank % size, size, padded)
            mine = shard(expected[name], view)
            assert torch.equal(value[: len(mine)], mine)
            assert not value[len(mine) :].any()
            assert len(value) == len(mine) + view.padding
        seen |= weights.keys()
    assert seen == expected.keys()
