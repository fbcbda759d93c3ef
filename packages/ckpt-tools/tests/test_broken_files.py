"""What users meet: downloads that are no weights, shards cut short, tensors missing. One line each, and the fix."""

import io
import json
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from ckpt_tools import (
    CheckpointError,
    Layout,
    LlamaConfig,
    UsageError,
    convert,
    inspect,
    open_checkpoint,
    sharding,
    write_checkpoint,
)
from models import hf_state, rank_file, read_hf, small, write_hf
from safetensors.torch import save_file

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9976578928\n"
PAGE = "\n<!DOCTYPE html>\n<html><body>blob</body></html>"


def message(call, *args, error=CheckpointError, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def megatron(model, tmp_path):
    layout = Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    convert(model, tmp_path / "megatron", to="megatron-core", layout=layout)
    return tmp_path / "megatron"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_page_or_a_pointer_in_place_of_a_file(model, file):
    (model / file).write_text(LFS)
    assert "git lfs pull" in message(open_checkpoint, model)
    (model / file).write_text(PAGE)
    assert "/resolve/" in message(open_checkpoint, model)


def test_a_pointer_in_place_of_a_shard_or_its_index(tmp_path):
    folder = write_hf(tmp_path / "hf", small(), hf_state(small()), shards=2)
    (folder / "model-00002-of-00002.safetensors").write_text(LFS)
    assert "model-00002-of-00002.safetensors is a Git-LFS pointer" in message(open_checkpoint, folder)
    (folder / "model.safetensors.index.json").write_text(PAGE)
    assert "HTML or XML page" in message(open_checkpoint, folder)


def test_a_pointer_in_place_of_a_ranks_file(megatron):
    rank_file(megatron / "iter_0000001", 1, 0, 2).write_text(LFS)
    assert "mp_rank_01_000/model_optim_rng.pt is a Git-LFS pointer" in message(open_checkpoint, megatron)


def test_paths_that_hold_no_checkpoint(tmp_path):
    assert message(open_checkpoint, tmp_path / "none") == f"{tmp_path / 'none'} does not exist"
    assert "is not a checkpoint" in message(open_checkpoint, tmp_path)
    (tmp_path / "file").touch()
    assert "is a file" in message(open_checkpoint, tmp_path / "file")
    (tmp_path / "config.json").write_text("{}")
    assert "none of model.safetensors" in message(open_checkpoint, tmp_path)


@pytest.mark.parametrize("left", [0, 7, 100, 3000])
def test_truncated_safetensors(model, left):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    assert str(file) in message(open_checkpoint, model)


@pytest.mark.parametrize("left", [0, 3, 100, 3000, -1, -200])
def test_truncated_torch_files(megatron, left):
    file = rank_file(megatron / "iter_0000001", 1, 1, 2)
    file.write_bytes(file.read_bytes()[:left])
    assert str(file) in message(open_checkpoint, megatron)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F16", "shape": [2], "data_offsets": [0, 5]},
        {"dtype": "F16", "shape": [-2], "data_offsets": [0, 4]},
        {"dtype": "F16", "shape": [2.0], "data_offsets": [0, 4]},
        {"dtype": "F16", "shape": [2], "data_offsets": [4, 0]},
        {"dtype": "F16", "shape": [2], "data_offsets": [1 << 60, (1 << 60) + 4]},
        {"dtype": "X", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": ["F16"], "shape": [2], "data_offsets": [0, 4]},
        {"shape": [2]},
        [],
        None,
    ],
)
def test_headers_that_lie(model, entry):
    header = json.dumps({"lm_head.weight": entry}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "lm_head.weight" in message(open_checkpoint, model)


def test_tensors_that_share_bytes_or_have_no_end_of_dimensions(model):
    entry = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}
    for header, said in [
        ({"a": entry, "b": {**entry, "data_offsets": [2, 6]}}, "a and b share bytes"),
        ({"a": {**entry, "shape": [1] * 100_000}}, "is malformed"),
    ]:
        text = json.dumps(header).encode()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
        error = message(open_checkpoint, model)
        assert said in error
        assert len(error) < 500


def test_what_is_no_file(model):
    (model / "model.safetensors").unlink()
    torch.save({"a": {"b": torch.ones(2)}}, model / "pytorch_model.bin")
    assert "is not a flat dictionary" in message(open_checkpoint, model)
    (model / "pytorch_model.bin").unlink()
    folder = model / "mp_rank_00"
    folder.mkdir()
    os.mkfifo(folder / "model_optim_rng.pt")
    assert "model_optim_rng.pt is not a file" in message(open_checkpoint, model)


