"""DeepSpeed's own configuration from a run's options, with what a user's JSON adds to it. No torch, no DeepSpeed."""

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.errors import ConfigError

REFUSED = {
    "optimizer": "AdamW with --lr, --weight-decay, --adam-beta1, --adam-beta2 and --adam-eps is the optimizer",
    "scheduler": "--lr, --min-lr, --lr-decay-style and --lr-warmup-iters make the schedule",
    "amp": "--bf16 and --fp16 choose the precision",
    "torch_autocast": "--bf16 and --fp16 choose the precision",
    "zero_optimization.offload": "offloading is not supported",
    "zero_optimization.cpu_offload": "offloading is not supported",
    "zero_optimization.round_robin_gradients": "checkpoints would not say whose the optimizer's state is",
}
"""Beginnings of a user's keys that have no place in a JSON, and why."""

REPORTS = ("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state")
"""What DeepSpeed can print."""

_SWITCHES = (
    *("reduce_scatter", "allgather_partitions", "overlap_comm", "contiguous_gradients", "ignore_unused_parameters"),
    *("log_trace_cache_warnings", "stage3_gather_16bit_weights_on_model_save"),
)
_SIZES = (
    *("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size"),
    *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters"),
    "stage3_max_reuse_distance",
)
_FP16 = ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")
ALLOWED = {
    *(f"zero_optimization.{name}" for name in (*_SWITCHES, *_SIZES)),
    *(f"fp16.{name}" for name in _FP16),
    *("zero_allow_untested_optimizer", *REPORTS),
}
"""What a user's JSON may have beside the keys that options of the run determine: what changes neither what is computed
nor what a checkpoint holds."""

_IN_FP32 = "this package: gradients are added and reduced in fp32, as in ptd mode"

DEFAULTS: dict[str, Any] = {
    "steps_per_print": None,
    "wall_clock_breakdown": False,
    "zero_optimization.contiguous_gradients": True,
    "zero_optimization.overlap_comm": False,
}
"""What a user's JSON may change."""


def check(config: TrainConfig, world_size: int, device_type: str | None = None) -> None:
    """Refuses before anything is written what DeepSpeed could not do; looks for it, and imports nothing.

    Args:
        config: Of a run in zero mode.
        world_size: Its processes.
        device_type: Where they compute, once that is known.

    Raises:
        ConfigError: DeepSpeed is not there or has not this precision on this device, or see `deepspeed_options`.
    """
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "--mode zero needs deepspeed, which is not installed: pip install './packages/trainer[deepspeed]' and its "
            "siblings"
        )
    if config.fp16 and device_type == "cpu":
        raise ConfigError("--fp16 with --mode zero: DeepSpeed has no float16 on a CPU; take --bf16, or --mode ptd")
    deepspeed_options(config, world_size)


def deepspeed_options(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Raises:
        ConfigError: A key of the user's JSON contradicts an option of the run (both are named), has no place in it, or
            the file is none; the processes do not divide.
    """
    ours = _ours(config, config.num_microbatches(world_size))
    merged: dict[str, Any] = {key: value for key, (value, _) in ours.items()}
    if config.deepspeed_config is None:
        return _nested(DEFAULTS | merged)
    file = config.deepspeed_config
    theirs = dict(_leaves(_read(file)))
    for key, value in theirs.items():
        _check_key(key, ours, file)
        _check_value(key, value, file)
        if key in ours and value != "auto" and value != ours[key][0]:
            raise ConfigError(f"{key} is {value!r} in {file}, {ours[key][0]!r} by {ours[key][1]}: give one of them")
    return _nested(DEFAULTS | theirs | merged)


def _check_key(key: str, ours: Mapping[str, Any], file: Path) -> None:
    """Refuses a user's key that has no place in the JSON: DeepSpeed would pass over one that it does not know."""
    for beginning, reason in REFUSED.items():
        if key.startswith(beginning):
            raise ConfigError(f"{file} has the key {key}: leave it out, {reason}")
    known = [*ours, *ALLOWED]
    if any(name.startswith(f"{key}.") for name in known):
        raise ConfigError(f"{key} in {file} must be an object of options")
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        raise ConfigError(
            f"{file} has the key {key}, which has no place here" + (f": perhaps you meant {near[0]}" if near else "")
        )


def _check_value(key: str, value: Any, file: Path) -> None:
    """Refuses what DeepSpeed would not take, before anything is started."""
    section, _, name = key.rpartition(".")
    if section != "zero_optimization":
        return
    if name in _SWITCHES and type(value) is not bool:
        raise ConfigError(f"{key} is {value!r} in {file}: give true or false")
    if name in _SIZES and not (type(value) in (int, float) and value >= 0 and float(value).is_integer()):
        raise ConfigError(f"{key} is {value!r} in {file}: give a whole number")


def _ours(config: TrainConfig, num_microbatches: int) -> dict[str, tuple[Any, str]]:
    """What the run's options determine: key to value, and the flag that says so."""
    options: dict[str, tuple[Any, str]] = {
        "train_batch_size": (config.global_batch_size, "--global-batch-size"),
        "train_micro_batch_size_per_gpu": (config.micro_batch_size, "--micro-batch-size"),
        "gradient_accumulation_steps": (num_microbatches, "--global-batch-size and --micro-batch-size"),
        "gradient_clipping": (config.clip_grad, "--clip-grad"),
        "zero_optimization.stage": (config.zero_stage, "--zero-stage"),
        "bf16.enabled": (config.bf16, "--bf16"),
        "fp16.enabled": (config.fp16, "--fp16"),
        "data_types.grad_accum_dtype": ("fp32", _IN_FP32),
        "communication_data_type": ("fp32", _IN_FP32),
    }
    if config.fp16:
        options |= {
            "fp16.loss_scale": (0, "--fp16 (a dynamic loss scale)"),
            "fp16.initial_scale_power": (int(math.log2(config.initial_loss_scale)), "--initial-loss-scale"),
            "fp16.loss_scale_window": (config.loss_scale_window, "--loss-scale-window"),
            "fp16.hysteresis": (config.hysteresis, "--hysteresis"),
            "fp16.min_loss_scale": (config.min_loss_scale, "--min-loss-scale"),
        }
    return options


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{error.strerror}: {file} (--deepspeed-config; --deepspeed-config None goes on without)"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object")
    return content


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no object, by its keys joined with dots."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in leaves.items():
        *parents, last = key.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tree
