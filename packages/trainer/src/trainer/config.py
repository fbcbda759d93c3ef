"""Every option of a training run, once: flags, YAML keys and the Python API are made from `TrainConfig`.

What a file says of them is read and written by `trainer.config_file`.
"""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from ckpt_tools import Layout, LlamaConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The options of one run, in Megatron's words. Sizes are in samples or tokens, as each name says.

    Raises:
        ConfigError: Two options contradict each other; the message names both values.
    """

    # --- what is read and written
    data_path: tuple[float | Path, ...]
    """PREFIX of the data set: `P_text_document` for pretraining, `P` of the `P_packed_…` files for fine-tuning. Several
    with a weight before each (0.3 A 0.7 B) are blended: pretraining only."""
    load_weights: Path | None = None
    """MODEL to start from, at step 0: any folder that `ckpt-tools inspect` recognises, a run's own among them."""
    model_config: Path | None = None
    """Start from fresh weights instead: a folder with a model's config.json (and its tokenizer), or the file."""
    resume: Path | None = None
    """RUN, or one of its `iter_…` folders, to go on from: weights, optimizer, schedule, place in the data. With the
    same `output_dir` it goes on in place. Its config.yaml is what options default to."""
    output_dir: Path
    """The run's folder: config.yaml, metrics.jsonl, checkpoints/."""
    overwrite: bool = False
    """Replace the run in `output_dir`, and what `export_hf` names. The run waits in `output_dir`.replaced until the new
    one has its first checkpoint."""
    export_hf: Path | None = None
    """At the end, write the result there as a Hugging Face folder too."""

    # --- processes
    mode: Literal["ptd", "zero"] = "ptd"
    """ptd: tensor, sequence, pipeline and data parallel on megatron-core. zero: data and tensor parallel on DeepSpeed,
    whose ZeRO shares out what the data-parallel processes would all hold (needs the extra [deepspeed])."""
    zero_stage: int = 2
    """zero: what is shared out: 1 the optimizer's state, 2 gradients too, 3 weights too."""
    deepspeed_config: Path | None = None
    """zero: a JSON file with more of DeepSpeed's own options; one that contradicts an option here is an error."""
    nproc_per_node: int = 1
    """Processes to start on this machine; leave it out under torchrun, which starts them itself."""
    tensor_model_parallel_size: int = 1
    """How many processes share each layer."""
    sequence_parallel: bool = False
    """Splits what tensor parallelism leaves whole (norms, residual stream) along the sequence."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are split into. What is left of the processes is data parallel."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of a chunk of a virtual pipeline: each stage holds several chunks (interleaved schedule)."""
    num_layer_list: tuple[int, ...] | None = None
    """Layers of each pipeline stage, where they are not to have equally many."""
    use_distributed_optimizer: bool = False
    """Splits the optimizer's state over the data-parallel processes (megatron-core's distributed optimizer)."""
    overlap_grad_reduce: bool = False
    """Reduces gradients over the data-parallel processes while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gathers the distributed optimizer's new weights while the next forward pass already runs."""
    make_vocab_size_divisible_by: int = 1
    """The vocabulary is padded to a multiple of this times the tensor-parallel size; pad rows never enter the loss."""
    distributed_timeout_minutes: float = 10.0
    """How long a process waits for the others before it gives up: what a lost machine or a slow disk may cost."""
    require_fused: bool = False
    """Stops where an operation would not run as a fused kernel on an accelerator, instead of falling back."""

    # --- memory
    recompute_granularity: Literal["full", "selective"] | None = None
    """Computes activations again in the backward pass instead of keeping them: of whole layers, or of some modules."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Of full: every layer, in groups of `recompute_num_layers` that keep their input; or only the first so many
    layers of each stage."""
    recompute_num_layers: int = 1
    """See `recompute_method`."""
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = ("core_attn",)
    """Of selective: what is computed again in every layer."""

    # --- steps and samples
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
    reset_attention_mask: bool = False
    """Tokens attend to their own document only; documents begin where the data set's index says. Pretraining only."""
    reset_position_ids: bool = False
    """Positions count from the beginning of each document. Pretraining only."""
    eod_token_id: int | None = None
    """The id that ends a document; taken from the model's config.json unless given."""
    seed: int = 1234
    """Of the order of the data, of fresh weights, and of anything random."""

    # --- optimizer
    lr: float
    """Peak learning rate."""
    min_lr: float = 0.0
    """Where the schedule ends."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """From the peak to `min_lr`, counted in samples."""
    lr_warmup_iters: int = 0
    """Steps from 0 to the peak, linearly."""
    lr_warmup_fraction: float | None = None
    """The same as a share of `lr_decay_iters`."""
    lr_decay_iters: int | None = None
    """Steps until `min_lr` is reached; `train_iters` unless given."""
    override_opt_param_scheduler: bool = False
    """On `resume`: take the learning rates, weight decay and schedule given here, not the checkpoint's."""
    weight_decay: float = 0.01
    """Decoupled (AdamW); never on one-dimensional parameters."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest L2 norm of the whole gradient; 0 switches clipping off."""
    init_method_std: float | None = None
    """Standard deviation of fresh weights; config.json's initializer_range unless given."""

    # --- precision
    bf16: bool = False
    """Weights and activations in bfloat16, gradients and optimizer in fp32. Everything is fp32 unless asked."""
    fp16: bool = False
    """Weights and activations in float16, with a dynamic loss scale."""
    initial_loss_scale: float = 2.0**16
    """fp16: where the loss scale starts."""
    loss_scale_window: int = 1000
    """fp16: steps without an overflow after which the loss scale doubles."""
    hysteresis: int = 2
    """fp16: overflows after which the loss scale halves; they are counted anew when it grows."""
    min_loss_scale: float = 1.0
    """fp16: below it the scale does not fall."""

    # --- reports and checkpoints
    log_interval: int = 10
    """Steps between two lines on the console; metrics.jsonl has every step."""
    tensorboard_dir: Path | None = None
    """Write the metrics there for TensorBoard, too (needs the extra [tensorboard])."""
    eval_interval: int = 0
    """Steps between two validations; 0 validates at the end only. Pretraining only."""
    eval_iters: int = 10
    """Global batches of a validation; 0 switches it off."""
    save_interval: int = 0
    """Steps between two checkpoints; 0 saves at the end only."""
    keep_last: int = 0
    """Checkpoints to keep, the latest ones; 0 keeps all."""
    save_optimizer: bool = True
    """Without it a checkpoint holds weights alone, and no run resumes from it."""
    async_save: bool = False
    """Write checkpoints in a process of their own while training goes on."""

    def __post_init__(self) -> None:
        _check_positive(self)
        _check_fractions(self)
        _check_start(self)
        _check_blend(self.data_path)
        _check_split(self.split)
        _check_parallelism(self)
        _check_mode(self)
        if self.bf16 and self.fp16:
            raise ConfigError("--bf16 and --fp16 exclude each other: choose one")
        _check_schedule(self)

    @property
    def dtype(self) -> str:
        """What weights and activations are kept in."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    # --- the schedule

    @property
    def decay_iters(self) -> int:
        """Steps of the schedule, warm-up included."""
        return self.train_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def warmup_samples(self) -> int:
        """Samples of the warm-up; a fraction of a step counts."""
        samples = self.decay_iters * self.global_batch_size
        if self.lr_warmup_fraction is not None:
            return int(self.lr_warmup_fraction * samples)
        return self.lr_warmup_iters * self.global_batch_size

    # --- the data

    @property
    def blend(self) -> list[tuple[float, Path]]:
        """The weight and the prefix of each data set of `data_path`; the weights add up to 1."""
        prefixes = [part for part in self.data_path if isinstance(part, Path)]
        weights = [part for part in self.data_path if not isinstance(part, Path)] or [1.0]
        return [(weight / sum(weights), prefix) for weight, prefix in zip(weights, prefixes, strict=True)]

    @property
    def reads(self) -> list[Path]:
        """Everything that the run reads and must not replace."""
        model = self.resume or self.load_weights or self.model_config
        return [prefix for _, prefix in self.blend] + ([model] if model else [])

    # --- the processes

    @property
    def layout(self) -> "Layout":
        """How the model is split over processes, in ckpt-tools' words."""
        from ckpt_tools import Layout

        return Layout(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            num_layers_per_virtual_pipeline_stage=self.num_layers_per_virtual_pipeline_stage,
            num_layer_list=self.num_layer_list,
            make_vocab_size_divisible_by=self.make_vocab_size_divisible_by,
        )

    def data_parallel_size(self, world_size: int) -> int:
        """How many copies of the model `world_size` processes hold.

        Raises:
            ConfigError: The processes, the layout and the batch sizes do not divide.
        """
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        if world_size % (tp * pp):
            by_stages = f" times --pipeline-model-parallel-size {pp}" if pp > 1 else ""
            raise ConfigError(f"{world_size} processes do not divide by --tensor-model-parallel-size {tp}{by_stages}")
        size = world_size // (tp * pp)
        if self.global_batch_size % (self.micro_batch_size * size):
            raise ConfigError(
                f"--global-batch-size {self.global_batch_size} is no multiple of --micro-batch-size "
                f"{self.micro_batch_size} times {size} data-parallel processes"
            )
        return size

    def num_microbatches(self, world_size: int) -> int:
        """Micro-batches that each process accumulates into one optimizer step.

        Raises:
            ConfigError: As for `data_parallel_size`; or an interleaved schedule cannot deal them out.
        """
        count = self.global_batch_size // (self.micro_batch_size * self.data_parallel_size(world_size))
        if self.num_layers_per_virtual_pipeline_stage and count % self.pipeline_model_parallel_size:
            raise ConfigError(
                f"a step has {count} micro-batches, no multiple of --pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size}, as a virtual pipeline needs: change --global-batch-size"
            )
        return count

    def check_model(self, model: "LlamaConfig") -> None:
        """Compares the options with the architecture of the weights.

        Raises:
            ConfigError: The samples are too long for it, or its heads or layers do not divide.
        """
        from ckpt_tools import UsageError

        if self.seq_length > model.max_position_embeddings:
            raise ConfigError(
                f"--seq-length {self.seq_length} is longer than the model's {model.max_position_embeddings} positions "
                f"(max_position_embeddings of {self.resume or self.load_weights or self.model_config})"
            )
        if self.eod_token_id is not None and not 0 <= self.eod_token_id < model.vocab_size:
            raise ConfigError(
                f"--eod-token-id {self.eod_token_id} is none of the vocabulary's {model.vocab_size} entries"
            )
        tp = self.tensor_model_parallel_size
        if model.num_query_groups % tp:
            raise ConfigError(
                f"--tensor-model-parallel-size {tp} does not divide the model's {model.num_query_groups} key/value "
                "heads"
            )
        if model.ffn_hidden_size % tp:
            raise ConfigError(
                f"--tensor-model-parallel-size {tp} does not divide the model's {model.ffn_hidden_size} "
                "feed-forward channels"
            )
        try:
            self.layout.chunks(model.num_layers)
        except UsageError as error:
            raise ConfigError(str(error)) from None


