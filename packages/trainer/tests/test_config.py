"""Options: precedence, YAML's traps, contradictions named with both values."""

import dataclasses
from pathlib import Path

import pytest
from trainer import TrainConfig
from trainer.config_file import options_of_run, partial_default, read_yaml, without_restated_flags, write_yaml
from trainer.errors import ConfigError

NEEDED = dict(
    data_path=(Path("data"),),
    load_weights=Path("model"),
    output_dir=Path("run"),
    train_iters=10,
    seq_length=16,
    global_batch_size=8,
    lr=1e-3,
)


def yaml_of(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, "utf-8")
    return path


def test_a_number_without_a_point_is_still_a_number(tmp_path):
    assert read_yaml(yaml_of(tmp_path, "lr: 3e-4\nmin_lr: 0")) == {"lr": 3e-4, "min_lr": 0.0}


@pytest.mark.parametrize("line", ["bf16: 'no'", "train_iters: 1.5", "train_iters: true", "lr: fast", "mode: zerro"])
def test_a_value_of_another_type_is_refused(tmp_path, line):
    with pytest.raises(ConfigError, match=line.split(":")[0]):
        read_yaml(yaml_of(tmp_path, line))


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path):
    with pytest.raises(ConfigError, match="perhaps you meant 'global_batch_size'"):
        read_yaml(yaml_of(tmp_path, "global_batchsize: 8"))


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_yaml(yaml_of(tmp_path, text))


def test_the_resolved_configuration_is_a_valid_one(tmp_path):
    config = TrainConfig(**NEEDED, bf16=True, lr_decay_iters=50)
    write_yaml(config, tmp_path / "config.yaml")
    again = TrainConfig(**read_yaml(tmp_path / "config.yaml"))
    paths = {name: NEEDED[name].absolute() for name in ("load_weights", "output_dir")}
    assert again == dataclasses.replace(config, data_path=(Path("data").absolute(),), **paths)


def test_a_run_that_changes_its_mode_leaves_the_options_of_the_old_one_behind(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    ptd = dict(sequence_parallel=True, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    write_yaml(TrainConfig(**NEEDED, **ptd, use_distributed_optimizer=True), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="--sequence-parallel is for --mode ptd"):
        TrainConfig(**options_of_run(tmp_path) | {"mode": "zero"})
    config = TrainConfig(**options_of_run(tmp_path, "zero") | {"mode": "zero", "zero_stage": 3})
    assert config.tensor_model_parallel_size == 2
    write_yaml(config, tmp_path / "config.yaml")
    assert TrainConfig(**options_of_run(tmp_path, "ptd") | {"mode": "ptd"}).zero_stage == 2


def test_what_a_file_leaves_open_stays_required():
    default = partial_default({"lr": 0.5})
    assert default.lr == 0.5
    assert default.train_iters is partial_default({}).seq_length  # the parser's mark for a missing value


def test_a_switch_may_say_again_what_the_file_says():
    default = partial_default({"bf16": True, "save_optimizer": False})
    said = ["--bf16", "--no-save_optimizer", "--no-fp16", "--no-bf16", "--save-optimizer", "--fp16", "--lr", "1"]
    assert without_restated_flags(said, default) == ["--no-bf16", "--save-optimizer", "--fp16", "--lr", "1"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bf16": True, "fp16": True}, "--bf16 and --fp16"),
        ({"min_lr": 1.0}, "--min-lr 1.0 is above --lr 0.001"),
        ({"lr_warmup_iters": 10}, "--lr-warmup-iters 10"),
        ({"split": "1,2"}, "--split"),
        ({"split": "0,1,0"}, "--split"),
        ({"seq_length": 0}, "--seq-length 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"adam_beta1": 1.0}, "--adam-beta1 1.0"),
        ({"weight_decay": float("inf")}, "--weight-decay inf must be finite"),
        ({"seed": -1}, "--seed -1"),
        ({"split": "inf,1,1"}, "--split"),
        ({"load_weights": None}, "nothing to start from"),
        ({"model_config": Path("c")}, "exclude each other"),
        ({"data_path": (0.5, Path("a"), Path("b"))}, "a weight before each of several"),
        ({"data_path": ()}, "give one prefix"),
        ({"data_path": (0.0, Path("a"), 1.0, Path("b"))}, "must all be above 0"),
        ({"sequence_parallel": True}, "--sequence-parallel needs"),
        ({"overlap_param_gather": True}, "--overlap-param-gather needs"),
        ({"num_layers_per_virtual_pipeline_stage": 1}, "pipeline_model_parallel_size of 2 or more"),
        ({"lr_warmup_iters": 1, "lr_warmup_fraction": 0.1}, "exclude each other"),
    ],
)
def test_contradictions_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**{**NEEDED, **change})


def test_batches_and_processes_have_to_divide():
    config = TrainConfig(**NEEDED, micro_batch_size=2, tensor_model_parallel_size=2)
    assert config.num_microbatches(4) == 2
    with pytest.raises(ConfigError, match="3 processes do not divide by --tensor-model-parallel-size 2"):
        config.num_microbatches(3)
    with pytest.raises(ConfigError, match="--global-batch-size 8 is no multiple of --micro-batch-size 2 times 3"):
        config.num_microbatches(6)
