"""Every option of a training run, once: flags, YAML keys and the Python API are made from `TrainConfig`.

Precedence: a flag, then the YAML file of `--config`, then the default. The resolved configuration is written into the
run's folder and is itself a valid `--config`.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import tyro

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from ckpt_tools import LlamaConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The options of one run, in Megatron's words. Sizes are in samples or tokens, as each name says.

    Raises:
        ConfigError: Two options contradict each other; the message names both values.
    """

    data_path: Path
    """PREFIX of the data set: `P_text_document` for pretraining, `P` of the `P_packed_…` files for fine-tuning."""
    load_weights: Path
    """MODEL to start from: any folder that `ckpt-tools inspect` recognises, a run's own among them."""
    output_dir: Path
    """The run's folder: config.yaml, metrics.jsonl, checkpoints/."""

    mode: Literal["ptd"] = "ptd"
    """ptd: tensor and data parallel on megatron-core."""
    nproc_per_node: int = 1
    """Processes to start on this machine; leave it out under torchrun, which starts them itself."""
    tensor_model_parallel_size: int = 1
    """How many processes share each layer. The rest of the processes are data parallel."""
    use_distributed_optimizer: bool = False
    """Splits the optimizer's state over the data-parallel processes (megatron-core's distributed optimizer)."""
    make_vocab_size_divisible_by: int = 1
    """The vocabulary is padded to a multiple of this times the tensor-parallel size; pad rows never enter the loss."""

    require_fused: bool = False
    """Stops where an operation would not run as a fused kernel on an accelerator, instead of falling back."""

    train_iters: int
    """Optimizer steps."""
    seq_length: int
    """Tokens of a sample. Fine-tuning pads shorter rows to it and cuts longer ones."""
    micro_batch_size: int = 1
    """Samples that a process computes at a time."""
    global_batch_size: int
    """Samples of an optimizer step, over all processes; the rest of a division is gradient accumulation."""
    split: str = "949,50,1"
    """Shares of the documents, in their order, for training, validation and test. Pretraining only."""
    eod_token_id: int | None = None
    """The id that ends a document; taken from the model's config.json unless given."""
    seed: int = 1234
    """Of the order of the data, and of anything random."""

    lr: float
    """Peak learning rate."""
    min_lr: float = 0.0
    """Where the schedule ends."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """From the peak to `min_lr`, counted in samples."""
    lr_warmup_iters: int = 0
    """Steps from 0 to the peak, linearly."""
    lr_decay_iters: int | None = None
    """Steps until `min_lr` is reached; `train_iters` unless given."""
    weight_decay: float = 0.01
    """Decoupled (AdamW); never on one-dimensional parameters."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest L2 norm of the whole gradient; 0 switches clipping off."""

    bf16: bool = False
    """Weights and activations in bfloat16, gradients and optimizer in fp32. Everything is fp32 unless asked."""
    fp16: bool = False
    """Weights and activations in float16, with a dynamic loss scale."""

    log_interval: int = 10
    """Steps between two lines on the console; metrics.jsonl has every step."""
    eval_interval: int = 0
    """Steps between two validations; 0 validates at the end only. Pretraining only."""
    eval_iters: int = 10
    """Global batches of a validation; 0 switches it off."""
    save_interval: int = 0
    """Steps between two checkpoints; 0 saves at the end only."""
    overwrite: bool = False
    """Replace the run in `output_dir`: it waits in `output_dir`.replaced until the new one has its first checkpoint."""

    def __post_init__(self) -> None:
        _check_positive(self)
        _check_fractions(self)
        if self.bf16 and self.fp16:
            raise ConfigError("--bf16 and --fp16 exclude each other: choose one")
        if self.min_lr > self.lr:
            raise ConfigError(f"--min-lr {self.min_lr} is above --lr {self.lr}")
        if self.lr_warmup_iters >= self.decay_iters:
            raise ConfigError(
                f"--lr-warmup-iters {self.lr_warmup_iters} leaves nothing of the schedule's {self.decay_iters} steps"
            )
        _check_split(self.split)

    @property
    def decay_iters(self) -> int:
        """Steps of the schedule, warm-up included."""
        return self.train_iters if self.lr_decay_iters is None else self.lr_decay_iters

    def data_parallel_size(self, world_size: int) -> int:
        """How many copies of the model `world_size` processes hold.

        Raises:
            ConfigError: The processes, the layout and the batch sizes do not divide.
        """
        if world_size % self.tensor_model_parallel_size:
            raise ConfigError(
                f"{world_size} processes do not divide by --tensor-model-parallel-size "
                f"{self.tensor_model_parallel_size}"
            )
        size = world_size // self.tensor_model_parallel_size
        if self.global_batch_size % (self.micro_batch_size * size):
            raise ConfigError(
                f"--global-batch-size {self.global_batch_size} is no multiple of --micro-batch-size "
                f"{self.micro_batch_size} times {size} data-parallel processes"
            )
        return size

    def num_microbatches(self, world_size: int) -> int:
        """Micro-batches that each process accumulates into one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size(world_size))

    def check_model(self, model: "LlamaConfig") -> None:
        """Compares the options with the architecture of the weights.

        Raises:
            ConfigError: The samples are too long for it, or its heads do not divide.
        """
        if self.seq_length > model.max_position_embeddings:
            raise ConfigError(
                f"--seq-length {self.seq_length} is longer than the model's {model.max_position_embeddings} positions "
                f"(max_position_embeddings of {self.load_weights})"
            )
        if model.num_query_groups % self.tensor_model_parallel_size:
            raise ConfigError(
                f"--tensor-model-parallel-size {self.tensor_model_parallel_size} does not divide the model's "
                f"{model.num_query_groups} key/value heads"
            )


_AT_LEAST_ONE = (
    "nproc_per_node",
    "tensor_model_parallel_size",
    "make_vocab_size_divisible_by",
    "train_iters",
    "seq_length",
    "micro_batch_size",
    "global_batch_size",
    "log_interval",
)
_NOT_NEGATIVE = (
    "min_lr",
    "lr_warmup_iters",
    "weight_decay",
    "adam_eps",
    "clip_grad",
    "eval_interval",
    "eval_iters",
    "save_interval",
)


def flag(name: str) -> str:
    """The spelling of a field on the command line."""
    return "--" + name.replace("_", "-")


def _check_positive(config: TrainConfig) -> None:
    for name in _AT_LEAST_ONE:
        if (value := getattr(config, name)) < 1:
            raise ConfigError(f"{flag(name)} {value} must be at least 1")
    for name in _NOT_NEGATIVE:
        if (value := getattr(config, name)) < 0:
            raise ConfigError(f"{flag(name)} {value} must not be negative")
    if not config.lr > 0:
        raise ConfigError(f"--lr {config.lr} must be above 0")


def _check_fractions(config: TrainConfig) -> None:
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= (value := getattr(config, name)) < 1:
            raise ConfigError(f"{flag(name)} {value} must lie in [0, 1)")


def _check_split(split: str) -> None:
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or not shares[0] > 0:
        raise ConfigError(f"--split {split!r} must be three shares like 949,50,1, the first above 0")


# --- YAML ---------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> dict[str, Any]:
    """The options that a YAML file gives, each of its field's type. A file may give some and leave others to flags.

    Raises:
        ConfigError: No such file, no mapping, an unknown key (with the nearest known one), or a value of another type.
    """
    import cattrs
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{error.strerror}: {path} (--config)") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of option names to values, not a {type(content).__name__}")
    types = get_type_hints(TrainConfig)
    converter = cattrs.Converter()
    converter.register_structure_hook(bool, _strict_bool)
    converter.register_structure_hook(int, _strict_int)
    options = {}
    for key, value in content.items():
        name = _known(str(key), path)
        try:
            options[name] = converter.structure(value, types[name])
        except Exception as error:
            raise ConfigError(f"{path}: {key}: {value!r} does not fit: {_reason(error)}") from None
    return options


def _strict_bool(value: Any, _: Any) -> bool:
    if not isinstance(value, bool):  # bool("no") would be True
        raise ValueError("expected true or false")
    return value


def _strict_int(value: Any, _: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):  # int(1.5) would be 1
        raise ValueError("expected a whole number")
    return int(value)


def _reason(error: Exception) -> str:
    nested = getattr(error, "exceptions", None)
    return _reason(nested[0]) if nested else str(error)


def _known(key: str, path: Path) -> str:
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    name = key.replace("-", "_")
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, 1)
    raise ConfigError(f"{path}: unknown option {key!r}" + (f"; perhaps you meant {near[0]!r}" if near else ""))


def write_yaml(config: TrainConfig, path: Path) -> None:
    """Writes `config` so that `read_yaml` gives it back, paths made absolute."""
    import yaml

    plain = {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(config).items()
        if value is not None
    }
    path.write_text(yaml.safe_dump(plain, sort_keys=False), "utf-8")


def partial_default(options: Mapping[str, Any]) -> TrainConfig:
    """A default for the command line in which `options` hold and every field without a value is still to be given.

    It is no valid configuration: `__post_init__` runs on the one that the parser makes from it.
    """
    default = object.__new__(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        fallback = tyro.MISSING if field.default is dataclasses.MISSING else field.default
        object.__setattr__(default, field.name, options.get(field.name, fallback))
    return default


Options = Annotated[TrainConfig, tyro.conf.arg(name="")]
"""`TrainConfig` as a parameter of a command: its fields become flags without a prefix."""