def test_a_pointer_in_place_of_a_tokenizer(model, tmp_path):
    (model / "tokenizer.model").write_text(LFS)
    assert "tokenizer.model is a Git-LFS pointer" in message(convert, model, tmp_path / "out", to="megatron-core")
    (model / "tokenizer.model").write_text("\ufeff<!-- a page -->")
    assert "tokenizer.model is an HTML" in message(convert, model, tmp_path / "out", to="megatron-core")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("head", [b"\xff" * 8, struct.pack("<Q", 4) + b"[1,]", struct.pack("<Q", 2) + b"[]"])
def test_headers_that_are_none(model, head):
    (model / "model.safetensors").write_bytes(head)
    message(open_checkpoint, model)


@pytest.mark.parametrize(
    "named", ["../outside.safetensors", "/etc/passwd", "a/b", "..", "", 7, None, "absent.safetensors"]
)
def test_an_index_that_leads_elsewhere(model, tmp_path, named):
    (tmp_path / "outside.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": named}}))
    assert "model.safetensors.index.json names" in message(open_checkpoint, model)


def test_an_index_that_is_wrong_about_a_shard(tmp_path):
    folder = write_hf(tmp_path / "hf", small(), hf_state(small()), shards=2)
    index = folder / "model.safetensors.index.json"
    stated = json.loads(index.read_text())
    shards = stated["weight_map"]
    shards["lm_head.weight"] = next(file for file in shards.values() if file != shards["lm_head.weight"])
    index.write_text(json.dumps(stated))
    assert "which has no such tensor" in message(open_checkpoint, folder)


def test_tensors_that_are_missing_misshapen_or_strange(model):
    state = read_hf(model)
    norm = "model.layers.1.input_layernorm.weight"

    def after(change):
        changed = dict(state)
        change(changed)
        save_file(changed, model / "model.safetensors")
        return message(open_checkpoint, model)

    assert f"lacks the tensor {norm}" in after(lambda s: s.pop(norm))
    assert "has shape [15], expected [16]" in after(lambda s: s.update({norm: state[norm][:15].clone()}))
    assert "none of a LLaMA-2's tensors" in after(lambda s: s.update(extra=torch.ones(1)))
    assert "is of int32" in after(lambda s: s.update({norm: torch.ones(16, dtype=torch.int32)}))
    query = "model.layers.0.self_attn.q_proj.weight"
    assert "different types" in after(lambda s: s.update({query: state[query].float()}))


def test_ranks_that_are_missing_or_strange(megatron):
    folder = megatron / "iter_0000001"
    file = rank_file(folder, 1, 1, 2)
    tree = torch.load(file, weights_only=False)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    torch.save({**tree, "model": {**tree["model"], name: tree["model"][name][:3]}}, file)
    assert "expected [24, 16]" in message(open_checkpoint, megatron)
    torch.save({**tree, "model": {**tree["model"], name: tree["model"][name].T.contiguous().T}}, file)
    assert "transposed view" in message(open_checkpoint, megatron)
    torch.save({**tree, "model": {"language_model": {"embedding": {}}}}, file)
    assert "has no weights in `model`" in message(open_checkpoint, megatron)
    torch.save({**tree, "model": {"language_model": {"output_layer": tree["model"]}}}, file)
    assert "which the first rank of its stage has" in message(open_checkpoint, megatron)
    torch.save({"model0": tree["model"], "model1": tree["model"]}, file)
    assert "holds 2 chunks of the model, the first rank 1" in message(open_checkpoint, megatron)
    file.unlink()
    assert f"{file} does not exist" in message(open_checkpoint, megatron)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ({"mp_rank_01_001"}, "lacks mp_rank_01_001: it holds 3 ranks of 2 × 2"),
        ({"mp_rank_01_000", "mp_rank_01_001"}, "lacks mp_rank_01_000: it holds 2 ranks of 2 × 2"),
        ({"mp_rank_00_001", "mp_rank_01_001"}, "lacks mp_rank_00_001: it holds 2 ranks of 2 × 2"),
    ],
)
def test_ranks_whose_folders_are_missing(megatron, missing, said):
    for name in missing:
        shutil.rmtree(megatron / "iter_0000001" / name)
    assert said in message(open_checkpoint, megatron)


