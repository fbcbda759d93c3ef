"""Zero mode: DeepSpeed's engine against Hugging Face with PyTorch's AdamW, and from engine to engine, on 1, 2, 4 ranks.

Stage 3 changes torch's functions in the processes that it runs in: they are this module's own.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import engine_case
import numpy as np
import pytest
import rank_cases
import zero_cases
from ckpt_tools import LlamaConfig, convert, open_checkpoint
from ranks import Ranks
from test_parity import LOSS, NORM, WEIGHT
from trainer import deepspeed_options
from trainer.errors import ConfigError

TP2 = dict(tensor_model_parallel_size=2)
FULL = dict(recompute_granularity="full", recompute_num_layers=2)
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=("core_attn", "mlp"))
PARTS = ("weights", "main_weights", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def pools():
    """One, two and four processes."""
    with Ranks(1, 120) as one, Ranks(2, 120) as two, Ranks(4, 120) as four:
        yield {pool.size: pool for pool in (one, two, four)}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """13 steps: saved after the third, and gone on with for ten."""
    return engine_case.make(tmp_path_factory.mktemp("zero"), engine_case.GROUPS["gqa"], 13)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return engine_case.make(tmp_path_factory.mktemp("long"), engine_case.GROUPS["gqa"], 20)


def assert_parity(results, case):
    for history, weight in results:
        losses, norms = np.array(history).T
        expected_losses, expected_norms = np.array(case.history).T
        np.testing.assert_allclose(losses, expected_losses, atol=LOSS, rtol=0)
        np.testing.assert_allclose(norms, expected_norms, rtol=NORM)
        assert weight < WEIGHT


# --- it trains as Hugging Face does ----------------------------------------------------------------------------------

LAYOUTS = {
    "one rank, stage 1": (1, dict(zero_stage=1)),
    "one rank, stage 2": (1, dict(zero_stage=2, micro_batch_size=4)),
    "one rank, stage 3": (1, dict(zero_stage=3, **FULL)),
    "two ranks, stage 1": (2, dict(zero_stage=1)),
    "two ranks, stage 2": (2, dict(zero_stage=2, **SELECTIVE)),
    "two ranks, stage 3": (2, dict(zero_stage=3, micro_batch_size=1)),
    "four ranks, stage 1": (4, dict(zero_stage=1, **FULL)),
    "four ranks, stage 2": (4, dict(zero_stage=2)),
    "four ranks, stage 3": (4, dict(zero_stage=3, **SELECTIVE)),
    "tp2 dp2, stage 1": (4, dict(zero_stage=1, **TP2)),
    "tp2 dp2, stage 2": (4, dict(zero_stage=2, micro_batch_size=1, **TP2)),
    "tp2 dp2, stage 3": (4, dict(zero_stage=3, **TP2, **FULL)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_twenty_steps_are_hugging_faces(pools, long, name):
    size, options = LAYOUTS[name]
    assert_parity(pools[size].run(zero_cases.train, long, options), long)


def test_the_comparison_notices_a_wrong_weight(pools, case, tmp_path):
    wrong = dataclasses.replace(case, folder=engine_case.swapped(case, tmp_path))
    with pytest.raises(AssertionError):
        assert_parity(pools[2].run(zero_cases.train, wrong, dict(zero_stage=3)), case)


def test_the_comparison_notices_a_loss_that_is_a_mean_of_means(pools, case):
    tokens, labels = case.batches[0]
    moved = labels.clone()
    moved[0] = -100
    other = dataclasses.replace(case, batches=[(tokens, moved), *case.batches[1:]])
    with pytest.raises(AssertionError):
        assert_parity(pools[2].run(zero_cases.train, other, dict(zero_stage=2)), case)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_gradient_is_clipped(pools, case, stage):
    """Without clipping the norms and losses are others from the second step on; the first norm is that before it."""
    assert min(norm for _, norm in case.history) > rank_cases.OPTIMIZER["clip_grad"]
    unclipped = np.array(pools[2].run(zero_cases.train, case, dict(zero_stage=stage, clip_grad=0.0))[0][0])
    np.testing.assert_allclose(unclipped[0], case.history[0], rtol=NORM)
    assert abs(unclipped - np.array(case.history))[1:, 0].max() > 100 * LOSS


@pytest.mark.parametrize(("stage", "layout"), [(1, {}), (2, TP2), (3, TP2)])
def test_bfloat16_stays_near(pools, case, stage, layout):
    for history, _ in pools[4].run(zero_cases.train, case, dict(zero_stage=stage, bf16=True, **layout)):
        np.testing.assert_allclose(np.array(history)[:, 0], np.array(case.history)[:, 0], atol=0.03)


def test_the_norm_of_many_gradients_in_bfloat16_is_exact(pools, case):
    (norms,) = pools[1].run(zero_cases.norm_of_many, case, dict(zero_stage=1, bf16=True))
    assert abs(norms["ours"] / norms["exact"] - 1) < 1e-7
    assert abs(norms["torch"] / norms["exact"] - 1) > 1e-6, "torch has mended its own: so can we do without ours"


def test_validation_and_the_wish_to_stop_are_every_ranks(pools, case):
    for stage in (2, 3):
        for loss, trained, stop in pools[4].run(zero_cases.evaluated, case, dict(zero_stage=stage, **TP2)):
            assert abs(loss - case.history[0][0]) < LOSS
            assert abs(trained - case.history[0][0]) < LOSS
            assert stop


def test_a_run_leaves_no_thread_behind(pools, case):
    """At stage 3 DeepSpeed keeps two of the groups for good."""
    for first, *others in pools[2].run(rank_cases.threads_left, case, zero(2)):
        assert set(others) == {first}


def test_each_stage_holds_the_bytes_that_zero_promises(pools, case):
    """4 bytes a weight and gradient, 8 for moments; what a stage shares out falls with the ranks (padding apart).

    Stage 2 keeps the gradient of a parameter that lies in two ranks' shares whole on both.
    """
    with open_checkpoint(case.folder) as checkpoint:
        sizes = [4 * int(np.prod(checkpoint.shape(name))) for name in checkpoint.names()]
    whole = sum(sizes)
    for ranks in (1, 2, 4):
        for stage in (1, 2, 3):
            for held in pools[ranks].run(zero_cases.bytes_held, case, dict(zero_stage=stage, micro_batch_size=1)):
                share = pytest.approx(whole / ranks, rel=0.01)
                assert held["weights"] == (share if stage == 3 else whole)
                assert held["optimizer"] == pytest.approx(2 * whole / ranks, rel=0.01)
                if stage == 2:
                    assert whole / ranks <= held["gradients"] <= 1.01 * whole / ranks + max(sizes) * (ranks > 1)
                else:
                    assert held["gradients"] == (share if stage == 3 else whole)


@pytest.mark.parametrize("groups", ["mha", "gqa"])
def test_a_converted_deepspeed_folder_is_where_a_run_can_begin(pools, cases, tmp_path, groups):
    case, options = cases[groups], dict(zero_stage=3)
    convert(case.folder, tmp_path / "deepspeed", to="deepspeed")
    begun = dataclasses.replace(case, folder=tmp_path / "deepspeed")
    assert pools[2].run(zero_cases.train, begun, options) == pools[2].run(zero_cases.train, case, options)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def zero(stage, **options):
    return dict(mode="zero", zero_stage=stage, **options)


def content(folder, case, parts=PARTS):
    """What a checkpoint holds of every parameter, by part and canonical name."""
    config = LlamaConfig.from_hf(case.folder)
    found = {}
    for part in parts:
        with open_checkpoint(folder, config, part=part) as checkpoint:
            found |= {(part, name): np.array(checkpoint.read(name), np.float32) for name in checkpoint.names()}
    return found


def assert_same_content(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert np.array_equal(value, other[key]), key
        assert value.any(), f"{key} holds nothing but zeros: the comparison shows nothing"


RESUMED = {
    "stage 1": (2, zero(1)),
    "stage 2": (4, zero(2, **TP2)),
    "stage 3": (4, zero(3, **TP2)),
    "stage 1 in bf16": (2, zero(1, bf16=True)),
    "stage 2 in bf16": (2, zero(2, bf16=True)),
    "stage 3 in bf16": (2, zero(3, bf16=True)),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(pools, case, tmp_path, name):
    size, options = RESUMED[name]
    expected = pools[size].run(rank_cases.straight, case, options, tmp_path / "a", False)[0]
    for history, intact in pools[size].run(rank_cases.resumed, case, options, tmp_path / "a", tmp_path / "b"):
        assert history == expected
        assert intact
    end = "checkpoints/iter_0000013"
    assert_same_content(content(tmp_path / "a" / end, case), content(tmp_path / "b" / end, case))


PTD = {
    "plain": dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
    "distributed": dict(use_distributed_optimizer=True, **TP2),
}
CROSSINGS = {
    "ptd to ptd": ((4, PTD["plain"]), (2, PTD["distributed"])),
    "ptd to zero": ((4, PTD["plain"]), (2, zero(2))),
    "ptd, distributed optimizer, to zero stage 3": ((4, PTD["distributed"]), (1, zero(3))),
    "zero to ptd": ((4, zero(2, **TP2)), (2, dict(pipeline_model_parallel_size=2))),
    "zero stage 3 to ptd, distributed optimizer": ((2, zero(3)), (4, PTD["distributed"])),
    "zero to zero": ((4, zero(3, **TP2)), (2, zero(1))),
    "zero to more zero": ((1, zero(2)), (4, zero(3, **TP2))),
}


@pytest.mark.parametrize("name", CROSSINGS)
def test_a_run_changes_engine_and_size_midway(pools, case, tmp_path, name):
    (size, options), (other_size, other) = CROSSINGS[name]
    expected = pools[size].run(rank_cases.straight, case, options, tmp_path / "a", False)[0]
    half = tmp_path / "a/checkpoints/iter_0000003"
    for history, _ in pools[other_size].run(rank_cases.resumed, case, other, tmp_path / "a", tmp_path / "b"):
        np.testing.assert_allclose(np.array(history), np.array(expected), atol=LOSS, rtol=NORM)
    assert_same_content(content(half, case), content(tmp_path / "b/checkpoints/iter_0000003", case))


TUNED = {
    "reduce_scatter": False,
    "allgather_partitions": False,
    "reduce_bucket_size": 700,
    "allgather_bucket_size": 900,
    "overlap_comm": True,
    "contiguous_gradients": False,
    "sub_group_size": 1000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 100,
    "stage3_max_reuse_distance": 100,
}


def test_what_a_users_json_may_tune_changes_no_number(pools, case, tmp_path):
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"zero_optimization": TUNED}), "utf-8")
    two, three = (dict(mode="zero", zero_stage=stage, deepspeed_config=file) for stage in (2, 3))
    first = pools[2].run(rank_cases.straight, case, two, tmp_path / "a", False)[0]
    second = pools[4].run(rank_cases.resumed, case, three, tmp_path / "a", tmp_path / "b")
    plain = pools[2].run(rank_cases.resumed, case, zero(1), tmp_path / "b", tmp_path / "c")
    for history, _ in (*second, *plain):
        np.testing.assert_allclose(np.array(history), np.array(first), atol=LOSS, rtol=NORM)
    half = "checkpoints/iter_0000003"
    for home in ("b", "c"):
        assert_same_content(content(tmp_path / "a" / half, case), content(tmp_path / home / half, case))


def test_another_optimizers_state_is_refused(pools, case, tmp_path):
    """As a permutation of it would be: nothing else shows it, and the run would go on to be another one."""
    pools[2].run(rank_cases.straight, case, zero(2), tmp_path, False)
    later, earlier = (tmp_path / f"checkpoints/iter_{step:07d}" for step in (13, 3))
    for path in later.glob("*_optim_states.pt"):
        shutil.copy(path, earlier)
    for options in (zero(3), dict(use_distributed_optimizer=True)):
        (said,) = set(pools[2].run(zero_cases.refused_resume, case, options, earlier))
        assert "the optimizer's weights of" in said


def test_the_comparison_notices_a_step_too_many(pools, case, tmp_path):
    pools[2].run(rank_cases.straight, case, zero(2), tmp_path, False)
    earlier, later = (content(tmp_path / f"checkpoints/iter_{step:07d}", case) for step in (3, 13))
    with pytest.raises(AssertionError):
        assert_same_content(earlier, later)


def test_bfloat16_keeps_its_main_weights_from_engine_to_engine(pools, case, tmp_path):
    ptd = dict(bf16=True, use_distributed_optimizer=True)
    pools[2].run(rank_cases.straight, case, ptd, tmp_path / "a", False)
    source, parts = tmp_path / "a/checkpoints/iter_0000003", PARTS[1:]
    expected, steps = content(source, case, parts), set()
    for number, options in enumerate((zero(1, bf16=True), zero(3, bf16=True), ptd)):
        home = tmp_path / str(number)
        states = pools[2].run(zero_cases.saved_again, case, options, source, home)
        steps |= {json.dumps(state) for state in states}
        source = home / "checkpoints/iter_0000003"
        assert_same_content(expected, content(source, case, parts))
    assert len(steps) == 1
    assert '"optimizer_steps": 3' in steps.pop()


def test_the_loss_scale_goes_on_in_either_engine(pools):
    """DeepSpeed has no float16 on a CPU: its scaler and megatron-core's are asked alone, after random overflows."""
    (results,) = pools[1].run(zero_cases.scales, 200)
    for source, target, expected, found in results:
        assert found == expected, f"{source} to {target}"
    assert len({json.dumps(expected) for _, _, expected, _ in results}) > 20, (
        "all the same: the comparison shows nothing"
    )


