"""What a writer is asked for: how a model is split over ranks, and how its parts are called."""

from dataclasses import dataclass
from typing import Literal

from ckpt_tools.errors import UsageError

NamingLabel = Literal["megatron-core", "ascendspeed", "ascendspeed-flat"]
COUNTS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "make_vocab_size_divisible_by",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a written model is split over ranks; a Hugging Face folder is not.

    Raises:
        UsageError: A number is not positive, or two options exclude each other.
    """

    tensor_model_parallel_size: int = 1
    """Tensor-parallel ranks, which share out each matrix."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages, which share out the layers."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of a chunk of a virtual (interleaved) pipeline, whose chunks are dealt to the stages in turn."""
    num_layer_list: tuple[int, ...] | None = None
    """Layers of each pipeline stage, where they are not to have equally many."""
    make_vocab_size_divisible_by: int | None = None
    """Pad the vocabulary to a multiple of this times the tensor-parallel size (megatron-core: 1, others: 128)."""
    added_token_num: int = 0
    """Leave room for so many more tokens when padding the vocabulary."""
    merge_mlp: bool = False
    """AscendSpeed's names: store gate and up projection as one tensor (as its --mlp-layer-fusion expects)."""
    naming: NamingLabel | None = None
    """Whose names the tensors of a DeepSpeed checkpoint have (default: ascendspeed)."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: it must be positive")
        if self.added_token_num < 0:
            raise UsageError(f"added_token_num is {self.added_token_num}: it must not be negative")
        if self.num_layer_list is not None and any(count < 1 for count in self.num_layer_list):
            raise UsageError(f"num_layer_list is {self.num_layer_list}: each pipeline stage needs a layer")
        if self.num_layers_per_virtual_pipeline_stage is not None:
            self._check_virtual_pipeline()

    def _check_virtual_pipeline(self) -> None:
        if self.pipeline_model_parallel_size == 1:
            raise UsageError("num_layers_per_virtual_pipeline_stage needs a pipeline_model_parallel_size of 2 or more")
        if self.num_layer_list is not None:
            raise UsageError("num_layers_per_virtual_pipeline_stage and num_layer_list exclude each other")

    def chunks(self, num_layers: int) -> list[list[range]]:
        """The layers of each pipeline stage's chunks: [stage][chunk]; one chunk where the pipeline is not virtual.

        The chunks of a virtual pipeline are dealt to the stages in turn, as Megatron's interleaved schedule does.

        Raises:
            UsageError: The layers do not divide.
        """
        stages = self.pipeline_model_parallel_size
        if self.num_layer_list is not None:
            return _listed_chunks(self.num_layer_list, num_layers, stages)
        if num_layers % stages:
            raise UsageError(f"{num_layers} layers do not divide among {stages} pipeline stages: give num_layer_list")
        share = num_layers // stages
        size = self.num_layers_per_virtual_pipeline_stage or share
        if share % size:
            raise UsageError(f"the {share} layers of a pipeline stage do not divide into chunks of {size}")
        starts = [[(chunk * stages + stage) * size for chunk in range(share // size)] for stage in range(stages)]
        return [[range(start, start + size) for start in of_stage] for of_stage in starts]


def _listed_chunks(counts: tuple[int, ...], num_layers: int, stages: int) -> list[list[range]]:
    if len(counts) != stages or sum(counts) != num_layers:
        raise UsageError(
            f"num_layer_list names {sum(counts)} layers on {len(counts)} stages: "
            f"the model has {num_layers}, to be put on {stages} (pipeline_model_parallel_size)"
        )
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [[range(end - count, end)] for count, end in zip(counts, ends, strict=True)]
