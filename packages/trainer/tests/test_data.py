"""Samples, their documents and their order, against what the documents themselves say."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_prep import IndexedDataset, prepare
from llama_model import load_model, parallel
from trainer import TrainConfig
from trainer.data import (
    DataOrder,
    InstructionSamples,
    Loader,
    Sample,
    check_split,
    data_files,
    instruction_samples,
    pretraining_samples,
)
from trainer.errors import ConfigError, TrainerError
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH = 20
"""Token p of document d has the id 20 d + p + 1: an id says where it is from."""
NUM_DOCUMENTS = 60
EOD_INSIDE = 3 * WIDTH + 3
"""An id in the middle of document 3, which is told to be the end of documents."""


def write(prefix, rows):
    """Foreign data: megatron-core's own writer, no manifest."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.int32)
    for row in rows:
        builder.add_document(torch.tensor(row, dtype=torch.int32), [len(row)])
    builder.finalize(f"{prefix}.idx")


def documents(first=0, count=NUM_DOCUMENTS, seed=0):
    lengths = np.random.default_rng(seed).integers(1, WIDTH, count)
    lengths[5] = 0  # an empty one, which begins nowhere
    return [[WIDTH * d + p + 1 for p in range(size)] for d, size in enumerate(lengths.tolist(), first)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two corpora, `a` and `b`, none of whose documents ends with an eod."""
    path = tmp_path_factory.mktemp("data")
    write(path / "a", documents())
    write(path / "b", documents(NUM_DOCUMENTS, seed=1))
    return path


@pytest.fixture(scope="module", autouse=True)
def group():
    """Building needs a process group."""
    parallel.initialize()
    yield
    parallel.destroy()


def config(*data_path, **options):
    sizes = dict(train_iters=5, seq_length=8, global_batch_size=8, lr=1.0, split="90,10,0", eval_iters=1)
    paths = dict(data_path=data_path, model_config=Path("unused"), output_dir=Path("unused"))
    return TrainConfig(**paths, **sizes | options)


def built(cache, options, order=None):
    return pretraining_samples(options, vocab_size=10**4, eod_token_id=EOD_INSIDE, cache=cache, order=order)


def ids(samples, first, end):
    return [tuple(samples[index].tokens.tolist()) for index in range(first, end)]


def lengths_by_ids(tokens):
    """Where documents end, by the ids alone: the next one is not the next of the same document."""
    ends = [at + 1 for at, (id_, after) in enumerate(itertools.pairwise(tokens)) if after != id_ + 1]
    return tuple(np.diff([0, *ends, len(tokens)]).tolist())


# --- documents in samples -----------------------------------------------------------------------------------------


def blend(home):
    return (0.3, home / "a", 0.7, home / "b")


@pytest.mark.parametrize("name", ["one data set", "a blend"])
def test_documents_begin_where_the_index_says(home, tmp_path, name):
    paths = [home / "a"] if name == "one data set" else blend(home)
    train, valid, _ = built(tmp_path, config(*paths, train_iters=40))
    assert len(train) >= 320, "several epochs, so that documents meet themselves"
    samples = [train[index] for index in range(320)] + [valid[index] for index in range(8)]
    assert any(EOD_INSIDE in sample.tokens[:-1] for sample in samples), "the trap has to be in the data"
    for sample in samples:
        assert sample.lengths == lengths_by_ids(sample.tokens.tolist())
        assert sample.tokens[1:].tolist() == sample.labels[:-1].tolist()


def micro_batch(home, cache, size=3, **options):
    train, _, _ = built(cache, config(home / "a", **options))
    loader = Loader(samples=train, vocab_size=10**4, micro_batch_size=size, num_microbatches=1, dp_rank=0, dp_size=1)
    return next(loader.step(0)), [train[index] for index in range(size)]


def test_without_being_asked_documents_of_a_sample_are_one(home, tmp_path):
    batch, _ = micro_batch(home, tmp_path)
    assert batch.tokens.shape == batch.labels.shape == (3, 8)
    assert batch.position_ids is None
    assert batch.cu_seqlens is None


def test_positions_of_documents_alone(home, tmp_path):
    batch, samples = micro_batch(home, tmp_path, reset_position_ids=True)
    assert batch.tokens.shape == batch.position_ids.shape == (3, 8)
    assert batch.cu_seqlens is None
    for row, sample in zip(batch.position_ids.tolist(), samples, strict=True):
        assert row == [position for length in lengths_by_ids(sample.tokens.tolist()) for position in range(length)]


@pytest.mark.parametrize("reset_position_ids", [True, False])
def test_documents_apart_are_one_row(home, tmp_path, reset_position_ids):
    batch, samples = micro_batch(home, tmp_path, reset_attention_mask=True, reset_position_ids=reset_position_ids)
    lengths = [length for sample in samples for length in lengths_by_ids(sample.tokens.tolist())]
    assert batch.tokens.tolist() == [torch.cat([sample.tokens for sample in samples]).tolist()]
    assert batch.labels.tolist() == [torch.cat([sample.labels for sample in samples]).tolist()]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert {0, 8, 16, 24} <= set(batch.cu_seqlens.tolist())
    counted = lengths if reset_position_ids else [8, 8, 8]
    assert batch.position_ids.tolist() == [[position for count in counted for position in range(count)]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose vocabulary holds the ids of the two corpora."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    options = LlamaConfig(vocab_size=2 * NUM_DOCUMENTS * WIDTH, initializer_range=0.2, **sizes)
    LlamaForCausalLM(options).save_pretrained(path)
    return path


@pytest.mark.parametrize("reset_position_ids", [True, False])
def test_documents_apart_give_the_loss_of_a_full_mask(home, tmp_path, model, reset_position_ids):
    """Hugging Face's model with a mask [b, 1, s, s] made of the ids alone."""
    batch, samples = micro_batch(home, tmp_path, reset_attention_mask=True, reset_position_ids=reset_position_ids)
    tokens, labels = (torch.stack([getattr(sample, name) for sample in samples]) for name in ("tokens", "labels"))
    lengths = [lengths_by_ids(row) for row in tokens.tolist()]
    owner = torch.tensor([np.repeat(range(len(row)), row).tolist() for row in lengths])
    sees = (owner[:, :, None] == owner[:, None, :]) & torch.ones(8, 8, dtype=torch.bool).tril()
    mask = torch.zeros(3, 1, 8, 8).masked_fill(~sees[:, None], -torch.inf)
    position_ids = torch.arange(8).expand(3, 8)
    if reset_position_ids:
        position_ids = torch.tensor([[position for count in row for position in range(count)] for row in lengths])
    reference = LlamaForCausalLM.from_pretrained(model).eval()
    ours = load_model(model)
    with torch.no_grad():
        logits = reference(tokens, attention_mask=mask, position_ids=position_ids).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        options = dict(position_ids=batch.position_ids, labels=batch.labels)
        loss = ours(batch.tokens, cu_seqlens=batch.cu_seqlens, **options).flatten()
        whole = ours(tokens, labels=labels).flatten()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert (whole - expected).abs().max() > 0.01, "documents that see each other have to differ"


# --- the order of pretraining samples -----------------------------------------------------------------------------


def restored(order):
    return DataOrder.from_dict(json.loads(json.dumps(order.to_dict())))


def test_twice_as_many_steps_go_on_within_the_epoch(home, tmp_path):
    short, _, order = built(tmp_path / "1", config(home / "a", train_iters=4))
    long, _, after = built(tmp_path / "2", config(home / "a", train_iters=7), restored(order))
    assert after == restored(order) == order
    assert ids(long, 0, 32) == ids(short, 0, 32)
    seen = ids(long, 0, 56)
    assert len(set(seen)) == 56, "no sample twice before the epoch is over"


def test_more_steps_than_the_epoch_append_and_never_reshuffle(home, tmp_path):
    short, _, order = built(tmp_path / "1", config(home / "a", train_iters=4))
    first = order.sources[0].segments[0].length
    long, _, after = built(tmp_path / "2", config(home / "a", train_iters=40), restored(order))
    assert [segment.asked for segment in after.sources[0].segments] == [32, 320 - first]
    assert ids(long, 0, first) == ids(short, 0, first)
    assert len(set(ids(long, 0, first))) == first, "the first epoch ends before anything comes again"
    behind, _, _ = built(tmp_path / "2", config(home / "a", train_iters=320 - first, global_batch_size=1, seed=1235))
    assert ids(long, first, 320) == ids(behind, 0, 320 - first), "each segment has a shuffle of its own"
    longer, _, last = built(tmp_path / "3", config(home / "a", train_iters=100), restored(after))
    assert len(last.sources[0].segments) == 3
    assert ids(longer, 0, 320) == ids(long, 0, 320)
    shorter, _, kept = built(tmp_path / "4", config(home / "a", train_iters=2), restored(last))
    assert kept == last
    assert ids(shorter, 0, 320) == ids(long, 0, 320)


def test_megatron_core_alone_reshuffles(home, tmp_path):
    """The control: why the number asked for is kept."""
    short, _, _ = built(tmp_path / "1", config(home / "a", train_iters=4))
    afresh, _, _ = built(tmp_path / "2", config(home / "a", train_iters=40))
    assert ids(afresh, 0, 32) != ids(short, 0, 32)


def test_a_blend_is_megatron_cores_and_goes_on(home, tmp_path):
    short, _, order = built(tmp_path / "1", config(*blend(home), train_iters=20))
    assert ids(short, 0, 160) == megatron_blend(home, tmp_path / "megatron", 160)
    long, _, after = built(tmp_path / "2", config(*blend(home), train_iters=60), restored(order))
    assert [len(each.segments) for each in after.sources] == [2, 2]
    assert ids(long, 0, 160) == ids(short, 0, 160)
    of_b = np.mean([row[0] > NUM_DOCUMENTS * WIDTH for row in ids(long, 0, 480)])
    assert of_b == pytest.approx(0.7, abs=0.01)
    afresh, _, order = built(tmp_path / "3", config(*blend(home), train_iters=100))
    assert ids(afresh, 0, 160) != ids(short, 0, 160)
    assert [each.segments[0].asked for each in order.sources] == [242, 563], "as megatron-core: half a percent more"


def megatron_blend(home, cache, count):
    """The same blend by megatron-core's own builder, as a whole."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from trainer.data.pretraining import _Special

    options = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=8,
        blend=([str(home / "a"), str(home / "b")], [0.3, 0.7]),
        split="90,10,0",
        path_to_cache=str(cache),
        tokenizer=_Special(EOD_INSIDE, 10**4),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [count, 8, 0], lambda: True, options).build()[0]
    return [tuple(dataset[index]["tokens"].tolist()) for index in range(count)]


def test_validation_does_not_depend_on_the_steps(home, tmp_path):
    for paths in ([home / "a"], blend(home)):
        one, other = (built(tmp_path, config(*paths, train_iters=steps, eval_iters=2))[1] for steps in (3, 50))
        assert ids(one, 0, 16) == ids(other, 0, 16)
    assert built(tmp_path, config(home / "a", eval_iters=0))[1] is None
    assert built(tmp_path, config(home / "a", split="100,0,0"))[1] is None


def test_nothing_is_written_beside_the_data(home, tmp_path):
    before = sorted(home.iterdir())
    built(tmp_path / "cache", config(*blend(home)))
    assert sorted(home.iterdir()) == before
    assert any((tmp_path / "cache").iterdir())


CHANGES = {
    "another seed": (dict(seed=5), "--seed 1234, not 5"),
    "another length": (dict(seq_length=9), "--seq-length 8, not 9"),
    "another split": (dict(split="80,20,0"), "--split 90,10,0, not 80,20,0"),
    "another weight": (dict(data_path=(0.5, "a", 0.5, "b")), "a with the weight 0.3, not 0.5"),
    "another number of sets": (dict(data_path=("a",)), "sets: 2, not 1"),
    "another set": (dict(data_path=(0.3, "a", 0.7, "longer")), "b (now longer) with sequences: 60, not 61"),
    "other documents": (dict(data_path=(0.3, "a", 0.7, "other")), "with an .idx of sha256"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_an_order_that_does_not_fit_is_refused(home, tmp_path, case):
    change, words = CHANGES[case]
    if "data_path" in change:
        paths = [each if isinstance(each, float) else tmp_path / each for each in change["data_path"]]
        change = change | {"data_path": tuple(paths)}
    rows = documents(NUM_DOCUMENTS, seed=1)
    for name, content in {
        "a": documents(),
        "b": rows,
        "longer": [*rows, [1]],
        "other": [rows[1], rows[0], *rows[2:]],
    }.items():
        write(tmp_path / name, content)
    _, _, order = built(tmp_path / "cache", config(*blend(home)))
    with pytest.raises(ConfigError) as caught:
        built(tmp_path / "cache", dataclasses.replace(config(*blend(tmp_path)), **change), restored(order))
    assert words in str(caught.value)
    built(tmp_path / "cache", config(*blend(tmp_path)), restored(order))  # moved data are the same data


def test_data_of_the_same_lengths_are_told_apart_by_their_manifest(workspace, tmp_path):
    other = tmp_path / "text_text_document"
    for suffix in (".bin", ".idx"):
        other.with_name(other.name + suffix).write_bytes((workspace / f"text_text_document{suffix}").read_bytes())
    facts = json.loads((workspace / "text_text_document.manifest.json").read_text("utf-8"))
    other.with_name(f"{other.name}.manifest.json").write_text(json.dumps(facts | {"bin_sha256": "0" * 64}), "utf-8")
    _, _, order = built(tmp_path / "cache", config(workspace / "text"))
    with pytest.raises(ConfigError, match=r"with a \.bin of sha256 [0-9a-f]{12}, not 000000000000"):
        built(tmp_path / "cache", config(other), restored(order))


def test_a_segment_that_comes_out_otherwise_is_refused(home, tmp_path):
    _, _, order = built(tmp_path, config(home / "a"))
    values = order.to_dict()
    values["sources"][0]["segments"][0]["length"] += 1
    with pytest.raises(ConfigError, match="segment 0 of a has"):
        built(tmp_path, config(home / "a"), DataOrder.from_dict(values))
    with pytest.raises(TrainerError, match="order of the data is broken"):
        DataOrder.from_dict({"kind": "pretrain"})


# --- fine-tuning --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(workspace, tmp_path_factory):
    """The rows of `tune`, packed to 255 tokens."""
    prefix = tmp_path_factory.mktemp("packed") / "tune"
    options = dict(tokenizer=workspace / "hf", append_eod=True, handler_name="GeneralInstructionHandler")
    prepare([workspace / "tune.jsonl"], prefix, pack_length=255, **options)
    return prefix


def losses_of(model, samples, row_numbers):
    """Each row's summed loss, by the loader's own batches of one."""
    loader = Loader(samples=samples, vocab_size=10**4, micro_batch_size=1, num_microbatches=1, dp_rank=0, dp_size=1)
    sums = []
    with torch.no_grad():
        for number in row_numbers:
            batch = next(loader.step(number))
            options = dict(position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens)
            sums.append(model(batch.tokens, labels=batch.labels, **options).sum().item())
    return sums


def test_packed_documents_have_the_loss_that_they_have_alone(workspace, packed):
    model = load_model(workspace / "hf")
    together = InstructionSamples(packed, 254, 2, seed=5)
    alone = InstructionSamples(workspace / "tune", 254, 2, seed=5)
    assert together.reset_attention_mask
    assert not alone.reset_attention_mask
    of_document = dict(zip(map(alone._row, range(len(alone))), losses_of(model, alone, range(len(alone))), strict=True))
    of_pack = dict(
        zip(map(together._row, range(len(together))), losses_of(model, together, range(len(together))), strict=True)
    )
    numbers = iter(range(len(alone)))
    for pack in range(len(together)):
        mask = IndexedDataset(f"{packed}_packed_attention_mask_document")[pack]
        expected = sum(of_document[next(numbers)] for _ in range(mask.max()))
        assert of_pack[pack] == pytest.approx(expected, rel=1e-5)
    assert next(numbers, None) is None

    packs = [at for at in range(len(together)) if len(together[at].lengths) > 2]
    assert packs, "several documents have to be in one row"
    sample = together[packs[0]]
    with torch.no_grad():
        without = model(sample.tokens[None], labels=sample.labels[None]).sum().item()
    assert abs(without - of_pack[together._row(packs[0])]) > 0.01, "documents that see each other have to differ"


def foreign(prefix, rows, labels, mask):
    for key, content in {"input_ids": rows, "labels": labels, "attention_mask": mask}.items():
        write(f"{prefix}_packed_{key}_document", content)


def test_foreign_rows_are_packed_where_their_mask_numbers_them(tmp_path):
    """Every token is labelled, so that a label that crosses a border would be seen; zeros at the end are padding."""
    rows = [[11, 12, 13, 14, 15, 16, 17], [21, 22, 23, 24]]
    foreign(tmp_path / "p", rows, [rows[0], [21, 22, -100, -100]], [[1, 1, 1, 2, 2, 3, 3], [1, 1, 0, 0]])
    samples = InstructionSamples(tmp_path / "p", 8, 0, seed=0)
    by_row = {samples._row(at): samples[at] for at in range(2)}
    assert_sample(by_row[0], [11, 12, 13, 14, 15, 16, 0, 0], [12, 13, -100, 15, -100, 17, -100, -100], (3, 2, 1, 2))
    assert_sample(by_row[1], [21, 22, 23, 0, 0, 0, 0, 0], [22, -100, -100, -100, -100, -100, -100, -100], (2, 1, 5))
    cut = InstructionSamples(tmp_path / "p", 3, 0, seed=0)  # behind the last token of a document
    by_row = {cut._row(at): cut[at] for at in range(2)}
    assert_sample(by_row[0], [11, 12, 13], [12, 13, -100], (3,))


def test_rows_of_one_document_stay_as_they_are(tmp_path):
    foreign(tmp_path / "p", [[11, 12, 13]], [[11, 12, 13]], [[1, 1, 1]])
    samples = InstructionSamples(tmp_path / "p", 4, 0, seed=0)
    assert not samples.reset_attention_mask
    assert_sample(samples[0], [11, 12, 0, 0], [12, 13, -100, -100], (4,))


def assert_sample(sample, tokens, labels, lengths):
    assert isinstance(sample, Sample)
    assert sample.tokens.tolist() == tokens
    assert sample.labels.tolist() == labels
    assert sample.lengths == lengths


def test_files_that_do_not_fit_each_other_are_refused(tmp_path):
    foreign(tmp_path / "p", [[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 5, 6]], [[1, 1, 1], [1, 1]])
    with pytest.raises(TrainerError, match="row 1 has 2 input_ids but 3 of labels"):
        InstructionSamples(tmp_path / "p", 4, 0, seed=0)
    foreign(tmp_path / "p", [[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 5]], [[1, 1, 2]])
    with pytest.raises(TrainerError, match="2 rows of input_ids but 1 of attention_mask"):
        InstructionSamples(tmp_path / "p", 4, 0, seed=0)


def test_packed_rows_without_their_mask_are_refused(packed, tmp_path):
    for file in packed.parent.iterdir():
        if "attention_mask" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=r"no such data set: .*attention_mask"):
        data_files(config(tmp_path / "tune"), "finetune")


def test_the_order_of_instruction_data(workspace, packed):
    _, order = instruction_samples(config(workspace / "tune"), pad_token_id=2)
    assert [each.name.split("_")[2] for each in order.sources] == ["input", "labels", "attention"]
    instruction_samples(config(workspace / "tune", train_iters=500), pad_token_id=2, order=restored(order))
    with pytest.raises(ConfigError, match="--seed 1234, not 5"):
        instruction_samples(config(workspace / "tune", seed=5), pad_token_id=2, order=restored(order))
    with pytest.raises(ConfigError, match="with sequences: 50, not"):
        instruction_samples(config(packed), pad_token_id=2, order=restored(order))


# --- the loader and the checks ------------------------------------------------------------------------------------


def loader_of(samples, micro_batch_size, dp_rank, dp_size, global_batch_size=8, vocab_size=10**4):
    count = global_batch_size // (micro_batch_size * dp_size)
    sizes = dict(micro_batch_size=micro_batch_size, num_microbatches=count, dp_rank=dp_rank, dp_size=dp_size)
    return Loader(samples=samples, vocab_size=vocab_size, **sizes)


def test_a_step_has_the_same_samples_on_any_layout(home, tmp_path):
    """A run may stop on one layout and go on with another: the next step begins behind the samples consumed."""
    samples, _, _ = built(tmp_path, config(home / "a"))
    for first in (0, 8, 24):
        expected = sorted(ids(samples, first, first + 8))
        for micro_batch_size, dp_size in ((8, 1), (1, 1), (2, 2), (1, 4)):
            loaders = [loader_of(samples, micro_batch_size, rank, dp_size) for rank in range(dp_size)]
            rows = [tuple(row.tolist()) for each in loaders for batch in each.step(first) for row in batch.tokens]
            assert sorted(rows) == expected
            assert {each.names(first) for each in loaders} == {f"samples {first} to {first + 7}"}
    second = [tuple(row.tolist()) for batch in loader_of(samples, 2, 1, 2).step(0) for row in batch.tokens]
    assert second == ids(samples, 2, 4) + ids(samples, 6, 8), "micro-batches are given out in turn"


class Rows:
    """Two samples of given ids."""

    reset_attention_mask = reset_position_ids = False

    def __init__(self, tokens, labels):
        self._sample = Sample(torch.tensor(tokens), torch.tensor(labels), (len(tokens),))

    def __getitem__(self, index):
        return self._sample


@pytest.mark.parametrize(
    ("tokens", "labels", "stranger"),
    [([1, 40], [1, 2], 40), ([1, 2], [1, 41], 41), ([-1, 2], [1, 2], -1), ([1, 2], [-100, -7], -7)],
)
def test_ids_outside_the_vocabulary_are_named(tokens, labels, stranger):
    with pytest.raises(TrainerError, match=f"samples 4 to 5 hold the token id {stranger}, .* 40 entries"):
        list(loader_of(Rows(tokens, labels), 2, 0, 1, global_batch_size=2, vocab_size=40).step(4))
    list(loader_of(Rows([0, 39], [-100, 39]), 2, 0, 1, global_batch_size=2, vocab_size=40).step(4))


def test_every_set_of_a_blend_is_looked_at(home, tmp_path):
    with pytest.raises(ConfigError, match=r"no such data set: .*nowhere\.idx"):
        data_files(config(0.5, home / "a", 0.5, tmp_path / "nowhere"), "pretrain")
    assert data_files(config(*blend(home)), "pretrain") == [home / "a", home / "b"]
    with pytest.raises(ConfigError, match="names 2 data sets: fine-tuning reads one"):
        data_files(config(*blend(home)), "finetune")
    with pytest.raises(ConfigError, match=r"no text for validation of the 60 documents of .*b"):
        check_split(config(*blend(home), split="999,1,0"), home / "b")
    check_split(config(*blend(home), split="999,1,0", eval_iters=0), home / "b")
