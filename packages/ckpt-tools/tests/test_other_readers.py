"""What we write is read by transformers, torch and zipfile; what they write is read by us."""

import json
import os
import subprocess
import sys
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from ckpt_tools import Layout, LlamaConfig, convert, open_checkpoint, sharding, verify, write_checkpoint
from ckpt_tools.storage.files import File
from ckpt_tools.storage.output import Slot
from ckpt_tools.storage.torch_read import read_torch
from ckpt_tools.storage.torch_write import TorchWriter
from models import hf_state, rank_file, read_hf, same_bits, small, write_hf
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import LlamaConfig as TransformersConfig

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "rms_norm_eps": 1e-4,
    "max_position_embeddings": 64,
}


@pytest.fixture(params=[4, 2], ids=["mha", "gqa"])
def transformers_model(request, tmp_path):
    torch.manual_seed(0)
    network = LlamaForCausalLM(TransformersConfig(**SIZES, num_key_value_heads=request.param))
    network.save_pretrained(tmp_path / "hf")
    words = tokenizer_models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(tmp_path / "hf")
    return network, tmp_path / "hf"


def test_transformers_gives_the_same_logits(transformers_model, tmp_path):
    network, source = transformers_model
    layout = Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, make_vocab_size_divisible_by=16)
    convert(source, tmp_path / "megatron", to="megatron-core", layout=layout)
    convert(tmp_path / "megatron", tmp_path / "back", to="hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    tokens = torch.arange(20).reshape(2, 10) * 3
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, network(tokens).logits)
    assert loaded.generation_config.eos_token_id == network.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(tmp_path / "back").convert_tokens_to_ids("a") == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "megatron").convert_tokens_to_ids("a") == 1


def test_the_architecture_survives_transformers(tmp_path):
    config = small(rotary_base=5e5, layernorm_epsilon=3e-6, eos_token_id=7, kv_channels=6)
    write_checkpoint(tmp_path / "hf", config, _zeros(config), "hf")
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    assert LlamaConfig.from_hf(tmp_path / "again") == config
    assert verify(tmp_path / "hf", tmp_path / "again") == []


def _zeros(config):
    return {name: np.zeros(rule.shape, np.float32) for name, rule in sharding(config).items()}


