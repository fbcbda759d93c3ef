"""What DeepSpeed, as it is installed, makes of our folder, and what it saves itself: one process on a CPU.

    python deepspeed_engine.py FOLDER OUT STAGE...

FOLDER is one of ours, in float32. For each ZeRO stage an engine is built around random weights, loads FOLDER's with
`load_module_only`, takes a step that changes nothing, must then hold exactly what FOLDER holds, and saves to OUT/STAGE.
"""

import os
import sys
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

import deepspeed
import deepspeed.ops
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, and is of no use here


def flattened(state, prefix=""):
    """AscendSpeed's nested dictionaries by the names that modules give to their parameters."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class Model(torch.nn.Module):
    """Parameters of these names and shapes; loads nested dictionaries too, as AscendSpeed's model does."""

    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            place = self
            for key in path:
                if key not in place._modules:
                    place.add_module(key, torch.nn.Module())
                place = place._modules[key]
            place.register_parameter(last, torch.nn.Parameter(torch.randn(shape)))

    def forward(self):
        return sum((parameter * 0).sum() for parameter in self.parameters())

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return super().load_state_dict(dict(flattened(state_dict)), strict, assign)


def main(folder, out, *stages):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out.absolute()}.rendezvous", rank=0, world_size=1
    )
    expected = torch.load(folder / "release/mp_rank_00_model_states.pt", weights_only=True)
    weights = dict(flattened(expected["module"]))
    for stage in map(int, map(str, stages)):
        model = Model({name: tensor.shape for name, tensor in weights.items()})
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        if stage < 3:  # stage 3 has no whole weights to load into
            assert not same(engine, weights)
            loaded, _ = engine.load_checkpoint(str(folder), load_module_only=True)
            assert loaded is not None
            engine.backward(engine())
            engine.step()
            assert same(engine, weights)
        engine.save_checkpoint(str(out / str(stage)))
        engine.destroy()


def same(engine, weights):
    state = engine.module.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
