"""ZeRO's flat shares of the optimizer's state, cut here as DeepSpeed cuts them: any sizes, no parameter at a border."""

import shutil
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from ckpt_tools import CheckpointError, UsageError, open_checkpoint, sharding
from models import small

PARTS = ("main_weights", "exp_avg", "exp_avg_sq")
GLOBALS = "deepspeed.utils.tensor_fragment"


@dataclass
class fragment_address:
    numel: int
    start: int


fragment_address.__module__ = GLOBALS


@pytest.fixture(autouse=True)
def named(monkeypatch):
    """Lets torch.save write the name without DeepSpeed; reading imports nothing."""
    for name in ("deepspeed", "deepspeed.utils", GLOBALS):
        module = types.ModuleType(name)
        module.fragment_address = fragment_address
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="module")
def config():
    return small()


@pytest.fixture(scope="module")
def values(config):
    """Each part of every parameter, whole."""
    generator = np.random.default_rng(4)
    return {
        part: {name: generator.standard_normal(rule.shape, np.float32) for name, rule in sharding(config).items()}
        for part in PARTS
    }


def shards(config, whole, tp, tp_size):
    """What a tensor-parallel rank holds, flat, in two groups as optimizers have them: matrices, then vectors."""
    groups = [{}, {}]
    for name, rule in sharding(config).items():
        padded = -(-rule.shape[0] // tp_size) * tp_size
        view = rule.view(tp, tp_size, padded)
        columns = slice(None) if view.columns is None else (slice(None), slice(*view.columns))
        rows = np.concatenate([whole[name][start:stop] for start, stop in view.rows])
        kept = rows[columns] if view.columns else rows
        padding = np.full((view.padding, *kept.shape[1:]), 7, np.float32)
        groups[kept.ndim == 1][name] = np.concatenate([kept, padding])
    return groups


def write(folder, config, values, tp_size, dp_size, stage, prefix=""):
    folder.mkdir()
    for tp in range(tp_size):
        of_part = {part: shards(config, values[part], tp, tp_size) for part in PARTS}
        for dp in range(dp_size):
            cut = cut_parameters if stage == 3 else cut_groups
            flats, mappings = zip(
                *(cut(part, dp, dp_size) for part in zip(*of_part.values(), strict=True)), strict=True
            )
            tensors = [[torch.from_numpy(flat) for flat in group] for group in flats]
            state = {n: {"step": torch.tensor(3.0), "exp_avg": g[1], "exp_avg_sq": g[2]} for n, g in enumerate(tensors)}
            main, base = [group[0] for group in tensors], {"state": state, "param_groups": []}
            name = f"zero_pp_rank_{dp}_mp_rank_{tp:02d}"
            if stage == 3:
                content = {"fp32_flat_groups": main, "optimizer_state_dict": base, "partition_count": dp_size}
                shapes = [{key: torch.Size(value.shape) for key, value in group.items()} for group in of_part[PARTS[0]]]
                torch.save({"module": {}, "param_shapes": shapes}, folder / f"{name}_model_states.pt")
            else:
                content = {"single_partition_of_fp32_groups": main, "base_optimizer_state": base}
                content |= {"param_slice_mappings": list(mappings), "partition_count": [dp_size, dp_size]}
            torch.save({"optimizer_state_dict": content}, folder / f"{prefix}{name}_optim_states.pt")
    if stage != 3:
        (folder / "mp_rank_00_model_states.pt").touch()  # recognised by; weights are not asked for
    return folder


def cut_groups(parts, dp, dp_size):
    """An even share of each group's elements, wherever parameters begin."""
    total = sum(value.size for value in parts[0].values())
    size = -(-total // dp_size)
    flats = [np.concatenate([value.ravel() for value in part.values()])[dp * size : (dp + 1) * size] for part in parts]
    mapping, at = {}, -dp * size
    for name, value in parts[0].items():
        first, last = max(at, 0), min(at + value.size, size)
        if first < last:
            mapping[name] = fragment_address(numel=last - first, start=first)
        at += value.size
    return flats, mapping


def cut_parameters(parts, dp, dp_size):
    """An even share of each parameter, one behind the other, the last one padded."""
    flats = []
    for part in parts:
        padded = [np.pad(value.ravel(), (0, -value.size % dp_size)) for value in part.values()]
        flats.append(np.concatenate([value.reshape(dp_size, -1)[dp] for value in padded]))
    return flats, None


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("tp_size", "dp_size"), [(1, 1), (1, 3), (2, 1), (2, 5), (2, 7)])
def test_every_part_is_read_whole_and_in_slices(tmp_path, config, values, stage, tp_size, dp_size):
    folder = write(tmp_path / "run", config, values, tp_size, dp_size, stage, "bf16_" if dp_size == 3 else "")
    for part in PARTS:
        with open_checkpoint(folder, config, part=part) as checkpoint:
            assert checkpoint.layout.tensor_model_parallel_size == tp_size
            for name, expected in values[part].items():
                assert np.array_equal(checkpoint.read(name), expected), name
                assert np.array_equal(checkpoint.read(name, (slice(1, 9),)), expected[1:9])
                shard = checkpoint.read_shard(name, 1, 2, padded_vocab_size=40)
                assert np.array_equal(checkpoint.read_shard(name, 1, 2, padded_vocab_size=40, rows=(2, 7)), shard[2:7])


def test_the_weights_of_stage_3_are_its_main_weights(tmp_path, config, values):
    folder = write(tmp_path / "run", config, values, 2, 3, stage=3)
    with open_checkpoint(folder, config) as checkpoint:
        assert all(np.array_equal(checkpoint.read(name), value) for name, value in values["main_weights"].items())


def test_a_missing_share_is_named(tmp_path, config, values):
    for stage in (2, 3):
        folder = write(tmp_path / str(stage), config, values, 2, 3, stage)
        (folder / "zero_pp_rank_2_mp_rank_01_optim_states.pt").unlink()
        with pytest.raises(CheckpointError, match="rank 2 of 3, tensor-parallel rank 1"):
            open_checkpoint(folder, config, part="exp_avg")


@pytest.mark.parametrize("stage", [2, 3])
def test_shares_of_two_checkpoints_are_refused(tmp_path, config, values, stage):
    folder, other = (write(tmp_path / str(count), config, values, 1, count, stage) for count in (2, 3))
    share = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (folder / share).write_bytes((other / share).read_bytes())
    with pytest.raises(CheckpointError, match=r"is one of 2 shares, .* one of 3"):
        open_checkpoint(folder, config, part="exp_avg")


@pytest.mark.parametrize(("count", "words"), [(10**15, "lacks the share"), (None, "elements of group 0, expected")])
def test_a_number_of_shares_that_is_wrong_is_refused(tmp_path, config, values, count, words):
    folder = write(tmp_path / "run", config, values, 1, 3, 3)
    for path in sorted(folder.glob("*_optim_states.pt")):
        content = torch.load(path, weights_only=False)
        content["optimizer_state_dict"]["partition_count"] = count
        torch.save(content, path)
    if count is None:
        for path in folder.glob("zero_pp_rank_2_*"):  # one that is there twice, under a number too many
            shutil.copy(path, folder / path.name.replace("rank_2", "rank_3"))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder, config, part="exp_avg")


def test_an_address_that_leads_out_of_its_file_is_refused(tmp_path, config, values):
    folder = write(tmp_path / "run", config, values, 1, 2, stage=2)
    file = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(file, weights_only=False)  # the test's own
    mapping = content["optimizer_state_dict"]["param_slice_mappings"][0]
    name = next(iter(mapping))
    for address in (fragment_address(10**6, 0), fragment_address(5, -3), fragment_address("5", 0)):
        mapping[name] = address
        torch.save(content, file)
        with pytest.raises(CheckpointError):
            open_checkpoint(folder, config, part="exp_avg")


def test_what_holds_no_optimizer_says_so(tmp_path, model, config, values):
    with pytest.raises(CheckpointError, match="no optimizer's exp_avg"):
        open_checkpoint(model, part="exp_avg")
    folder = write(tmp_path / "run", config, values, 1, 1, stage=2)
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="no optimizer's state"):
        open_checkpoint(folder, config, part="exp_avg")
    with pytest.raises(UsageError, match="give --config"):
        open_checkpoint(write(tmp_path / "other", config, values, 1, 1, stage=2), part="exp_avg").names()
