"""How far a run has come, as a checkpoint keeps it: plain JSON beside the engine's own files."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_origin

from trainer.config import TrainConfig, flag
from trainer.errors import ConfigError, TrainerError

FILE = "trainer_state.json"

SCHEDULE = (
    *("lr", "min_lr", "lr_decay_style", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_eps", "clip_grad"),
)
"""Options that make the optimizer's steps, beside the two lengths of the schedule in samples."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Everything that a resumed run needs beside weights and optimizer."""

    iteration: int
    """Optimizer steps done."""
    consumed_samples: int
    """Samples that those steps have read: where the data goes on."""
    kind: str
    """"pretrain" or "finetune"."""
    dtype: str
    """What weights and activations are kept in."""
    schedule: dict[str, Any]
    """See `schedule_of`."""
    engine: dict[str, Any]
    """See `Engine.state`."""
    order: dict[str, Any]
    """What fixes the order of the samples: see `trainer.data`."""

    def write(self, folder: Path) -> None:
        """Writes it into a checkpoint's folder."""
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        """What `write` wrote.

        Raises:
            TrainerError: It is not there, or damaged.
        """
        try:
            progress = cls(**json.loads((folder / FILE).read_text("utf-8")))
            progress.check_types()
            return progress
        except FileNotFoundError:
            raise TrainerError(
                f"{folder} holds weights, but no {FILE}: no run resumes from it; --load-weights starts a new one"
            ) from None
        except (ValueError, TypeError) as error:
            raise TrainerError(f"{folder / FILE} is damaged: {error}") from None

    def check_types(self) -> None:
        """Whether every field is of its type.

        Raises:
            ValueError: One is not; the message names it.
        """
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), get_origin(field.type) or field.type
            if type(value) is not kind or (kind is int and value < 0):
                raise ValueError(f"{field.name} is {value!r}")


def schedule_of(config: TrainConfig) -> dict[str, Any]:
    """The optimizer's rules and its schedule, as numbers that do not depend on the size of a step."""
    return {name: getattr(config, name) for name in SCHEDULE} | {
        "warmup_samples": config.warmup_samples,
        "decay_samples": config.decay_iters * config.global_batch_size,
    }


def check_same_run(config: TrainConfig, kind: str, progress: Progress, folder: Path) -> None:
    """Refuses to resume what would silently be another run.

    Raises:
        ConfigError: The verb, the precision, or (unless `override_opt_param_scheduler`) an optimizer's rule differs.
    """
    if kind != progress.kind:
        raise ConfigError(f"{folder} is of `trainer {progress.kind}`: resume it with that, not with `trainer {kind}`")
    if config.dtype != progress.dtype:
        raise ConfigError(
            f"{folder} trains in {progress.dtype}, the options say {config.dtype}: to change it, start anew with "
            f"--load-weights {folder}"
        )
    if config.train_iters <= progress.iteration:
        raise ConfigError(
            f"{folder} has done {progress.iteration} steps, --train-iters {config.train_iters} asks for no more"
        )
    now = schedule_of(config)
    changed = [name for name in now if now[name] != progress.schedule.get(name)]
    if changed and not config.override_opt_param_scheduler:
        said = ", ".join(
            f"{_option(name)} is {progress.schedule.get(name)} there, {now[name]} here" for name in changed
        )
        raise ConfigError(
            f"{folder} was trained otherwise: {said}; give the same, or --override-opt-param-scheduler to change it"
        )


def _option(name: str) -> str:
    """The flag behind an entry of `schedule_of`."""
    lengths = {"warmup_samples": "--lr-warmup-iters in samples", "decay_samples": "--lr-decay-iters in samples"}
    return lengths.get(name, flag(name))
