"""The optimizer's state of any checkpoint, whichever engine wrote it at whatever sizes: each rank reads its elements.

What both engines keep is, for each parameter of the whole model, an fp32 main weight and Adam's two moments; ckpt-tools
reads them by canonical name, as it reads weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from ckpt_tools import Checkpoint, CheckpointError, Part, open_checkpoint
from llama_model import LlamaModel

PARTS: tuple[Part, ...] = ("main_weights", "exp_avg", "exp_avg_sq")


def parts(main: torch.Tensor, moments: Mapping[str, torch.Tensor]) -> dict[Part, torch.Tensor]:
    """What is kept of a parameter, or of several, by what it is; without autograd and one-dimensional."""
    tensors = (main, moments["exp_avg"], moments["exp_avg_sq"])
    return dict(zip(PARTS, (tensor.data.view(-1) for tensor in tensors), strict=True))


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements of a parameter that this rank keeps the optimizer's state of."""

    name: str
    """The parameter's, in this rank's chunk of the model."""
    begin: int
    """The first element, in the row-major order of this rank's shard of the parameter."""
    tensors: Mapping[Part, torch.Tensor]
    """fp32, one-dimensional, all of one length: where the state of the elements from `begin` on is kept."""
    weights: torch.Tensor
    """The same elements of the parameter itself, which has been filled already."""


@torch.no_grad()
def load_fragments(folder: Path, model: LlamaModel, fragments: Iterable[Fragment]) -> None:
    """Fills the tensors of every fragment.

    Raises:
        CheckpointError: The checkpoint holds no optimizer state, a broken one, or another model's: its main weights,
            rounded, are the weights.
    """
    fragments = list(fragments)
    for part in PARTS:
        with open_checkpoint(folder, model.architecture, part=part) as checkpoint:
            for fragment in fragments:
                found, weights = _elements(checkpoint, model, fragment), fragment.weights
                if part == "main_weights" and not torch.equal(found.to(weights.dtype), weights.cpu()):
                    raise CheckpointError(
                        f"{folder}: the optimizer's weights of {fragment.name} are not those of the model"
                    )
                fragment.tensors[part].copy_(found)


def _elements(checkpoint: Checkpoint, model: LlamaModel, fragment: Fragment) -> torch.Tensor:
    """Those of a fragment: fp32, one-dimensional."""
    canonical, begin = model.canonical_name(fragment.name), fragment.begin
    end = begin + len(fragment.weights)
    width = (*checkpoint.shard_shape(canonical, model.tensor_model_parallel_size), 1)[1]
    rows = begin // width, -(-end // width)  # the whole rows around the elements
    block = checkpoint.read_shard(
        canonical,
        model.tensor_model_parallel_rank,
        model.tensor_model_parallel_size,
        padded_vocab_size=model.padded_vocab_size,
        rows=rows,
    )
    return torch.from_numpy(block).flatten()[begin - rows[0] * width : end - rows[0] * width]