def test_deepspeeds_own_loader_opens_a_checkpoint(pools, case, tmp_path):
    for stage in (2, 3):
        home = tmp_path / str(stage)
        expected = pools[2].run(rank_cases.straight, case, zero(stage), home, False)[0]
        folder = home / "checkpoints/iter_0000003"
        found = pools[2].run(zero_cases.opened_by_deepspeed, case, dict(zero_stage=stage), folder)[0]
        assert [step[:2] for step in found] == [step[:2] for step in expected]
        assert not (home / "checkpoints/latest").exists()


def test_stage_3_is_exported(pools, case, tmp_path):
    pools[4].run(rank_cases.straight, case, zero(3, **TP2), tmp_path, False)
    folder = tmp_path / "checkpoints/iter_0000013"
    convert(folder, tmp_path / "hf", to="hf", config=case.folder)
    assert_same_content(content(folder, case, PARTS[:1]), content(tmp_path / "hf", case, PARTS[:1]))
    trained = content(case.weights, case, PARTS[:1])
    for key, value in content(tmp_path / "hf", case, PARTS[:1]).items():
        np.testing.assert_allclose(value, trained[key], atol=WEIGHT)


# --- options ---------------------------------------------------------------------------------------------------------


def options_with(tmp_path, user, **options):
    file = tmp_path / "deepspeed.json"
    file.write_text(user if isinstance(user, str) else json.dumps(user), "utf-8")
    return deepspeed_options.deepspeed_options(
        rank_cases.config_of(tmp_path, mode="zero", deepspeed_config=file, **options), 2
    )