def test_pytorch_bin_is_read(tmp_path):
    config = small()
    state = hf_state(config, torch.bfloat16)
    safe = write_hf(tmp_path / "safe", config, state)
    for shards in (1, 2):
        folder = tmp_path / f"bin{shards}"
        folder.mkdir()
        (folder / "config.json").write_bytes((safe / "config.json").read_bytes())
        _save_bin(folder, {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, shards)
        assert verify(safe, folder) == []


def _save_bin(folder, state, shards):
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = list(state)
    weight_map = {name: f"pytorch_model-0000{n % 2 + 1}-of-00002.bin" for n, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_torch_reads_our_files_without_trust(model, tmp_path):
    convert(model, tmp_path / "m", to="megatron-core", layout=Layout(tensor_model_parallel_size=2))
    file = rank_file(tmp_path / "m/iter_0000001", 1, 0, 1)
    with torch.serialization.safe_globals([Namespace]):
        tree = torch.load(file, weights_only=True)
    assert tree["checkpoint_version"] == 3.0
    assert tree["iteration"] == 1
    args = tree["args"]
    assert (args.num_query_groups, args.padded_vocab_size, args.vocab_size) == (2, 38, 37)
    assert args.params_dtype is torch.float16
    assert (tmp_path / "m/latest_checkpointed_iteration.txt").read_text() == "1"
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    mapped = torch.load(file, weights_only=False, mmap=True)["model"]
    assert all(same_bits(mapped[name], tree["model"][name]) for name in tree["model"])


def test_our_file_has_the_records_of_torchs_own(tmp_path):
    tensors = {"a": torch.arange(7.0), "b": torch.ones(3, 5, dtype=torch.bfloat16), "empty": torch.ones(0, 4)}
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    slots = {name: Slot(name, names[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    torch.save({"model": tensors}, tmp_path / "tree.pt")
    (tmp_path / "ours").mkdir()
    writer = TorchWriter(tmp_path / "ours/tree.pt", {"model": slots})
    for name, tensor in tensors.items():
        writer.begin(name)
        writer.append(memoryview(tensor.view(torch.uint8).numpy().reshape(-1)))
        writer.end()
    writer.finish()
    with zipfile.ZipFile(tmp_path / "tree.pt") as theirs, zipfile.ZipFile(tmp_path / "ours/tree.pt") as ours:
        assert ours.namelist() == theirs.namelist()
        assert ours.testzip() is None
        for name in theirs.namelist():
            if "/data/" in name or name.endswith(("version", "byteorder", "alignment")):
                assert ours.read(name) == theirs.read(name), name
    loaded = torch.load(tmp_path / "ours/tree.pt", weights_only=True)["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_records_above_4_gib(tmp_path):
    """zip64: a record of 4 GiB of zeros, left as a hole in the file, and one that lies behind it."""
    path = tmp_path / "large.pt"
    numel = (1 << 31) + 3
    slots = {name: Slot(name, "float16", (size,)) for name, size in [("a", numel), ("b", 5)]}
    writer = TorchWriter(path, {"model": slots})
    writer.begin("a")
    skip = writer._zip._left
    writer._zip._left, writer._stream.at = 0, writer._stream.at + skip
    writer._stream._file.seek(skip, os.SEEK_CUR)
    writer.end()
    writer.begin("b")
    writer.append(memoryview(torch.arange(5).to(torch.float16).numpy()).cast("B"))
    writer.end()
    writer.finish()
    loaded = torch.load(path, weights_only=True, mmap=True)["model"]
    assert loaded["a"].shape == (numel,)
    assert loaded["b"].tolist() == [0, 1, 2, 3, 4]
    file = File(path)
    _, tensors = read_torch(file)
    assert file.read(tensors["model", "b"].start, 10) == loaded["b"].numpy().tobytes()
    file.close()


def test_a_file_that_torch_saved_with_foreign_objects_is_read(model, tmp_path):
    """Megatron's own saves carry enums, optimizer and RNG states, and Transformer Engine's names."""
    convert(model, tmp_path / "m", to="megatron-core")
    file = rank_file(tmp_path / "m/iter_0000001", 0, 0, 1)
    tree = torch.load(file, weights_only=False)
    tree["model"]["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
    tree["model"]["decoder.layers.1.mlp.linear_fc1._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    norm = tree["model"].pop("decoder.layers.1.input_layernorm.weight")
    tree["model"]["decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"] = torch.nn.Parameter(norm)
    tree["rng_state"] = [{"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}]
    tree["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}}
    tree["args"].attention_backend = pytest.ExitCode.OK
    torch.save(tree, file)
    assert verify(model, tmp_path / "m") == []


def test_stages_of_different_sizes_are_read(tmp_path):
    config = small(num_layers=3)
    write_hf(tmp_path / "hf", config, hf_state(config))
    convert(tmp_path / "hf", tmp_path / "m", to="megatron-core", layout=Layout(pipeline_model_parallel_size=3))
    folder = tmp_path / "m/iter_0000001"
    first, second, third = (torch.load(rank_file(folder, 0, p, 3), weights_only=False) for p in range(3))
    moved = {name.replace("layers.0", "layers.1"): t for name, t in second["model"].items()}
    first["args"].pipeline_model_parallel_size = 2
    torch.save({**first, "model": first["model"] | moved}, rank_file(folder, 0, 0, 3))
    torch.save(third, rank_file(folder, 0, 1, 3))
    rank_file(folder, 0, 2, 3).unlink()
    rank_file(folder, 0, 2, 3).parent.rmdir()
    assert verify(tmp_path / "hf", tmp_path / "m") == []


def test_the_args_alone_say_the_architecture(model, tmp_path):
    convert(model, tmp_path / "m", to="megatron-core")
    (tmp_path / "m/config.json").unlink()
    with open_checkpoint(tmp_path / "m/iter_0000001") as checkpoint:
        assert checkpoint.config == small()


def test_large_models_are_sharded(model, tmp_path, monkeypatch):
    monkeypatch.setattr("ckpt_tools.formats.hf.MAX_SHARD_BYTES", 2000)
    convert(model, tmp_path / "out", to="hf")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    state = read_hf(tmp_path / "out")
    assert all(same_bits(state[name], tensor) for name, tensor in read_hf(model).items())
    assert verify(model, tmp_path / "out") == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(same_bits(loaded[name], tensor) for name, tensor in state.items())


def test_nothing_of_torch_is_imported(model, tmp_path):
    code = (
        "import sys, ckpt_tools as c\n"
        "layout = c.Layout(tensor_model_parallel_size=2)\n"
        f"c.convert({str(model)!r}, {str(tmp_path / 'm')!r}, to='megatron-core', layout=layout)\n"
        f"assert c.verify({str(model)!r}, {str(tmp_path / 'm')!r}) == []\n"
        "assert not {'torch', 'safetensors', 'transformers', 'megatron'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
