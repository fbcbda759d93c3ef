"""DeepSpeed's own configuration from a run's options, with what a user's JSON adds to it. No torch, no DeepSpeed."""

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
    "zero_optimization.offload_optimizer": "offloading is not supported",
    "zero_optimization.offload_param": "offloading is not supported",
}
"""Keys of a user's JSON that have no place in it, and why."""

DEFAULTS: dict[str, Any] = {
    "steps_per_print": None,
    "wall_clock_breakdown": False,
    "zero_optimization.contiguous_gradients": True,
    "zero_optimization.overlap_comm": False,
}
"""What a user's JSON may change."""


def check_installed() -> None:
    """Looks for DeepSpeed, and imports nothing.

    Raises:
        ConfigError: It is not there.
    """
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "--mode zero needs deepspeed, which is not installed: pip install './packages/trainer[deepspeed]' and its "
            "siblings"
        )


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
        reason = next((why for name, why in REFUSED.items() if key == name or key.startswith(f"{name}.")), None)
        if reason is not None:
            raise ConfigError(f"{file} has the key {key}: leave it out, {reason}")
        if key in ours and value != "auto" and value != ours[key][0]:
            raise ConfigError(f"{key} is {value!r} in {file}, {ours[key][0]!r} by {ours[key][1]}: give one of them")
    return _nested(DEFAULTS | theirs | merged)


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
    }
    if config.bf16 or config.fp16:
        precision = "--bf16" if config.bf16 else "--fp16"
        # As in ptd mode: gradients of micro-batches are added, and reduced over the ranks, in fp32.
        options["data_types.grad_accum_dtype"] = ("fp32", precision)
        options["communication_data_type"] = ("fp32", precision)
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
        raise ConfigError(f"{error.strerror}: {file} (--deepspeed-config)") from None
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
