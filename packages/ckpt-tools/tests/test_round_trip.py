"""Every layout holds the same bits: against a separate computation, and back again."""

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from ckpt_tools import Layout, UsageError, convert, open_checkpoint, reshard, sharding, verify
from hypothesis import given, settings
from hypothesis import strategies as st
from models import hf_shapes, hf_state, megatron_state, rank_file, read_hf, same_bits, small, write_hf

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def layouts(draw):
    """(config, tp, pp, divisor) that divide."""
    tp, pp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([g for g in (1, 2, 4, 8) if g % tp == 0 or tp % g == 0]))
    heads = groups * draw(st.sampled_from([r for r in (1, 2, 4) if groups * r % tp == 0]))
    config = small(
        num_layers=pp * draw(st.integers(1, 2)),
        hidden_size=draw(st.sampled_from([8, 12])),
        ffn_hidden_size=tp * draw(st.integers(1, 7)),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=draw(st.sampled_from([2, 4])),
        vocab_size=draw(st.integers(3, 70)),
    )
    return config, tp, pp, draw(st.sampled_from([1, 3, 8, 64]))


@given(layouts(), DTYPES, st.sampled_from([1, 3]))
@settings(max_examples=60, deadline=None)
def test_hf_to_megatron_and_back(layout, dtype, shards):
    config, tp, pp, divisor = layout
    state = hf_state(config, dtype)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = write_hf(root / "hf", config, state, shards)
        convert(
            source,
            root / "megatron",
            to="megatron-core",
            layout=Layout(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                make_vocab_size_divisible_by=divisor,
            ),
        )
        for t, p in itertools.product(range(tp), range(pp)):
            file = rank_file(root / "megatron/iter_0000001", t, p, pp)
            written = torch.load(file, weights_only=False)["model"]
            share = config.num_layers // pp
            layers = range(p * share, (p + 1) * share)
            expected = megatron_state(state, config, layers, tp, t, divisor)
            assert written.keys() == expected.keys()
            assert all(same_bits(written[name], expected[name]) for name in expected)
        convert(root / "megatron", root / "back", to="hf")
        back = read_hf(root / "back")
        assert back.keys() == state.keys()
        assert all(same_bits(back[name], state[name]) for name in state)
        with open_checkpoint(root / "back") as checkpoint:
            assert checkpoint.config == config


@given(layouts(), layouts(), DTYPES)
@settings(max_examples=30, deadline=None)
def test_resharding_is_converting_directly(first, second, dtype):
    config, tp, pp, divisor = first
    _, new_tp, _, new_divisor = second
    if config.num_attention_heads % new_tp or config.ffn_hidden_size % new_tp:
        new_tp = tp
    groups = config.num_query_groups
    if groups % new_tp and new_tp % groups:
        new_tp = tp
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = write_hf(root / "hf", config, hf_state(config, dtype))
        new = Layout(tensor_model_parallel_size=new_tp, make_vocab_size_divisible_by=new_divisor)
        old = Layout(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, make_vocab_size_divisible_by=divisor
        )
        convert(source, root / "a", to="megatron-core", layout=old)
        reshard(root / "a", root / "b", new)
        convert(source, root / "c", to="megatron-core", layout=new)
        for t in range(new_tp):
            files = [rank_file(root / x / "iter_0000001", t, 0, 1).read_bytes() for x in "bc"]
            assert files[0] == files[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cast_is_torchs(dtype, tmp_path):
    config = small()
    torch.manual_seed(3)
    state = {name: torch.randn(shape) for name, shape in hf_shapes(config).items()}
    source = write_hf(tmp_path / "hf", config, state)
    convert(source, tmp_path / "cast", to="hf", dtype=dtype)
    back = read_hf(tmp_path / "cast")
    assert all(same_bits(back[name], state[name].to(getattr(torch, dtype))) for name in state)
    with open_checkpoint(tmp_path / "cast") as checkpoint:
        assert checkpoint.dtype == dtype


def test_swapped_tensors_are_caught(model, tmp_path):
    """The control: two tensors of one shape changed places, in files that are otherwise whole."""
    state = read_hf(model)
    for one, other in [("mlp.gate_proj", "mlp.up_proj"), ("input_layernorm", "post_attention_layernorm")]:
        swapped = dict(state)
        a, b = (f"model.layers.1.{name}.weight" for name in (one, other))
        swapped[a], swapped[b] = state[b], state[a]
        target = write_hf(tmp_path / one, small(), swapped)
        names = {difference.name for difference in verify(model, target)}
        assert names
        assert all(name.startswith("decoder.layers.1.") for name in names)


def test_a_shard_is_what_the_rank_holds(model):
    config, state = small(), read_hf(model)
    with open_checkpoint(model) as checkpoint:
        for t in range(2):
            expected = megatron_state(state, config, range(config.num_layers), 2, t, divisor=16)
            for name in sharding(config):
                array = checkpoint.read_shard(name, t, 2, padded_vocab_size=64)
                assert same_bits(torch.from_numpy(array), expected[name])


@pytest.mark.parametrize(("rank", "size"), [(0, 3), (9, 4), (-1, 2), (0, 0)])
def test_a_shard_of_a_rank_that_cannot_be(model, rank, size):
    with open_checkpoint(model) as checkpoint:
        for name in ("output_layer.weight", "decoder.final_layernorm.weight"):
            with pytest.raises(UsageError):
                checkpoint.read_shard(name, rank, size)


def test_the_same_strange_numbers_are_no_difference(tmp_path):
    """Infinities and what is no number, in two types, and beside a number within the tolerance."""
    config = small()
    state = {name: torch.ones(shape) for name, shape in hf_shapes(config).items()}
    state["lm_head.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    one = write_hf(tmp_path / "one", config, state)
    half = write_hf(tmp_path / "half", config, {name: tensor.half() for name, tensor in state.items()})
    assert verify(one, half) == []
    state["lm_head.weight"][1, 1] += 0.01
    near = write_hf(tmp_path / "near", config, state)
    assert [difference.count for difference in verify(one, near)] == [1]
    assert verify(one, near, tolerance=0.1) == []
    state["lm_head.weight"][0, 1] = -float("inf")
    assert len(verify(one, write_hf(tmp_path / "far", config, state), tolerance=0.1)) == 1


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_slice_is_a_slice_of_the_whole(data):
    config = small()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_hf(root / "hf", config, hf_state(config))
        convert(
            root / "hf",
            root / "m",
            to="megatron-core",
            layout=Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        )
        name = data.draw(st.sampled_from(list(sharding(config))))
        with open_checkpoint(root / "m") as checkpoint:
            index = tuple(
                slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))))
                for n in checkpoint.shape(name)
            )
            whole, part = checkpoint.read(name), checkpoint.read(name, index)
            assert part.tobytes() == whole[index].tobytes()
