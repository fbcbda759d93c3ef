"""Files with random damage are read, or refused in one line: no other error, and no hang."""

import random
import shutil

import pytest
import torch
from ckpt_tools import CheckpointError, Layout, convert, open_checkpoint
from models import hf_state, rank_file, small
from torch.distributed import checkpoint as dcp

ROUNDS = 400


@pytest.fixture(
    params=["safetensors", "config", "bin", "megatron-core", "ascendspeed", "deepspeed", "metadata", "distcp"]
)
def folder_and_file(request, model, tmp_path):
    """A good checkpoint, and the file of it to damage."""
    kind = request.param
    if kind in ("safetensors", "config"):
        return model, model / ("model.safetensors" if kind == "safetensors" else "config.json")
    if kind == "megatron-core":
        convert(model, tmp_path / "m", to="megatron-core")
        return tmp_path / "m", rank_file(tmp_path / "m/iter_0000001", 0, 0, 1)
    if kind in ("ascendspeed", "deepspeed"):
        convert(model, tmp_path / "m", to=kind, layout=Layout(tensor_model_parallel_size=2))
        return tmp_path / "m", max((tmp_path / "m").rglob("*.pt"))
    if kind == "bin":
        (model / "model.safetensors").unlink()
        torch.save(hf_state(small()), model / "pytorch_model.bin")
        return model, model / "pytorch_model.bin"
    folder = _distributed(model, tmp_path)
    return folder, folder / ".metadata" if kind == "metadata" else next(folder.glob("*.distcp"))


def _distributed(model, tmp_path):
    """What torch's own distributed checkpoint writes for megatron-core's names, layers one by one."""
    with open_checkpoint(model) as checkpoint:
        state = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.names()}
    folder = tmp_path / "distributed"
    dcp.save(
        {**state, "optimizer.state.exp_avg.output_layer.weight": torch.ones(3)}, checkpoint_id=folder, no_dist=True
    )
    (folder / "metadata.json").write_text("{}")
    shutil.copy(model / "config.json", folder)
    return folder


def damaged(data, chance):
    """A copy with a few bytes changed, lost or added, mostly near the beginning and the end."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        ends = [(0, min(len(data), 4000)), (max(0, len(data) - 3000), len(data)), (0, len(data))]
        at, kind = chance.randrange(*chance.choice(ends)), chance.random()
        if kind < 0.7:
            data[at] = chance.choice([0, 1, 46, 128, 255, chance.randrange(256)])
        elif kind < 0.85:
            del data[at : at + chance.randrange(1, 9)]
        else:
            data[at:at] = chance.randbytes(chance.randrange(1, 9))
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_damage_is_survived(folder_and_file):
    folder, file = folder_and_file
    good, chance = file.read_bytes(), random.Random(7)
    read_all(folder)
    refused = 0
    for _ in range(ROUNDS):
        file.write_bytes(damaged(good, chance))
        try:
            read_all(folder)
        except CheckpointError:
            refused += 1
    assert refused > ROUNDS / 3


def read_all(folder):
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.names():
            checkpoint.read(name)