_AT_LEAST_ONE = (
    *("nproc_per_node", "tensor_model_parallel_size", "pipeline_model_parallel_size", "make_vocab_size_divisible_by"),
    *("recompute_num_layers", "train_iters", "seq_length", "micro_batch_size", "global_batch_size"),
    *("loss_scale_window", "hysteresis", "log_interval"),
)
_NOT_NEGATIVE = (
    *("min_lr", "lr_warmup_iters", "weight_decay", "adam_eps", "clip_grad", "init_method_std"),
    *("eval_interval", "eval_iters", "save_interval", "keep_last"),
)
_SEEDS = 2**32
"""NumPy's generators take seeds below it."""
_POSITIVE = ("lr", "initial_loss_scale", "min_loss_scale", "distributed_timeout_minutes")


def flag(name: str) -> str:
    """The spelling of a field on the command line."""
    return "--" + name.replace("_", "-")


def _check_positive(config: TrainConfig) -> None:
    for name in _AT_LEAST_ONE:
        if (value := getattr(config, name)) < 1:
            raise ConfigError(f"{flag(name)} {value} must be at least 1")
    for name in _NOT_NEGATIVE:
        if (value := getattr(config, name)) is not None and not value >= 0:
            raise ConfigError(f"{flag(name)} {value} must not be negative")
    for name in _POSITIVE:
        if not (value := getattr(config, name)) > 0:
            raise ConfigError(f"{flag(name)} {value} must be above 0")
    for name in (*_NOT_NEGATIVE, *_POSITIVE):
        if (value := getattr(config, name)) == math.inf:
            raise ConfigError(f"{flag(name)} {value} must be finite")
    if not 0 <= config.seed < _SEEDS:
        raise ConfigError(f"--seed {config.seed} must lie in [0, {_SEEDS})")


