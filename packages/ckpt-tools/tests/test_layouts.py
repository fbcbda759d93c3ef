"""Every format that is split over ranks: file by file what it should hold, back bit for bit, and read by others."""

import itertools
import json
import tempfile
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import ascendspeed
import pytest
import torch
from ckpt_tools import Layout, UsageError, convert, inspect, open_checkpoint, reshard, verify
from hypothesis import given, settings
from hypothesis import strategies as st
from models import hf_state, megatron_state, read_hf, same_bits, small, write_hf

SPLIT = ("megatron-core", "ascendspeed", "ascendspeed-flat", "deepspeed")
KINDS = {"ascendspeed": "nested", "ascendspeed-flat": "flat"}


@st.composite
def layouts(draw):
    """(config, format, layout) that go together."""
    form = draw(st.sampled_from(SPLIT))
    tp = draw(st.sampled_from([1, 2, 4]))
    pp = 1 if form == "deepspeed" else draw(st.sampled_from([1, 2, 3]))
    groups = tp * draw(st.sampled_from([1, 2, 4]))
    options = {"merge_mlp": draw(st.booleans())}
    num_layers = pp * draw(st.integers(1, 2))
    if pp > 1 and form != "ascendspeed-flat" and draw(st.booleans()):
        size = draw(st.sampled_from([1, 2]))
        num_layers = pp * size * draw(st.sampled_from([1, 2]))
        options["num_layers_per_virtual_pipeline_stage"] = size
    elif pp > 1 and draw(st.booleans()):
        options["num_layer_list"] = tuple(draw(st.lists(st.integers(1, 3), min_size=pp, max_size=pp)))
        num_layers = sum(options["num_layer_list"])
    if form == "deepspeed":
        options["naming"] = draw(st.sampled_from([None, "ascendspeed", "ascendspeed-flat", "megatron-core"]))
    config = small(
        num_layers=num_layers,
        hidden_size=8,
        ffn_hidden_size=tp * draw(st.integers(1, 5)),
        num_attention_heads=groups * draw(st.sampled_from([1, 2, 3])),
        num_query_groups=groups,
        kv_channels=2,
        vocab_size=draw(st.integers(3, 70)),
    )
    divisor, added = draw(st.sampled_from([None, 1, 3])), draw(st.sampled_from([0, 2]))
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return config, form, Layout(**sizes, make_vocab_size_divisible_by=divisor, added_token_num=added, **options)


