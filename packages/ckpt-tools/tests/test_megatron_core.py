"""megatron-core's own GPTModel takes our files strictly, gives Hugging Face's logits, and its checkpoints are read."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ckpt_tools import Layout, convert, inspect, open_checkpoint, verify
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 101}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64}
    network = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    folder = tmp_path_factory.mktemp("network")
    network.save_pretrained(folder)
    return network, folder


@pytest.mark.parametrize(("tp", "dtype"), [(2, "float32"), (4, "bfloat16")], ids=["tp2", "tp4-above-kv-heads"])
def test_there_and_back(network, tp, dtype, tmp_path):
    model, source = network
    layout = Layout(tensor_model_parallel_size=tp, make_vocab_size_divisible_by=8)
    convert(source, tmp_path / "megatron", to="megatron-core", layout=layout)
    tokens = torch.randint(0, 101, (2, 16))
    torch.save(tokens, tmp_path / "tokens.pt")
    _run_ranks(tp, tmp_path, dtype)
    assert json.loads((tmp_path / "torch_dist/metadata.json").read_text())["sharded_backend"] == "torch_dist"

    logits = torch.cat([torch.load(tmp_path / f"logits_{rank}.pt") for rank in range(tp)], -1)[..., :101]
    with torch.no_grad():
        expected = model(tokens).logits
    assert (logits - expected).abs().max() < 1e-6
    assert expected.abs().max() > 1e-2

    saved = tmp_path / "torch_dist"
    assert inspect(saved)["config"] is None
    _add_args(saved, torch.load(tmp_path / "megatron/iter_0000001/mp_rank_00/model_optim_rng.pt", weights_only=False))
    convert(source, tmp_path / "expected", to="hf", dtype=dtype)
    assert verify(tmp_path / "expected", saved) == []
    with open_checkpoint(saved) as checkpoint:
        assert (checkpoint.format, checkpoint.dtype) == ("torch_dist", dtype)
        part = checkpoint.read("decoder.layers.2.mlp.linear_fc1.weight", (slice(40, 60), slice(3, 30)))
    gate, up = (model.model.layers[2].mlp.get_submodule(name).weight for name in ("gate_proj", "up_proj"))
    expected = torch.cat([gate, up])[40:60, 3:30].to(getattr(torch, dtype))
    assert part.tobytes() == expected.view(torch.uint8).numpy().tobytes()


def test_a_virtual_pipeline(tmp_path):
    """Two stages of two chunks each: layers in any other order give other logits."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 101}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model.model.layers[1].mlp.down_proj.weight.data *= 30  # so that the order shows
    model.save_pretrained(tmp_path / "hf")
    layout = Layout(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
    convert(tmp_path / "hf", tmp_path / "megatron", to="megatron-core", layout=layout)
    tokens = torch.randint(0, 101, (2, 16))
    torch.save(tokens, tmp_path / "tokens.pt")
    _run_ranks(2, tmp_path, pp=2, chunks=2)
    with torch.no_grad():
        expected = model(tokens).logits
        layers = model.model.layers
        layers[1], layers[2] = layers[2], layers[1]
        swapped = model(tokens).logits
    found = torch.load(tmp_path / "logits_1.pt")
    assert (found - expected).abs().max() < 1e-5
    assert (swapped - expected).abs().max() > 1e-3


def _add_args(folder, tree):
    """Megatron-LM keeps its args in common.pt."""
    common = torch.load(folder / "common.pt", weights_only=False)
    torch.save({**common, "args": tree["args"]}, folder / "common.pt")


def _run_ranks(world, folder, dtype="float32", pp=1, chunks=1):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("megatron_core_rank.py"))]
    places = [str(folder / "megatron"), str(folder / "tokens.pt"), str(folder), dtype, str(pp), str(chunks)]
    ranks = []
    for rank in range(world):
        place = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env = {**os.environ, **place, "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen([*command, *places], env=env, stderr=subprocess.PIPE, text=True))
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors)