def change_args(file, args):
    tree = torch.load(file, weights_only=False)
    vars(tree["args"]).update(args)
    torch.save(tree, file)


@pytest.mark.parametrize(
    "args",
    [
        {"rotary_seq_len_interpolation_factor": 4},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling_type": "yarn"},
        {"tie_word_embeddings": True},
        {"swiglu": False},
    ],
)
def test_args_of_another_network(megatron, args):
    for file in megatron.rglob("*.pt"):
        change_args(file, args)
    assert f"its args have {next(iter(args))} = " in message(open_checkpoint, megatron)


def test_ranks_that_contradict_each_other(megatron):
    folder = megatron / "iter_0000001"
    file = rank_file(folder, 1, 1, 2)
    good = file.read_bytes()
    change_args(file, {"num_layers": 9})
    assert "mp_rank_01_001/model_optim_rng.pt has other args than" in message(open_checkpoint, megatron)
    tree = torch.load(io.BytesIO(good), weights_only=False)
    norm = "decoder.final_layernorm.weight"
    torch.save({**tree, "model": {**tree["model"], norm: torch.ones(7)}}, file)
    assert "has shape [7], expected [16]" in message(open_checkpoint, megatron)
    tree["model"].pop(norm)
    torch.save(tree, file)
    assert f"mp_rank_01_001/model_optim_rng.pt lacks {norm}" in message(open_checkpoint, megatron)
    file.write_bytes(good)
    shutil.copytree(folder / "mp_rank_00_000", folder / "mp_rank_00")
    assert "mp_rank_00_000 are of one rank" in message(open_checkpoint, megatron)
    (folder / "mp_rank_00").rename(folder / "mp_rank_00_000.bak")
    assert "mp_rank_00_000.bak is no rank" in message(open_checkpoint, megatron, error=UsageError)


def test_an_optimizers_tensors_are_of_no_interest(megatron):
    for file in megatron.rglob("*.pt"):
        tree = torch.load(file, weights_only=False)
        tree["optimizer"] = {"transposed": torch.ones(3, 4).T, "complex": torch.ones(2, dtype=torch.complex64)}
        torch.save(tree, file)
    with open_checkpoint(megatron) as checkpoint:
        assert checkpoint.config == small()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"rotary_base": 10**400}, "rotary_base is inf"),
        ({"norm_epsilon": "1e-5"}, "layernorm_epsilon is '1e-5'"),
        ({"eos_token_id": 37}, "eos_token_id is 37"),
    ],
)
def test_args_that_are_impossible(megatron, args, said):
    for file in megatron.rglob("*.pt"):
        change_args(file, args)
    assert f"iter_0000001: its args are impossible: {said}" in message(open_checkpoint, megatron)


def test_trackers_that_lead_nowhere(megatron):
    tracker = megatron / "latest_checkpointed_iteration.txt"
    tracker.write_text("20")
    assert "names iter_0000020, which does not exist" in message(open_checkpoint, megatron)
    tracker.write_text("../../x")
    assert "neither an iteration" in message(open_checkpoint, megatron)


def test_release_and_run_folders_are_found(megatron, tmp_path):
    tracker = megatron / "latest_checkpointed_iteration.txt"
    (megatron / "iter_0000001").rename(megatron / "release")
    tracker.write_text("release\n")
    (tmp_path / "run").mkdir()
    megatron.rename(tmp_path / "run/checkpoints")
    with open_checkpoint(tmp_path / "run") as checkpoint:
        assert checkpoint.path == tmp_path / "run/checkpoints/release"
        assert checkpoint.layout.pipeline_model_parallel_size == 2


@pytest.mark.parametrize("tracker", ["latest", "checkpoints/latest_checkpointed_iteration.txt"])
def test_a_folders_own_weights_come_first(model, tmp_path, tracker):
    """Hugging Face's trainer leaves DeepSpeed's files beside the model; a run may lie inside of a model's folder."""
    other = write_hf(tmp_path / "other", small(num_layers=3), hf_state(small(num_layers=3)))
    convert(other, tmp_path / "inner", to="deepspeed" if tracker == "latest" else "megatron-core")
    if tracker == "latest":
        shutil.copytree(tmp_path / "inner/release", model / "release")
        shutil.copy(tmp_path / "inner/latest", model)
    else:
        shutil.copytree(tmp_path / "inner", model / "checkpoints")
    found = inspect(model)
    assert (found["format"], found["config"]["num_layers"]) == ("hf", 2)