@given(layouts(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@settings(max_examples=120, deadline=None)
def test_files_are_as_they_should_be_and_lead_back(drawn, dtype):
    config, form, layout = drawn
    state = hf_state(config, dtype)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = write_hf(root / "hf", config, state)
        convert(source, root / "split", to=form, layout=layout)
        check_files(root / "split", config, form, layout, state)
        convert(root / "split", root / "back", to="hf")
        back = read_hf(root / "back")
        assert back.keys() == state.keys()
        assert all(same_bits(back[name], state[name]) for name in state)
        found = inspect(root / "split")
        assert (found["format"], found["config"]) == (form, asdict(config))
        assert found["tensor_model_parallel_size"] == layout.tensor_model_parallel_size
        assert found["pipeline_model_parallel_size"] == layout.pipeline_model_parallel_size


def check_files(folder, config, form, layout, state):
    """Each rank's file against what torch makes of Hugging Face's tensors."""
    naming = layout.naming or ("ascendspeed" if form == "deepspeed" else form)
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    divisor = layout.make_vocab_size_divisible_by or (1 if form == "megatron-core" else 128)
    padded = -(-(config.vocab_size + layout.added_token_num) // (tp * divisor)) * tp * divisor
    padded_state = {name: padded_table(name, tensor, padded) for name, tensor in state.items()}
    two_orders = naming != "megatron-core" and tp < config.num_query_groups < config.num_attention_heads
    for t, p in itertools.product(range(tp), range(pp)):
        content = torch.load(file_of(folder, form, t, p, pp), weights_only=form != "megatron-core")
        chunks = chunks_of(config.num_layers, layout)[p]
        root = "module" if form == "deepspeed" else "model"
        roots = [root] if len(chunks) == 1 else [f"{root}{n}" for n in range(len(chunks))]
        others = {"deepspeed": {"checkpoint_version", "dp_world_size"}, "megatron-core": {"args", "iteration"}}
        order = {"qkv_order"} if two_orders else set()
        assert content.keys() == {*roots, "checkpoint_version", *others.get(form, ()), *order}
        assert content.get("qkv_order", "megatron") == "megatron"
        for key, layers in zip(roots, chunks, strict=True):
            if naming == "megatron-core":
                expected = megatron_state(padded_state, config, layers, tp, t)
            else:
                options = {"merge_mlp": layout.merge_mlp, "divisor": 1}
                expected = ascendspeed.model(KINDS[naming], padded_state, config, layers, tp, t, **options)
            assert_same(content[key], expected)


def padded_table(name, tensor, rows):
    table = name in ("model.embed_tokens.weight", "lm_head.weight")
    return torch.cat([tensor, tensor[-1:].repeat(rows - len(tensor), 1)]) if table else tensor


def file_of(folder, form, tp_rank, stage, pp):
    if form == "deepspeed":
        return folder / f"release/mp_rank_{tp_rank:02d}_model_states.pt"
    iteration = "iter_0000001" if form == "megatron-core" else "release"
    return folder / iteration / f"mp_rank_{tp_rank:02d}{f'_{stage:03d}' if pp > 1 else ''}" / "model_optim_rng.pt"


def chunks_of(num_layers, layout):
    """[stage][chunk]: Megatron's own rule, chunk v of stage p begins at v·(L / V) + p·(L / (P·V))."""
    stages = layout.pipeline_model_parallel_size
    if layout.num_layer_list:
        ends = list(itertools.accumulate(layout.num_layer_list))
        return [[range(end - n, end)] for n, end in zip(layout.num_layer_list, ends, strict=True)]
    size = layout.num_layers_per_virtual_pipeline_stage or num_layers // stages
    turns = num_layers // stages // size
    starts = [[v * (num_layers // turns) + p * size for v in range(turns)] for p in range(stages)]
    return [[range(start, start + size) for start in of_stage] for of_stage in starts]


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert list(found) == list(expected) or found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif not isinstance(expected, torch.Tensor):
        assert found == expected
    elif expected.ndim == 1 and expected.dtype == torch.float32 and not same_bits(found, expected):
        torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)  # inv_freq: the last bit of a power
    else:
        assert same_bits(found, expected)


def test_names_and_trackers_are_upstreams(tmp_path):
    """The control of the two tables, ours and the tests': AscendSpeed's names spelled out once more."""
    config = small(num_layers=2, num_query_groups=4)
    write_hf(tmp_path / "hf", config, hf_state(config))
    stages = Layout(pipeline_model_parallel_size=2)
    for form in SPLIT:
        convert(tmp_path / "hf", tmp_path / form, to=form, layout=Layout() if form == "deepspeed" else stages)
    trackers = {form: next(tmp_path.glob(f"{form}/latest*")) for form in SPLIT}
    assert {form: (file.name, file.read_bytes()) for form, file in trackers.items()} == {
        "megatron-core": ("latest_checkpointed_iteration.txt", b"1"),
        "ascendspeed": ("latest_checkpointed_iteration.txt", b"release\n"),
        "ascendspeed-flat": ("latest_checkpointed_iteration.txt", b"release\n"),
        "deepspeed": ("latest", b"release\n"),
    }
    last = torch.load(tmp_path / "ascendspeed/release/mp_rank_00_001/model_optim_rng.pt", weights_only=True)
    assert last["checkpoint_version"] == 3.0
    assert last["model"]["language_model"]["embedding"] == {"word_embeddings": {"weight": {}}}
    assert list(last["model"]["language_model"]["encoder"]) == [
        "layers.0.input_layernorm.weight",
        "layers.0.self_attention.query_key_value.weight",
        "layers.0.self_attention.dense.weight",
        "layers.0.post_attention_layernorm.weight",
        "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.dense_h_to_4h.weight",
        "layers.0.mlp.dense_4h_to_h.weight",
        "final_layernorm.weight",
    ]
    assert list(last["model"]["language_model"]["output_layer"]) == ["weight"]
    flat = torch.load(tmp_path / "ascendspeed-flat/release/mp_rank_00_000/model_optim_rng.pt", weights_only=True)
    assert set(flat["model"]) == {
        "embedding.word_embeddings.weight",
        "language_model.layers.0.input_layernorm.weight",
        "language_model.layers.0.attention.query_key_value.weight",
        "language_model.layers.0.attention.dense.weight",
        "language_model.layers.0.attention.rotary_emb.inv_freq",
        "language_model.layers.0.post_attention_layernorm.weight",
        "language_model.layers.0.mlp.gate_proj.weight",
        "language_model.layers.0.mlp.up_proj.weight",
        "language_model.layers.0.mlp.down_proj.weight",
    }
    zero = torch.load(tmp_path / "deepspeed/release/mp_rank_00_model_states.pt", weights_only=True)
    assert {key: value for key, value in zero.items() if key != "module"} == {
        "checkpoint_version": 3.0,
        "dp_world_size": 0,
    }


@given(layouts(), layouts())
@settings(max_examples=40, deadline=None)
def test_any_to_any(first, second):
    """From one layout straight into another: the files are those that Hugging Face's folder gives."""
    config, one, layout = first
    _, other, wanted = second
    try:
        wanted.chunks(config.num_layers)
    except UsageError:
        wanted = Layout(merge_mlp=wanted.merge_mlp)
    if config.num_query_groups % wanted.tensor_model_parallel_size:
        wanted = Layout(merge_mlp=wanted.merge_mlp)
    if config.ffn_hidden_size % wanted.tensor_model_parallel_size:
        wanted = Layout(merge_mlp=wanted.merge_mlp)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = write_hf(root / "hf", config, hf_state(config))
        convert(source, root / "one", to=one, layout=layout)
        convert(root / "one", root / "other", to=other, layout=wanted)
        convert(source, root / "straight", to=other, layout=wanted)
        files = [sorted(path for path in (root / name).rglob("*.pt")) for name in ("other", "straight")]
        assert len(files[0]) == len(files[1]) > 0
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


@pytest.mark.parametrize("form", SPLIT)
def test_swapped_tensors_are_caught(form, tmp_path):
    """The control: two tensors of one shape changed places in one rank's file."""
    config = small(num_query_groups=4)
    write_hf(tmp_path / "hf", config, hf_state(config))
    convert(tmp_path / "hf", tmp_path / "m", to=form, layout=Layout(tensor_model_parallel_size=2))
    assert verify(tmp_path / "hf", tmp_path / "m") == []
    file = file_of(tmp_path / "m", form, 1, 0, 1)
    content = torch.load(file, weights_only=False)
    tensors = content["module" if form == "deepspeed" else "model"]
    tensors = tensors["language_model"]["encoder"] if "language_model" in tensors else tensors
    dense = {name: t for name, t in tensors.items() if any(x in name for x in ("dense.weight", "linear_proj"))}
    one, other = sorted(dense)
    tensors[one], tensors[other] = tensors[other], tensors[one]
    torch.save(content, file)
    names = [difference.name for difference in verify(tmp_path / "hf", tmp_path / "m")]
    assert names == [f"decoder.layers.{n}.self_attention.linear_proj.weight" for n in (0, 1)]


class TestOrderOfHeads:
    """AscendSpeed's converter mixes up the query heads of several KV heads on a rank, and no file shows it."""

    CONFIG = small(num_layers=2, num_attention_heads=8, num_query_groups=2, kv_channels=2)

    @pytest.fixture(params=["nested", "flat", "zero"])
    def mixed(self, request, tmp_path):
        self.state = hf_state(self.CONFIG, torch.float32)
        self.state = {name: torch.randn(tensor.shape) for name, tensor in self.state.items()}
        self.source = write_hf(tmp_path / "hf", self.CONFIG, self.state)
        zero = request.param == "zero"
        kind = "nested" if zero else request.param
        options = {"merge_mlp": True, "divisor": 1, "mixed": True, "deepspeed": zero}
        return ascendspeed.save(tmp_path / "mixed", kind, self.state, self.CONFIG, 1, **options)

    def test_the_fixture_is_upstreams(self):
        """As measured with AscendSpeed's converter, 8 query heads and 2 KV heads at TP 1."""
        heads = [torch.arange(count).repeat_interleave(2).view(-1, 1) for count in (8, 2, 2)]
        named = [part + start for part, start in zip(heads, (0, 100, 200), strict=True)]
        c = small(hidden_size=1, num_attention_heads=8, num_query_groups=2, kv_channels=2)
        order = ascendspeed.mixed_qkv(1)(*named, c)[::2, 0].tolist()
        assert order == [0, 2, 4, 6, 100, 200, 1, 3, 5, 7, 101, 201]

    def test_it_is_asked_for(self, mixed, tmp_path):
        for run in (
            lambda: convert(mixed, tmp_path / "out", to="hf", config=self.source),
            lambda: verify(mixed, self.source, config=self.source),
        ):
            with pytest.raises(UsageError, match="--qkv-order, or --reference"):
                run()
        assert inspect(mixed, self.source)["parameters"] == sum(t.numel() for t in self.state.values())
        assert not (tmp_path / "out").exists()

    def test_each_order_is_read(self, mixed, tmp_path):
        assert verify(mixed, self.source, config=self.source, qkv_order="ascendspeed") == []
        names = {d.name for d in verify(mixed, self.source, config=self.source, qkv_order="megatron")}
        assert names == {f"decoder.layers.{n}.self_attention.linear_qkv.weight" for n in range(2)}
        ours = tmp_path / "ours"
        written = convert(self.source, ours, to="ascendspeed")
        assert "Megatron's order" in written.notes[0]
        assert verify(ours, self.source) == []  # its files say so
        with pytest.raises(UsageError, match=r"given as ascendspeed, .* says megatron"):
            verify(ours, self.source, qkv_order="ascendspeed")
        convert(self.source, tmp_path / "core", to="megatron-core")  # which has one order, whatever is said
        assert verify(mixed, tmp_path / "core", config=self.source, qkv_order="ascendspeed") == []

    def test_the_reference_decides(self, mixed, tmp_path):
        convert(mixed, tmp_path / "back", to="hf", config=self.source, reference=self.source)
        assert verify(tmp_path / "back", self.source) == []
        convert(self.source, tmp_path / "ours", to="ascendspeed")
        reshard(tmp_path / "ours", tmp_path / "resharded", Layout(), reference=self.source)
        assert verify(tmp_path / "resharded", self.source) == []
        trained = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in self.state.items()}
        near = write_hf(tmp_path / "near", self.CONFIG, trained)
        convert(mixed, tmp_path / "by-near", to="hf", config=self.source, reference=near)
        assert verify(tmp_path / "by-near", self.source) == []
        stranger = {name: torch.randn(tensor.shape) for name, tensor in self.state.items()}
        other = write_hf(tmp_path / "other", self.CONFIG, stranger)
        with pytest.raises(UsageError, match="give one of them"):
            open_checkpoint(mixed, qkv_order="megatron", reference=other)
        with pytest.raises(UsageError, match="no order of heads"):
            open_checkpoint(mixed, qkv_order="ascend-speed")
        with pytest.raises(UsageError, match="in neither order"):
            convert(mixed, tmp_path / "none", to="hf", config=self.source, reference=other)
        wide = small(num_layers=2, num_attention_heads=8, num_query_groups=2, kv_channels=2, ffn_hidden_size=32)
        with pytest.raises(UsageError, match=r"ffn_hidden_size is 24 in .*, 32 in the reference"):
            convert(
                mixed,
                tmp_path / "none",
                to="hf",
                config=self.source,
                reference=write_hf(tmp_path / "wide", wide, hf_state(wide)),
            )


@pytest.mark.parametrize("groups", [2, 8], ids=["a-kv-head-on-each-rank", "mha"])
def test_one_order_needs_no_question(groups, tmp_path):
    config = small(num_attention_heads=8, num_query_groups=groups, kv_channels=2)
    state = hf_state(config)
    source = write_hf(tmp_path / "hf", config, state)
    upstream = ascendspeed.save(tmp_path / "up", "nested", state, config, 2, merge_mlp=True, mixed=True, pp=2)
    assert verify(upstream, source, config=source) == []
    written = convert(
        source,
        tmp_path / "ours",
        to="ascendspeed",
        layout=Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, merge_mlp=True),
    )
    assert written.notes == ()
    for file in (tmp_path / "up").rglob("*.pt"):
        ours = torch.load(tmp_path / "ours" / file.relative_to(upstream), weights_only=True)
        assert_same(ours, torch.load(file, weights_only=True))


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_columns_of_a_wider_matrix_are_read(dtype, tmp_path):
    """torch.save keeps the whole matrix of a slice that was not copied, and notes the distance of its rows."""
    config = small()
    state = {name: tensor.nan_to_num(0, 0, 0) for name, tensor in hf_state(config).items()}
    source = write_hf(tmp_path / "hf", config, state)
    folder = tmp_path / "m/mp_rank_00"
    for rank in range(2):
        tensors = megatron_state(state, config, range(config.num_layers), 2, rank)
        assert not tensors["decoder.layers.0.mlp.linear_fc2.weight"].is_contiguous()
        folder.with_name(f"mp_rank_{rank:02d}").mkdir(parents=True)
        torch.save({"model": tensors}, folder.with_name(f"mp_rank_{rank:02d}") / "model_optim_rng.pt")
    convert(tmp_path / "m", tmp_path / "back", to="hf", config=source, dtype=dtype)
    convert(source, tmp_path / "expected", to="hf", dtype=dtype)
    assert verify(tmp_path / "back", tmp_path / "expected") == []


def test_what_ascendspeed_trained_is_read(tmp_path):
    """Its args call its own network by the defaults of options that it does not look at."""
    config = small(num_query_groups=4)
    source = write_hf(tmp_path / "hf", config, hf_state(config))
    trained = ascendspeed.save(tmp_path / "trained", "nested", hf_state(config), config, 1, merge_mlp=True)
    file = trained / "release/mp_rank_00/model_optim_rng.pt"
    args = Namespace(num_layers=2, swiglu=False, normalization="LayerNorm", position_embedding_type="absolute")
    torch.save({**torch.load(file, weights_only=True), "args": args, "iteration": 7, "optimizer": {}}, file)
    assert verify(trained, source, config=source) == []


def test_args_that_say_half_are_compared(tmp_path):
    """AscendSpeed's trained checkpoints have args, which lack the vocabulary's true size."""
    config = small(num_query_groups=4)
    source = write_hf(tmp_path / "hf", config, hf_state(config))
    trained = ascendspeed.save(tmp_path / "trained", "nested", hf_state(config), config, 1, merge_mlp=True)
    file = trained / "release/mp_rank_00/model_optim_rng.pt"
    args = Namespace(num_layers=2, hidden_size=16, num_attention_heads=4, layernorm_epsilon=1e-6)
    torch.save({**torch.load(file, weights_only=True), "args": args, "iteration": 7}, file)
    assert inspect(trained)["config"] is None
    with pytest.raises(UsageError, match="layernorm_epsilon is 1e-05 in the configuration given, 1e-06 in the args"):
        convert(trained, tmp_path / "out", to="hf", config=source)


def test_what_no_file_says_is_asked_for(tmp_path):
    config = small(num_query_groups=4)
    state = hf_state(config)
    upstream = ascendspeed.save(tmp_path / "up", "flat", state, config, 2, merge_mlp=False)
    assert inspect(upstream)["config"] is None
    with pytest.raises(UsageError, match="heads, eps, rotary base and true vocabulary size: give --config"):
        reshard(upstream, tmp_path / "out", Layout())
    source = write_hf(tmp_path / "hf", config, state)
    reshard(upstream, tmp_path / "out", Layout(), config=source)
    assert inspect(tmp_path / "out")["format"] == "ascendspeed-flat"
    assert verify(tmp_path / "out", source) == []
    assert json.loads((tmp_path / "out/config.json").read_text())["rms_norm_eps"] == config.layernorm_epsilon
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert not checkpoint.layout.merge_mlp


@pytest.mark.parametrize(
    ("to", "layout", "said"),
    [
        ("ascendspeed", {"tensor_model_parallel_size": 4}, "2 query groups (KV heads) do not divide among 4"),
        ("deepspeed", {"pipeline_model_parallel_size": 2}, "has no pipeline stages"),
        ("ascendspeed", {"naming": "megatron-core"}, "naming is for the format deepspeed"),
        ("megatron-core", {"num_layer_list": (1, 2), "pipeline_model_parallel_size": 2}, "names 3 layers on 2 stages"),
        ("megatron-core", {"num_layer_list": (2, 0), "pipeline_model_parallel_size": 2}, "each pipeline stage needs"),
        ("megatron-core", {"num_layers_per_virtual_pipeline_stage": 1}, "pipeline_model_parallel_size of 2 or more"),
        (
            "megatron-core",
            {"num_layers_per_virtual_pipeline_stage": 2, "pipeline_model_parallel_size": 2},
            "the 1 layers of a pipeline stage do not divide into chunks of 2",
        ),
        ("megatron-core", {"added_token_num": -1}, "must not be negative"),
        ("megatron-core", {"added_token_num": 10**9}, "would be padded to 1000000037"),
    ],
)
def test_layouts_that_are_impossible(model, tmp_path, to, layout, said):
    with pytest.raises(UsageError) as caught:
        convert(model, tmp_path / "out", to=to, layout=Layout(**layout))
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_resharding_keeps_the_names(model, tmp_path):
    merged = Layout(merge_mlp=True, naming="ascendspeed-flat")
    convert(model, tmp_path / "zero", to="deepspeed", layout=merged)
    reshard(tmp_path / "zero", tmp_path / "two", Layout(tensor_model_parallel_size=2))
    found = inspect(tmp_path / "two")
    assert (found["naming"], found["merge_mlp"]) == ("ascendspeed-flat", True)
    with pytest.raises(UsageError, match="has the names of ascendspeed-flat"):
        reshard(tmp_path / "zero", tmp_path / "x", Layout(naming="ascendspeed"))
    convert(model, tmp_path / "apart", to="ascendspeed")
    with pytest.raises(UsageError, match="has gate and up projection apart"):
        reshard(tmp_path / "apart", tmp_path / "x", Layout(merge_mlp=True))


def test_the_70b_recipe_at_scaled_widths(tmp_path):
    """80 layers, 64 heads, 8 KV heads: TP 8 PP 8, resharded to TP 8 PP 1, and back."""
    config = small(num_layers=80, hidden_size=64, num_attention_heads=64, num_query_groups=8, kv_channels=2)
    state = hf_state(config)
    source = write_hf(tmp_path / "hf", config, state, shards=3)
    sizes = {"tensor_model_parallel_size": 8, "merge_mlp": True}
    convert(source, tmp_path / "pp8", to="ascendspeed", layout=Layout(pipeline_model_parallel_size=8, **sizes))
    assert len(list((tmp_path / "pp8/release").iterdir())) == 64
    reshard(tmp_path / "pp8", tmp_path / "pp1", Layout(**sizes))
    assert len(list((tmp_path / "pp1/release").iterdir())) == 8
    convert(tmp_path / "pp1", tmp_path / "back", to="hf")
    back = read_hf(tmp_path / "back")
    assert back.keys() == state.keys()
    assert all(same_bits(back[name], state[name]) for name in state)
    uneven = Layout(pipeline_model_parallel_size=7, num_layer_list=(12, 12, 12, 12, 12, 12, 8), **sizes)
    reshard(tmp_path / "pp1", tmp_path / "pp7", uneven)
    assert inspect(tmp_path / "pp7")["num_layer_list"] == (12, 12, 12, 12, 12, 12, 8)
    assert verify(tmp_path / "pp7", source) == []
