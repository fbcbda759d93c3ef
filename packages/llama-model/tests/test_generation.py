"""Greedy and sampled continuations against transformers, in batches and alone."""

import copy
import itertools

import pytest
import torch
from llama_model import ModelError, RequestError, generate, load_model

PROMPTS = [[1, 5, 7], [3], [9, 8, 7, 6, 5, 4, 3, 2, 11, 12], [50, 60]]
NEW = 24


@pytest.fixture(scope="module")
def model(gqa):
    return load_model(gqa.folder)


def collect(steps, count):
    tokens, logprobs = [[] for _ in range(count)], [[] for _ in range(count)]
    for step in steps:
        for row, token, logprob in zip(step.rows, step.tokens, step.logprobs, strict=True):
            tokens[row].append(token)
            logprobs[row].append(logprob)
    return tokens, logprobs


def theirs(hf, prompt, eos=None):
    ids = torch.tensor([prompt])
    options = dict(do_sample=False, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=0)
    out = hf.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


def test_greedy_is_transformers_token_by_token(case):
    tokens, _ = collect(generate(load_model(case.folder), PROMPTS, max_new_tokens=NEW), len(PROMPTS))
    assert tokens == [theirs(case.hf, prompt) for prompt in PROMPTS]


def test_it_stops_at_the_end_token_row_by_row(gqa, model):
    free, _ = collect(generate(model, PROMPTS, max_new_tokens=NEW), len(PROMPTS))
    eos = free[0][NEW // 2]
    tokens, _ = collect(generate(model, PROMPTS, max_new_tokens=NEW, eos_token_id=eos), len(PROMPTS))
    assert tokens == [theirs(gqa.hf, prompt, eos) for prompt in PROMPTS]
    assert len({len(row) for row in tokens}) > 1, "some rows must end before others"


def test_a_batch_gives_each_prompt_what_it_gets_alone(model):
    for options in ({}, dict(decoding="sample", seed=3, temperature=1.5, top_k=40, top_p=0.95)):
        tokens, logprobs = collect(generate(model, PROMPTS, max_new_tokens=NEW, **options), len(PROMPTS))
        for row, prompt in enumerate(PROMPTS):
            alone_options = options | ({"seed": 3 + row} if options else {})
            alone, alone_logprobs = collect(generate(model, [prompt], max_new_tokens=NEW, **alone_options), 1)
            assert tokens[row] == alone[0]
            assert logprobs[row] == pytest.approx(alone_logprobs[0], abs=1e-5)


def test_log_probabilities_are_the_full_forward_passes(model):
    tokens, logprobs = collect(generate(model, PROMPTS, max_new_tokens=NEW), len(PROMPTS))
    for prompt, answer, stated in zip(PROMPTS, tokens, logprobs, strict=True):
        whole = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
        expected = [whole[len(prompt) + at - 1, token].item() for at, token in enumerate(answer)]
        assert stated == pytest.approx(expected, abs=1e-5)


def test_a_seed_repeats_a_sample_and_another_one_does_not(model):
    def sample(seed):
        return collect(generate(model, PROMPTS, decoding="sample", max_new_tokens=NEW, seed=seed), len(PROMPTS))

    assert sample(1) == sample(1)
    assert sample(1)[0] != sample(2)[0]
    assert sample(None)[0] != sample(None)[0]


def test_samples_follow_the_distribution_that_is_left(model):
    prompts = [[1, 5, 7]] * 4000
    options = dict(decoding="sample", max_new_tokens=1, seed=0, temperature=2.0, top_k=5, top_p=0.8)
    step = next(generate(model, prompts, **options))
    logits = model(torch.tensor([prompts[0]]))[0, -1] / 2.0
    probabilities, ids = logits.topk(5)[0].softmax(-1), logits.topk(5)[1]
    kept = int((probabilities.cumsum(-1) < 0.8).sum()) + 1
    expected = probabilities[:kept] / probabilities[:kept].sum()
    counts = torch.tensor([step.tokens.count(int(token)) for token in ids]) / len(prompts)
    assert kept < 5
    assert counts[kept:].eq(0).all()
    torch.testing.assert_close(counts[:kept], expected, atol=0.03, rtol=0)


def test_top_k_of_one_is_greedy(model):
    greedy = collect(generate(model, PROMPTS, max_new_tokens=NEW), len(PROMPTS))
    sampled = generate(model, PROMPTS, max_new_tokens=NEW, decoding="sample", top_k=1, seed=0)
    assert collect(sampled, len(PROMPTS))[0] == greedy[0]


def test_iterating_can_stop_early(model):
    steps = generate(model, PROMPTS, max_new_tokens=NEW)
    assert [step.rows for step in itertools.islice(steps, 2)] == [(0, 1, 2, 3)] * 2
    steps.close()


def test_a_cache_takes_several_tokens_at_a_time(model, gqa):
    """A prefix stored once, continued by pieces: the logits of the whole sequence."""
    whole = model(gqa.tokens)
    cache = model.new_cache(2, 20)
    parts = [model(gqa.tokens[:, a:b], cache=cache) for a, b in ((0, 9), (9, 15), (15, 16), (16, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=5e-6)
    shared = model.new_cache(1, 20)
    model(gqa.tokens[:1, :9], cache=shared)
    shared.keep([0, 0])
    pair = torch.stack((gqa.tokens[0, 9:], gqa.tokens[1, 9:]))
    expected = model(torch.cat((gqa.tokens[:1, :9].expand(2, -1), pair), 1))[:, 9:]
    torch.testing.assert_close(model(pair, cache=shared), expected, rtol=1e-4, atol=5e-6)
    with pytest.raises(ValueError, match="do not fit into a cache of 20 slots"):
        model(gqa.tokens[:, :1], cache=cache)


def test_bfloat16_generates(gqa):
    model = load_model(gqa.folder, dtype="bfloat16")
    tokens, _ = collect(generate(model, PROMPTS, max_new_tokens=4), len(PROMPTS))
    half = copy.deepcopy(gqa.hf).to(torch.bfloat16)
    assert [row[0] for row in tokens] == [half(torch.tensor([p])).logits[0, -1].argmax().item() for p in PROMPTS]


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[101]], {}, "outside the vocabulary of 101"),
        ([[-1]], {}, "outside the vocabulary"),
        ([[1] * 60], {"max_new_tokens": 5}, "prompt 0 has 60 tokens: with 5 new ones it exceeds"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0"),
        ([[1]], {"decoding": "beam"}, "choose from greedy, sample"),
        ([[1]], {"decoding": "sample", "temperature": 0.0}, "temperature 0.0"),
        ([[1]], {"decoding": "sample", "top_p": 0.0}, "top_p 0.0"),
        ([[1]], {"decoding": "sample", "top_k": -1}, "top_k -1"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(model, prompts, options, words):
    with pytest.raises(RequestError, match=words):
        generate(model, prompts, **{"max_new_tokens": 2, **options})


def test_logits_that_are_no_numbers_are_an_error(gqa):
    broken = load_model(gqa.folder)
    broken.output_layer.weight[3] = float("nan")
    with pytest.raises(ModelError, match="no numbers"):
        list(generate(broken, [[1, 2]], max_new_tokens=2))
