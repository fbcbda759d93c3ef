"""The adaptor: what it changes inside megatron-core, that it changes nothing else, and that it comes first or fails."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from llama_model.parallel import adaptor
from npu_kernels import Device

CORE = Path(next(iter(find_spec("megatron").submodule_search_locations))) / "core"
"""megatron-core's sources, read as text: this process must not import it."""
OTHER_ROOMS = {"inference", "export", "post_training", "models", "ssm", "extensions", "quantization", "resharding"}
"""Parts of megatron-core that this network never meets."""


def python(code, **variables):
    env = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


def says(code, **variables):
    done = python(code, **variables)
    assert done.returncode == 0, done.stderr
    return done


SNAPSHOT = """
import builtins, logging, sys, warnings, torch, torch.distributed, torch.optim, torch.utils.checkpoint

PLACES = {
    "builtins": builtins, "torch": torch, "torch.Tensor": torch.Tensor, "torch.cuda": torch.cuda,
    "torch.cpu": torch.cpu, "torch.distributed": torch.distributed, "torch.optim": torch.optim, "torch.nn": torch.nn,
    "torch.nn.Module": torch.nn.Module, "torch.nn.functional": torch.nn.functional, "torch.jit": torch.jit,
    "torch.random": torch.random, "torch.autograd": torch.autograd, "torch.utils.checkpoint": torch.utils.checkpoint,
    "torch.optim.Optimizer": torch.optim.Optimizer, "sys": sys, "warnings": warnings,
}

def snapshot():
    found = {f"{place}.{name}": value for place, module in PLACES.items() for name, value in list(vars(module).items())}
    return found | {f"torch.Tensor.{name}": getattr(torch.Tensor, name, None) for name in dir(torch.Tensor)
                    if not name.startswith("__")}

before = snapshot()
lists = {"sys.meta_path": list(sys.meta_path), "warnings.filters": list(warnings.filters)}
"""

USE = """
from ckpt_tools import LlamaConfig
from llama_model import parallel
import torch

parallel.initialize()
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

config = LlamaConfig(num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2,
                     kv_channels=4, vocab_size=9, max_position_embeddings=32)
model = parallel.build_model(config, transformer_options={"bf16": True, "params_dtype": torch.bfloat16})
ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
options = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, clip_grad=1.0,
                          use_distributed_optimizer=True)
optimizer = get_megatron_optimizer(options, [ddp])
model.config.finalize_model_grads_func = finalize_model_grads

def forward_step(batches, model):
    tokens = next(batches)
    return model(tokens, labels=tokens), lambda loss: (loss.mean(), {"loss": loss.detach().mean()})

before_step = [parameter.detach().clone() for parameter in model.parameters()]
get_forward_backward_func()(forward_step_func=forward_step, data_iterator=iter([torch.randint(0, 9, (2, 8))]),
                            model=ddp, num_microbatches=1, seq_length=8, micro_batch_size=2)
assert optimizer.step()[0]
assert any(not torch.equal(old, new) for old, new in zip(before_step, model.parameters(), strict=True))
parallel.destroy()
"""

COMPARE = """
after = snapshot()
changed = {name for name, value in before.items() if name in after and after[name] is not value}
changed |= {name for name, value in lists.items() if list(eval(name)) != value}
modules = {name.split(".")[0] for name in sys.modules}
assert not modules & {"apex", "transformer_engine", "amp_C"}, modules
assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
print(sorted(changed))
"""


def test_nothing_outside_megatron_core_changes_but_what_is_listed():
    """A whole training step with the distributed optimizer in bf16; no torchrun, one process."""
    done = says(SNAPSHOT + USE + COMPARE)
    changed = set(ast.literal_eval(done.stdout.strip().splitlines()[-1]))
    # torch's own doing: init_process_group sets the hook, importing torch._dynamo wraps the seeding.
    changed -= {"sys.excepthook", "torch.manual_seed"}
    assert changed == set(adaptor.TOUCHED)


def test_a_training_step_says_nothing_and_calls_no_compiler():
    done = says(USE + "import sys; assert 'torch._inductor.codecache' not in sys.modules")
    assert not done.stdout
    assert not done.stderr


def test_afterwards_fails_in_one_line():
    done = says(
        "import warnings; warnings.simplefilter('ignore')\n"
        "import megatron.core\n"
        "from llama_model import ModelError, parallel\n"
        "try: parallel.initialize()\n"
        "except ModelError as error: print(error)\n"
    )
    assert done.stdout == (
        "megatron.core was imported before it could be adapted: call llama_model.parallel.adapt() (or initialize) "
        "before the first import of megatron.core\n"
    )


