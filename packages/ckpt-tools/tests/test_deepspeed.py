"""DeepSpeed itself, unpatched, loads what we write; what it saves is read."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ckpt_tools import Layout, convert, inspect, open_checkpoint, verify
from models import hf_shapes, small, write_hf


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = small(num_query_groups=4)
    torch.manual_seed(5)
    state = {name: torch.randn(shape) for name, shape in hf_shapes(config).items()}
    return write_hf(tmp_path_factory.mktemp("source") / "hf", config, state)


def run_engine(folder, out, *stages):
    script = Path(__file__).with_name("deepspeed_engine.py")
    command = [sys.executable, "-W", "ignore", script, folder, out, *stages]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


@pytest.mark.parametrize("naming", ["ascendspeed", "megatron-core"])
def test_there_and_back(source, naming, tmp_path):
    ours, out = tmp_path / "ours", tmp_path / "out"
    convert(source, ours, to="deepspeed", layout=Layout(naming=naming, merge_mlp=naming == "ascendspeed"))
    stages = (0, 1, 2, 3) if naming == "megatron-core" else (1,)
    done = run_engine(ours, out, *stages)
    assert done.returncode == 0, done.stderr
    for stage in set(stages) - {3}:
        assert inspect(out / str(stage))["config"] is None
        assert verify(out / str(stage), source, config=source) == []
        with open_checkpoint(out / str(stage)) as checkpoint:
            assert (checkpoint.format, checkpoint.layout.naming) == ("deepspeed", naming)
            assert checkpoint.path.name.startswith("global_step")
    if 3 in stages:  # which keeps the weights that the engine began with: its own loader takes no whole ones
        assert inspect(out / "3", config=source)["dtype"] == "float32"


def test_the_keys_that_deepspeed_asks_for(source, tmp_path):
    """The control: without one of them the load fails."""
    convert(source, tmp_path / "ours", to="deepspeed")
    file = tmp_path / "ours/release/mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=True)
    del content["dp_world_size"]
    torch.save(content, file)
    done = run_engine(tmp_path / "ours", tmp_path / "out", 1)
    assert done.returncode != 0
    assert "dp_world_size" in done.stderr
