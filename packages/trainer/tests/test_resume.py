"""Checkpoints of the engine: the same layout goes on bit for bit, any other one carries every tensor over unchanged."""

import numpy as np
import pytest
import rank_cases
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

TP2_PP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2)
LAYOUTS = {
    "dp4": dict(),
    "dp4 distopt": dict(use_distributed_optimizer=True),
    "tp2+sp dp2 distopt": dict(tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=True),
    "tp2+sp pp2": TP2_PP2,
    "pp2+vpp dp2 distopt": dict(
        pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1, use_distributed_optimizer=True
    ),
}
TURNS = list(zip(LAYOUTS, [*LAYOUTS][1:] + [*LAYOUTS][:1], strict=True))
"""Each layout's checkpoint goes on in the next one's: the distributed optimizer is switched on and off on the way."""


def tensors(folder, tmp_path):
    """Everything that a checkpoint holds, whole, by key: read by torch's own reader. (The test's files are trusted.)"""
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    return {key: value for key, value in whole.items() if torch.is_tensor(value)}


def assert_same_content(one, other, tmp_path):
    """Bit for bit, but for the vocabulary's padding, which depends on the layout."""
    first, second = tensors(one, tmp_path), tensors(other, tmp_path)
    assert first.keys() == second.keys()
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in first)
    for key, value in first.items():
        rows = min(len(value), len(second[key]), 101 if "embedding" in key or "output_layer" in key else 10**9)
        assert torch.equal(value[:rows], second[key][:rows]), key
        assert value[:rows].any(), f"{key} holds nothing but zeros: the comparison shows nothing"


@pytest.fixture(scope="module")
def straight(ranks, cases, tmp_path_factory):
    """Uninterrupted runs of every layout: where they saved, and their last ten steps."""
    found = {}
    for name, options in LAYOUTS.items():
        home = tmp_path_factory.mktemp("straight")
        found[name] = (home, ranks.run(rank_cases.straight, cases["gqa"], options, home, False)[0])
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(ranks, cases, straight, tmp_path, name):
    home, expected = straight[name]
    for history, intact in ranks.run(rank_cases.resumed, cases["gqa"], LAYOUTS[name], home, tmp_path):
        assert history == expected
        assert intact
    end = "checkpoints/iter_0000013"
    assert_same_content(home / end, tmp_path / end, tmp_path)


@pytest.mark.parametrize(("saved", "resumed"), TURNS)
def test_another_layout_takes_over_every_bit(ranks, cases, straight, tmp_path, saved, resumed):
    home, expected = straight[saved]
    for history, _ in ranks.run(rank_cases.resumed, cases["gqa"], LAYOUTS[resumed], home, tmp_path):
        np.testing.assert_allclose(np.array(history), np.array(expected), atol=2e-6, rtol=1e-5)
    half = "checkpoints/iter_0000003"
    assert_same_content(home / half, tmp_path / half, tmp_path)


def test_the_comparison_notices_a_step_too_many(straight, tmp_path):
    home, _ = straight["dp4"]
    with pytest.raises(AssertionError):
        assert_same_content(home / "checkpoints/iter_0000003", home / "checkpoints/iter_0000013", tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_resumes_bit_for_bit_and_with_another_optimizer(ranks, cases, tmp_path, precision):
    case, plain = cases["gqa"], {precision: True, "tensor_model_parallel_size": 2}
    split = {**plain, "use_distributed_optimizer": True}
    for options, other in ((plain, split), (split, plain)) if precision == "bf16" else ((split, plain),):
        home = tmp_path / str(len(options))
        expected = ranks.run(rank_cases.straight, case, options, home, False)[0]
        assert ranks.run(rank_cases.resumed, case, options, home, home / "again")[0][0] == expected
        ranks.run(rank_cases.resumed, case, other, home, home / "other")
        half = "checkpoints/iter_0000003"
        assert_same_content(home / half, home / "other" / half, tmp_path)


def test_a_save_in_the_background_keeps_what_was_there_when_it_began(ranks, cases, straight, tmp_path):
    for name in ("dp4", "dp4 distopt"):
        home, expected = straight[name]
        assert ranks.run(rank_cases.straight, cases["gqa"], LAYOUTS[name], tmp_path / name, True)[0] == expected
        half = "checkpoints/iter_0000003"
        assert_same_content(home / half, tmp_path / name / half, tmp_path)