def test_a_users_json_adds_to_the_options(tmp_path):
    user = {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 0.5,
        "wall_clock_breakdown": True,
    }
    merged = options_with(tmp_path, user)
    assert merged["zero_optimization"] == {
        "stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000, "contiguous_gradients": True,
    }  # fmt: skip
    assert merged["train_micro_batch_size_per_gpu"] == 2
    assert merged["gradient_accumulation_steps"] == 2
    assert merged["wall_clock_breakdown"] is True


CONTRADICTIONS = {
    "stage": ({"zero_optimization": {"stage": 3}}, r"zero_optimization.stage is 3 in .*, 2 by --zero-stage"),
    "clipping": ({"gradient_clipping": 1.0}, r"gradient_clipping is 1.0 in .*, 0.5 by --clip-grad"),
    "batch": ({"train_batch_size": 32}, r"train_batch_size is 32 in .*, 8 by --global-batch-size"),
    "precision": ({"fp16": {"enabled": True}}, r"fp16.enabled is True in .*, False by --fp16"),
    "optimizer": ({"optimizer": {"type": "Lamb"}}, r"has the key optimizer.type: leave it out"),
    "offloading": ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offloading is not supported"),
    "a section that is none": ({"bf16": True}, "bf16 in .* must be an object"),
    "an unknown key": (
        {"zero_optimisation": {"stage": 2}},
        "has no place here: perhaps you meant zero_optimization.stage",
    ),
    "another order": ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients: leave it out"),
    "main weights in bfloat16": ({"bf16": {"bf16_master_weights_and_grads": True}}, "which has no place here"),
    "another layout of files": ({"zero_optimization": {"elastic_checkpoint": True}}, "which has no place here"),
    "a size that is none": ({"zero_optimization": {"sub_group_size": "1e9"}}, "is '1e9' in .*: give a whole number"),
    "a switch that is none": ({"zero_optimization": {"overlap_comm": 1}}, "is 1 in .*: give true or false"),
    "offloading as it was once spelt": ({"zero_optimization": {"cpu_offload": True}}, "offloading is not supported"),
    "gradients in half precision": ({"communication_data_type": "fp16"}, "'fp32' by this package"),
    "no JSON": ("{", "is not JSON"),
    "no object": ("[]", "must hold a JSON object"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_users_json_that_contradicts_is_refused(tmp_path, name):
    user, words = CONTRADICTIONS[name]
    with pytest.raises(ConfigError, match=words):
        options_with(tmp_path, user)


def test_without_deepspeed_one_line_names_the_extra(tmp_path, monkeypatch):
    config = rank_cases.config_of(tmp_path, mode="zero")
    deepspeed_options.check(config, 2)
    monkeypatch.setattr(deepspeed_options, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"trainer\[deepspeed\]"):
        deepspeed_options.check(config, 2)


def test_float16_is_refused_on_a_cpu_before_anything_is_written(tmp_path):
    config = rank_cases.config_of(tmp_path, mode="zero", fp16=True)
    deepspeed_options.check(config, 2, "cuda")
    with pytest.raises(ConfigError, match="no float16 on a CPU"):
        deepspeed_options.check(config, 2, "cpu")


REFUSED = {
    "stages of a pipeline": (
        dict(pipeline_model_parallel_size=2),
        "--pipeline-model-parallel-size 2 is for --mode ptd",
    ),
    "the distributed optimizer": (
        dict(use_distributed_optimizer=True),
        "--use-distributed-optimizer is for --mode ptd",
    ),
    "saving in the background": (dict(async_save=True), "--async-save is for --mode ptd"),
    "stage 0": (dict(zero_stage=0), "--zero-stage 0: .* shares nothing out"),
    "stage 4": (dict(zero_stage=4), "--zero-stage 4: choose 1, 2 or 3"),
    "weights alone of stage 3": (dict(zero_stage=3, save_optimizer=False), "--no-save-optimizer"),
    "another scale": (dict(fp16=True, initial_loss_scale=1000.0), "--initial-loss-scale 1000.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_zero_mode_has_not_are_refused(tmp_path, name):
    options, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words):
        rank_cases.config_of(tmp_path, mode="zero", **options)


@pytest.mark.parametrize("options", [dict(deepspeed_config=Path("file.json")), dict(zero_stage=3)])
def test_options_of_zero_mode_are_refused_in_ptd_mode(tmp_path, options):
    with pytest.raises(ConfigError, match="is for --mode zero, the mode is ptd"):
        rank_cases.config_of(tmp_path, **options)