def test_counts_beyond_reason_are_refused(model):
    config = {**small().to_hf("float16"), "num_attention_heads": 10**9, "num_key_value_heads": 10**9}
    (model / "config.json").write_text(json.dumps(config))
    assert "num_attention_heads is 1000000000: it must be 16384 at most" in message(open_checkpoint, model)


def test_a_distributed_save_that_did_not_finish(tmp_path):
    (tmp_path / ".metadata").touch()
    assert "did not finish" in message(open_checkpoint, tmp_path)


def test_formats_to_come_are_named(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    assert "a PEFT checkpoint" in message(open_checkpoint, tmp_path, error=UsageError)


def test_zero_stage_3_without_the_shares_of_its_optimizer_is_named(tmp_path):
    (tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    assert "holds no optimizer's state" in message(open_checkpoint, tmp_path)


def test_an_unknown_architecture_is_asked_for(model, tmp_path):
    config = (model / "config.json").read_text()
    (model / "config.json").unlink()
    assert inspect(model)["config"] is None
    assert "--config" in message(convert, model, tmp_path / "out", to="hf", error=UsageError)
    (tmp_path / "stated").mkdir()
    (tmp_path / "stated/config.json").write_text(config)
    convert(model, tmp_path / "out", to="hf", config=tmp_path / "stated")
    assert inspect(tmp_path / "out")["parameters"] == sum(t.numel() for t in read_hf(model).values())


def test_contradictions_name_both_values(model, megatron, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(small(layernorm_epsilon=1e-6).to_hf("float16")))
    said = message(open_checkpoint, model, LlamaConfig.from_hf(tmp_path / "other"), error=UsageError)
    assert "layernorm_epsilon is 1e-06" in said
    assert "1e-05" in said
    (megatron / "config.json").write_bytes((tmp_path / "other/config.json").read_bytes())
    assert "in its args" in message(open_checkpoint, megatron)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"tensor_model_parallel_size": 3}, "4 attention heads do not divide among 3"),
        ({"tensor_model_parallel_size": 8}, "4 attention heads do not divide among 8"),
        ({"pipeline_model_parallel_size": 3}, "2 layers do not divide among 3"),
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size is 0"),
        ({"make_vocab_size_divisible_by": -1}, "make_vocab_size_divisible_by is -1"),
        ({"make_vocab_size_divisible_by": 129}, "37 vocabulary entries would be padded to 129"),
        ({"make_vocab_size_divisible_by": 10**11}, "would be padded to 100000000000"),
    ],
)
def test_layouts_that_do_not_divide(model, tmp_path, layout, said):
    def run(to, **options):
        convert(model, tmp_path / "out", to=to, layout=Layout(**options))

    assert said in message(run, "megatron-core", error=UsageError, **layout)
    assert "not split over ranks nor padded" in message(run, "hf", pipeline_model_parallel_size=2, error=UsageError)
    assert list(tmp_path.iterdir()) == [model]


def test_a_cast_that_overflows(tmp_path):
    config = small()
    state = hf_state(config, torch.float32)
    state["lm_head.weight"] = torch.full((37, 16), 1e5)
    write_hf(
        tmp_path / "hf", config, {name: tensor.nan_to_num(0, 0, 0).clamp(-1e5, 1e5) for name, tensor in state.items()}
    )
    said = message(convert, tmp_path / "hf", tmp_path / "out", to="hf", dtype="float16")
    assert "float16 cannot hold" in said
    assert not (tmp_path / "out").exists()


def test_arrays_that_are_not_the_model(tmp_path):
    config = small()
    arrays = {name: np.zeros(rule.shape, np.float32) for name, rule in sharding(config).items()}

    def after(**changes):
        wrong = {name: array for name, array in (arrays | changes).items() if array is not None}
        return message(write_checkpoint, tmp_path / "out", config, wrong, "hf")

    assert "is missing" in after(**{"output_layer.weight": None})
    assert "expected [37, 16]" in after(**{"output_layer.weight": np.zeros((38, 16), np.float32)})
    assert "is of int32" in after(**{"output_layer.weight": np.zeros((37, 16), np.int32)})
    assert "none of the model's tensors" in after(extra=np.zeros(1, np.float32))
    assert "'peft'" in message(write_checkpoint, tmp_path / "out", config, arrays, "peft", error=UsageError)