@pytest.mark.parametrize("name", ["megatron", "psutil"])
def test_a_package_that_is_missing_is_named(name):
    done = says(
        f"import sys; sys.modules[{name!r}] = None\n"
        "from llama_model import ModelError, parallel\n"
        "try: parallel.initialize()\n"
        "except ModelError as error: print(error)\n"
    )
    assert done.stdout.startswith(f"{name} is not installed: pip install")


def test_again_does_nothing_and_another_device_fails():
    done = says(
        "import sys\n"
        "from npu_kernels import Device\n"
        "from llama_model import ModelError, parallel\n"
        "parallel.adapt(Device('cpu')); before = list(sys.meta_path)\n"
        "parallel.adapt(); parallel.adapt(Device('cpu')); assert sys.meta_path == before\n"
        "import megatron.core; parallel.adapt()\n"
        "try: parallel.adapt(Device('npu'))\n"
        "except ModelError as error: print(error)\n"
    )
    assert done.stdout == "megatron-core is adapted to cpu in this process already\n"


def test_importing_the_package_does_nothing():
    says(
        "import sys; before = list(sys.meta_path)\n"
        "from llama_model import parallel\n"
        "assert sys.meta_path == before and 'torch' not in sys.modules and 'megatron' not in sys.modules\n"
    )


def test_build_model_without_initialize_fails_in_one_line():
    done = says(
        "from ckpt_tools import LlamaConfig\n"
        "from llama_model import RequestError, parallel\n"
        "sizes = dict(num_layers=2, hidden_size=16, ffn_hidden_size=24, kv_channels=4, vocab_size=9)\n"
        "try: parallel.build_model(LlamaConfig(num_attention_heads=4, num_query_groups=2, **sizes))\n"
        "except RequestError as error: print(error)\n"
    )
    assert "initialize" in done.stdout


def test_one_process_can_change_its_layout_and_begin_again():
    says(
        "from llama_model import parallel\n"
        "from torch import distributed\n"
        "for _ in range(2):\n"
        "    parallel.initialize(seed=7)\n"
        "    assert distributed.get_world_size() == 1\n"
        "    parallel.destroy()\n"
        "    assert not distributed.is_initialized()\n"
    )


# --- the lists, against megatron-core's sources -----------------------------------------------------------------------


def sources():
    for path in sorted(CORE.rglob("*.py")):
        parts = path.relative_to(CORE).parts
        if parts[0] not in OTHER_ROOMS and "fsdp" not in parts and "test" not in path.name:
            yield ".".join(path.relative_to(CORE).with_suffix("").parts), ast.parse(path.read_text("utf-8"))


def functions(tree, prefix=""):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = f"{prefix}{node.name}"
            if isinstance(node, ast.FunctionDef):
                yield name, node
            else:
                yield from functions(node, f"{name}.")


def compares_types(function):
    return any(
        isinstance(node, ast.Compare)
        and "torch.cuda." in ast.unparse(node)
        and ".type()" in ast.unparse(node)
        and "Tensor" in ast.unparse(node)
        for node in ast.walk(function)
    )


def test_every_function_that_compares_type_names_is_listed():
    found = {
        (module, name) for module, tree in sources() for name, node in functions(tree) if compares_types(node)
    }  # fmt: skip
    listed = {(module, name) for module, names in adaptor.TYPE_NAMES.items() for name in names}
    assert found == listed


def test_every_factory_that_is_called_with_cuda_is_listed():
    found = set()
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                if ast.unparse(node.func.value) == "torch" and any(
                    isinstance(value, ast.Constant) and value.value == "cuda" for value in given
                ):
                    found.add(node.func.attr)
    # torch.device("cuda") stands only in functions of tensor_parallel.random that are replaced, or for CUDA graphs.
    assert found - {"device"} <= set(adaptor.FACTORIES), found


@pytest.mark.parametrize(("device", "expected"), [("cpu", "torch."), ("npu", "torch.npu.")])
def test_type_names_become_the_devices(device, expected):
    def function(name):
        return name in ("torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor") or name == "torch.cuda.FloatTensor"

    adaptor._rename_types(function, device)
    assert function(f"{expected}FloatTensor")
    assert function(f"{expected}HalfTensor")
    assert not function("torch.cuda.FloatTensor")


def test_the_view_answers_as_torch_does():
    import torch

    view = adaptor.view_of_torch(Device("cpu"))
    assert view.nn is torch.nn
    assert view.zeros(2, device="cuda").device.type == "cpu"
    assert view.empty_like(torch.ones(2), device="cuda:0").device.type == "cpu"
    assert view.cuda.current_device() == torch.device("cpu")
    view.cuda.manual_seed(3)
    state = view.cuda.get_rng_state()
    first = torch.rand(2)
    view.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(2))
    with pytest.raises(AttributeError):
        view.no_such_name  # noqa: B018