def _check_fractions(config: TrainConfig) -> None:
    for name in ("adam_beta1", "adam_beta2", "lr_warmup_fraction"):
        if (value := getattr(config, name)) is not None and not 0 <= value < 1:
            raise ConfigError(f"{flag(name)} {value} must lie in [0, 1)")


def _check_start(config: TrainConfig) -> None:
    if config.resume is not None:
        return  # how that run began stands in its config.yaml
    if config.load_weights is None and config.model_config is None:
        raise ConfigError(
            "nothing to start from: give --load-weights MODEL, --resume RUN, or --model-config DIR for fresh weights"
        )
    if config.load_weights is not None and config.model_config is not None:
        raise ConfigError(
            f"--load-weights {config.load_weights} and --model-config {config.model_config} exclude each other: "
            "weights that are loaded have a config.json of their own"
        )


def _check_blend(data_path: tuple[float | Path, ...]) -> None:
    said = " ".join(map(str, data_path))
    kinds = [isinstance(part, Path) for part in data_path]
    if kinds != [True] and (not kinds or kinds != [False, True] * (len(kinds) // 2)):
        raise ConfigError(f"--data-path {said}: give one prefix, or a weight before each of several (0.3 A 0.7 B)")
    if not all(part > 0 for part in data_path if not isinstance(part, Path)):
        raise ConfigError(f"--data-path {said}: the weights must all be above 0")


def _check_split(split: str) -> None:
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= share < math.inf for share in shares) or not shares[0] > 0:
        raise ConfigError(f"--split {split!r} must be three shares like 949,50,1, the first above 0")


def _check_parallelism(config: TrainConfig) -> None:
    from ckpt_tools import UsageError

    tp = config.tensor_model_parallel_size
    if config.sequence_parallel and tp == 1:
        raise ConfigError("--sequence-parallel needs a --tensor-model-parallel-size of 2 or more")
    if config.sequence_parallel and config.seq_length % tp:
        raise ConfigError(
            f"--sequence-parallel: --seq-length {config.seq_length} does not divide by "
            f"--tensor-model-parallel-size {tp}"
        )
    if config.overlap_param_gather and not (config.use_distributed_optimizer and config.overlap_grad_reduce):
        raise ConfigError("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")
    try:
        config.layout  # noqa: B018  (checks its numbers against each other)
    except UsageError as error:
        raise ConfigError(str(error)) from None


PTD_ONLY = (
    *("sequence_parallel", "num_layers_per_virtual_pipeline_stage", "num_layer_list", "use_distributed_optimizer"),
    *("overlap_grad_reduce", "overlap_param_gather", "async_save", "pipeline_model_parallel_size"),
)
ZERO_ONLY = ("zero_stage", "deepspeed_config")
PRETRAINING_ONLY = ("split", "reset_attention_mask", "reset_position_ids", "eval_interval")


def changed(config: TrainConfig, names: tuple[str, ...]) -> list[str]:
    """Those of the options `names` that have another value than their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return [name for name in names if getattr(config, name) != defaults[name]]


def _check_mode(config: TrainConfig) -> None:
    if config.mode == "ptd":
        for name in changed(config, ZERO_ONLY):
            raise ConfigError(f"{flag(name)} {getattr(config, name)} is for --mode zero, the mode is ptd")
        return
    for name in changed(config, PTD_ONLY):
        raise ConfigError(f"{flag(name)} {_said(getattr(config, name))}is for --mode ptd, the mode is zero")
    if config.zero_stage not in (1, 2, 3):
        hint = (
            "stage 0 shares nothing out: take --mode ptd, or stage 1" if config.zero_stage == 0 else "choose 1, 2 or 3"
        )
        raise ConfigError(f"--zero-stage {config.zero_stage}: {hint}")
    if config.zero_stage == 3 and not config.save_optimizer:
        raise ConfigError("--no-save-optimizer: ZeRO stage 3 keeps the weights with the optimizer; use --zero-stage 2")
    if config.fp16 and not math.log2(config.initial_loss_scale).is_integer():
        raise ConfigError(
            f"--initial-loss-scale {config.initial_loss_scale}: DeepSpeed (--mode zero) starts at a power of 2"
        )


def _said(value: object) -> str:
    """A value behind its flag; a switch has none."""
    return "" if value is True else f"{value} "


def _check_schedule(config: TrainConfig) -> None:
    if config.min_lr > config.lr:
        raise ConfigError(f"--min-lr {config.min_lr} is above --lr {config.lr}")
    if config.lr_warmup_iters and config.lr_warmup_fraction is not None:
        raise ConfigError(
            f"--lr-warmup-iters {config.lr_warmup_iters} and --lr-warmup-fraction {config.lr_warmup_fraction} "
            "exclude each other"
        )
    if config.lr_warmup_iters >= config.decay_iters:
        raise ConfigError(
            f"--lr-warmup-iters {config.lr_warmup_iters} leaves nothing of the schedule's {config.decay_iters} steps"
        )
