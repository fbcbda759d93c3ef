"""Memory does not grow with the model, its tensors, its ranks or its shards."""

import subprocess
import sys

import numpy as np
import pytest
from ckpt_tools import LlamaConfig, sharding, write_checkpoint
from models import small

MIB = 1 << 20
CODE = """
import resource, sys
import numpy, ml_dtypes, tqdm
from ckpt_tools import conversion, verification
from ckpt_tools.conversion import convert
from ckpt_tools.layout import Layout
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source, target, to, tp, pp = sys.argv[1:]
convert(source, target, to=to, layout=Layout(tensor_model_parallel_size=int(tp), pipeline_model_parallel_size=int(pp)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


class Zeros(dict):
    """The tensors of a model that would not fit: each is made when it is asked for, from one page."""

    def __getitem__(self, name):
        return np.broadcast_to(np.float16(1), super().__getitem__(name))


def growth(source, target, to, tp=1, pp=1):
    """Bytes by which a conversion raises the peak of its process."""
    command = [sys.executable, "-c", CODE, str(source), str(target), to, str(tp), str(pp)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 10


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """200 MB in few tensors, the largest 77 MB."""
    sizes = {"hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 16, "kv_channels": 64}
    config = small(num_layers=1, num_query_groups=4, vocab_size=37_500, **sizes)
    return _write(tmp_path_factory.mktemp("large") / "hf", config)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """100 MB in many layers."""
    sizes = {"hidden_size": 256, "ffn_hidden_size": 640, "num_attention_heads": 8, "kv_channels": 32}
    config = small(num_layers=72, num_query_groups=4, vocab_size=1000, **sizes)
    return _write(tmp_path_factory.mktemp("deep") / "hf", config)


def _write(folder, config: LlamaConfig):
    shapes = {name: rule.shape for name, rule in sharding(config).items()}
    write_checkpoint(folder, config, Zeros(shapes), "hf")
    return folder


@pytest.mark.parametrize(
    ("name", "form", "pp"),
    [
        ("large", "megatron-core", 1),
        ("deep", "megatron-core", 8),
        ("large", "ascendspeed", 1),
        ("deep", "ascendspeed-flat", 8),
        ("large", "deepspeed", 1),
    ],
)
def test_blocks_are_all_that_is_held(name, form, pp, request, tmp_path):
    source = request.getfixturevalue(name)
    there = growth(source, tmp_path / "m", form, tp=4, pp=pp)
    back = growth(tmp_path / "m", tmp_path / "back", "hf")
    assert there < 24 * MIB
    assert back < 24 * MIB
