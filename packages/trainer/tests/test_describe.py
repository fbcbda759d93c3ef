"""`trainer describe`: exact numbers against real buffers and arithmetic done here, formulas against autograd."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import counted_states
import npu_kernels.ops.common
import pytest
import torch
from ckpt_tools import LlamaConfig
from llama_model import Recompute, parallel
from trainer import TrainConfig, activations, description, memory
from trainer.cli import main
from trainer.config_file import read_yaml
from trainer.describe import describe
from trainer.errors import ConfigError

RECIPES = Path(__file__).parents[3] / "examples" / "recipes"
LLAMA = {name: RECIPES / f"llama-2-{name}" for name in ("7b", "70b")}


def config(model, **changes):
    needed = dict(data_path=(Path("-"),), output_dir=Path("-"), model_config=Path(model), train_iters=10, lr=1e-3)
    return TrainConfig(**{**needed, "seq_length": 8, "global_batch_size": 2, **changes})


def recipe(name, size, **changes):
    return config(LLAMA[size], **read_yaml(RECIPES / f"{name}.yaml"), **changes)


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_the_7b_recipe_on_8_devices():
    figures = describe(recipe("llama2-7b-ptd", "7b"), 8, "ascend910b3")
    h, f, layers, vocabulary = 4096, 11008, 32, 32000
    norms = (2 * layers + 1) * h
    matrices = layers * (4 * h * h + 3 * h * f) + 2 * vocabulary * h
    assert figures["parameters"] == matrices + norms == 6_738_415_616
    (stage,) = figures["stages"]
    assert stage["parameters"] == matrices // 8 + norms == 842_534_912
    assert stage["weight_bytes"] == 2 * 842_534_912
    assert stage["gradient_bytes"] == 4 * 842_534_912
    assert stage["optimizer_bytes"] == 12 * 842_534_912
    # 4 samples of 4096; each layer splits everything eightfold, the norms' factors too.
    layer = 4 * 4096 * (4 * h * 2 + 8 + (3 * 2 * h + 3 * f) * 2 + 4 * 32) // 8
    head = 4 * 4096 * ((2 * h + 4) // 8 * 8 + 2 * h * 8 + vocabulary * 2) // 8
    assert stage["activation_bytes"] == pytest.approx(layers * layer + head, rel=1e-6)
    assert (figures["num_microbatches"], figures["data_parallel_size"]) == (4, 1)
    assert figures["tokens_per_step"] == 16 * 4096
    assert stage["sent_bytes_per_step"]["data_parallel"] == stage["sent_bytes_per_step"]["pipeline"] == 0
    assert figures["device"]["fits"]
    step = 16 * 4096 * figures["model_flops_per_token"] / 8 / (20 * 1800e6 * 8192)
    assert figures["device"]["step_time_s_at_half_mfu"] == pytest.approx(2 * step)


def test_the_70b_recipe_on_64_devices():
    figures = describe(recipe("llama2-70b-ptd", "70b"), 64, "NVIDIA A100-SXM4-40GB")
    h, f, vocabulary, kv = 8192, 28672, 32000, 8 * 128
    layer = h * (h + 2 * kv) + h * h + 3 * h * f  # matrices of a layer
    table = vocabulary * h
    assert figures["parameters"] == 80 * (layer + 2 * h) + 2 * table + h == 68_976_648_192
    inner = 10 * (layer // 8 + 2 * h)
    expected = [inner + table // 8, *[inner] * 6, inner + table // 8 + h]
    assert [stage["parameters"] for stage in figures["stages"]] == expected
    repeated = 7 * (2 * 80 + 1) * h  # seven of eight tensor-parallel ranks hold the norms once more
    assert sum(8 * stage["parameters"] for stage in figures["stages"]) - repeated == figures["parameters"]
    assert [stage["optimizer_bytes"] for stage in figures["stages"]] == [12 * count for count in expected]
    assert [stage["passes_in_flight"] for stage in figures["stages"]] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert [stage["layers"] for stage in figures["stages"]] == [[[10 * n, 10 * n + 9]] for n in range(8)]
    assert figures["stages"][7]["ranks"] == [[56, 63]]
    hidden = 2 * 4096 * h * 2 // 8  # bytes of a micro-batch's hidden states on a rank
    assert [stage["sent_bytes_per_step"]["pipeline"] for stage in figures["stages"]] == [
        512 * hidden * neighbours for neighbours in (1, 2, 2, 2, 2, 2, 2, 1)
    ]
    # On each layer and micro-batch 4 all-gathers, 4 reduce-scatters, and 2 all-gathers for the weights' gradients.
    assert figures["stages"][3]["sent_bytes_per_step"]["tensor_parallel"] == 512 * 10 * 10 * 7 * hidden
    assert not figures["device"]["fits"]  # in 40 GB
    assert figures["pipeline_bubble"] == 7 / (512 + 7)


def test_zero_shares_out_what_its_stage_says():
    size = 6_738_415_616
    for stage, weights, gradients in ((1, size, size), (2, size, size / 8), (3, size / 8, size / 8)):
        config = dataclasses.replace(recipe("llama2-7b-zero", "7b"), zero_stage=stage)
        held = memory.states(config, LlamaConfig.from_hf(LLAMA["7b"]), 0, 8)
        assert (held.weight_bytes, held.gradient_bytes) == (2 * weights, 4 * gradients)
        assert held.optimizer_bytes == (12 * size / 8,) * 8


RECIPES_DESCRIBED = [("llama2-7b-ptd", "7b", 1), ("llama2-7b-zero", "7b", 1), ("llama2-70b-ptd", "70b", 8)]


@pytest.mark.parametrize(("name", "size", "nnodes"), RECIPES_DESCRIBED)
def test_recipes_are_described_without_data_weights_or_torch(name, size, nnodes):
    code = "import sys; from trainer.cli import main; code = main(); assert 'torch' not in sys.modules; sys.exit(code)"
    options = ["--config", RECIPES / f"{name}.yaml", "--model-config", LLAMA[size], "--nnodes", nnodes]
    command = [sys.executable, "-c", code, "describe", *map(str, options), "--nproc-per-node", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("\n\n")[1].splitlines()
    assert len(table) == 1 + nnodes
    assert len({len(line) for line in table}) == 1
    assert ("0 | 1 | ... | 7" if "zero" in name else f"{8 * nnodes - 8}-{8 * nnodes - 1}") in table[-1]
    assert ("(ZeRO stage 2)" in done.stdout) == ("zero" in name)


# --- exact bytes against megatron-core -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(workspace):
    """By rank, by case: what the wrapper and the optimizer took."""
    script = Path(counted_states.__file__)
    start = "import sys; from trainer import launch; sys.exit(launch.start(sys.argv[2:], 2, [sys.argv[1]]))"
    done = subprocess.run(
        [sys.executable, "-c", start, str(script), str(workspace / "hf")],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", counted_states.CASES)
def test_states_are_those_of_real_ranks(workspace, counted, name):
    tp, dtype, distributed, bucket_size = counted_states.CASES[name]
    asked = config(
        workspace / "hf",
        tensor_model_parallel_size=tp,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=distributed,
    )
    model = LlamaConfig.from_hf(workspace / "hf")
    if bucket_size is not None:
        check_buckets(asked, model, [said[name] for said in counted], bucket_size)
        return
    held = memory.states(asked, model, 0, 2 // tp)
    for rank, said in enumerate(counted):
        assert said[name]["weights"] == held.weight_bytes
        assert said[name]["gradients"] == held.gradient_bytes
        assert said[name]["moments"] + said[name]["masters"] == held.optimizer_bytes[rank // tp]
    if distributed and tp == 1:  # the control: padding and an uneven share are there to be missed
        assert held.gradient_bytes > 4 * held.parameters
        assert held.optimizer_bytes[0] != held.optimizer_bytes[1]


def check_buckets(asked, model, said, bucket_size):
    sizes = memory.parameter_sizes(asked, model, range(model.num_layers))
    buffer = memory.lay_out(sizes, bucket_size, 2)
    assert len(buffer.buckets) > 3
    for rank in range(2):
        assert said[rank]["buckets"] == [list(pair) for pair in buffer.buckets]
        assert said[rank]["moments"] + said[rank]["masters"] == 12 * buffer.updated_by(rank, 2)


def test_all_data_parallel_ranks_together_update_every_parameter_once():
    sizes = [1000, 7, 64, 129, 5]
    for dp_size in (1, 2, 3, 8):
        buffer = memory.lay_out(sizes, 100, dp_size)
        assert sum(buffer.updated_by(rank, dp_size) for rank in range(dp_size)) == sum(sizes)


# --- activations against autograd ------------------------------------------------------------------------------------


RECOMPUTATION = {
    "none": {},
    "uniform": dict(recompute_granularity="full", recompute_num_layers=2),
    "block": dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1),
    "attention": dict(recompute_granularity="selective"),
    "feed-forward": dict(recompute_granularity="selective", recompute_modules=("mlp",)),
    "both": dict(recompute_granularity="selective", recompute_modules=("core_attn", "mlp")),
}


@pytest.fixture
def groups_of_one():
    parallel.initialize()
    yield
    parallel.destroy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("recomputation", RECOMPUTATION)
def test_layers_keep_what_the_formula_says(monkeypatch, groups_of_one, dtype, groups, recomputation):
    monkeypatch.setattr(npu_kernels.ops.common, "SMALL", 0)  # as tensors of real sizes are treated
    model = LlamaConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=groups,
        kv_channels=16, vocab_size=5000,
    )  # fmt: skip
    changes = dict(micro_batch_size=2, seq_length=128, bf16=dtype == torch.bfloat16)
    asked = config("-", **changes, **RECOMPUTATION[recomputation])
    kept = [kept_bytes(dataclasses.replace(model, num_layers=count), asked, dtype) for count in (2, 4)]
    by_formula = [activations.chunk_bytes(asked, model, count) for count in (2, 4)]
    assert kept[1] - kept[0] == by_formula[1] - by_formula[0]
    whole = by_formula[0] + activations.head_bytes(asked, model)
    assert kept[0] == pytest.approx(whole, rel=2e-3)  # token ids and the like are not counted


def kept_bytes(model, asked, dtype):
    """Bytes of what autograd keeps of a forward pass, each storage once, without weights and rotary tables."""
    options = {"params_dtype": dtype}
    (network,) = parallel.build_chunks(model, asked.layout, transformer_options=options, recompute=recompute(asked))
    tokens = torch.zeros(asked.micro_batch_size, asked.seq_length, dtype=torch.int64)
    own = [*network.parameters(), *network.rotary.first(asked.seq_length, torch.device("cpu"))]
    apart = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(tokens, labels=tokens)
    assert loss.requires_grad
    return sum(storage.nbytes() for at, storage in storages.items() if at not in apart)


def recompute(asked):
    if asked.recompute_granularity is None:
        return None
    return Recompute(
        granularity=asked.recompute_granularity,
        method=asked.recompute_method,
        num_layers=asked.recompute_num_layers,
        modules=asked.recompute_modules,
    )


def test_recomputation_keeps_less_and_needs_a_working_set():
    model = LlamaConfig.from_hf(LLAMA["7b"])
    plain = config(LLAMA["7b"], seq_length=4096)
    whole, hidden = activations.layer_bytes(plain, model), activations.hidden_bytes(plain, model)
    assert hidden == 4096 * 4096 * 4

    def kept(layers, **changes):
        changed = dataclasses.replace(plain, **changes)
        return activations.chunk_bytes(changed, model, layers), activations.working_set_bytes(changed, model, layers)

    full = dict(recompute_granularity="full")
    assert kept(5) == (5 * whole, 0)
    assert kept(5, **full) == (5 * hidden, whole - hidden)
    assert kept(5, **full, recompute_num_layers=2) == (3 * hidden, 2 * whole - hidden)
    assert kept(5, **full, recompute_method="block", recompute_num_layers=2) == (
        2 * hidden + 3 * whole, whole - hidden,
    )  # fmt: skip
    mlp = 3 * 11008 * 4096 * 4
    assert kept(5, recompute_granularity="selective", recompute_modules=("mlp",)) == (5 * (whole - mlp), mlp)
    rows = 32 * 4096 * 4  # a number for each head of each token
    assert kept(5, recompute_granularity="selective") == (5 * (whole - rows), rows + hidden)


def test_passes_in_flight_of_both_schedules():
    one = config("-", pipeline_model_parallel_size=4, global_batch_size=16)
    assert [activations.passes_in_flight(one, stage, 1, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [activations.passes_in_flight(one, stage, 1, 2) for stage in range(4)] == [2, 2, 2, 1]
    assert [activations.passes_in_flight(one, stage, 2, 16) for stage in range(4)] == [11, 9, 7, 5]
    assert activations.passes_in_flight(one, 0, 2, 4) == 8


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_virtual_pipeline_and_data_parallel_copies_are_drawn():
    changes = dict(num_layers_per_virtual_pipeline_stage=5, pipeline_model_parallel_size=2, global_batch_size=16)
    asked = config(LLAMA["70b"], **changes)
    figures = describe(asked, 16)
    text = description.text(figures)
    assert "0-4, 10-14, 20-24" in text


def test_what_does_not_fit_together_is_named(capsys):
    options = ["describe", "--config", RECIPES / "llama2-70b-ptd.yaml", "--model-config", LLAMA["70b"]]
    refused = {
        ("--nproc-per-node", "8"): "8 processes do not divide",
        ("--nproc-per-node", "64", "--device", "abacus"): "none of the chips",
        ("--nproc-per-node", "64", "--seq-length", "8192"): "4096 positions",
        ("--nproc-per-node", "64", "--nnodes", "0"): "--nnodes 0",
    }
    for more, words in refused.items():
        assert main([*map(str, options), *more]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1


def test_a_dry_run_describes_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--config", RECIPES / "llama2-7b-ptd.yaml", "--model-config", LLAMA["7b"]]
    where = ["--data-path", "corpus", "--output-dir", "run"]
    assert main([*map(str, ["describe", *options])]) == 0
    described = capsys.readouterr().out
    for verb in ("pretrain", "finetune"):
        assert main([*map(str, [verb, *options, *where, "--dry-run"])]) == 0
        assert capsys.readouterr().out == described
    assert not list(tmp_path.iterdir())


def test_nothing_is_known_of_a_run_that_names_no_model():
    with pytest.raises(ConfigError, match="nothing to start from"):
        config("-", model_config=None)
