"""Fresh weights that depend on the seed and on nothing else: not on ranks, stages, chunks or padding."""

import hashlib
import math
from collections.abc import Iterable

import torch
from ckpt_tools import LlamaConfig, ShardRule, sharding
from torch import Tensor, nn

from llama_model.model import LlamaModel

BLOCK = 2**20
"""Numbers that are drawn at a time: a rank draws the blocks of rows that it holds something of."""

SCALED = ("linear_proj.weight", "linear_fc2.weight")
"""What writes into the residual stream: drawn narrower, so that the stream does not widen with the layers."""


@torch.no_grad()
def init_weights(model: LlamaModel, seed: int, parameters: Iterable[tuple[str, nn.Parameter]] | None = None) -> None:
    """Fills every parameter as a LLaMA-2 is initialised: norms with ones, matrices with normal numbers.

    Their standard deviation is `init_method_std`; that of attention's and the feed-forward network's last matrices is
    divided by sqrt(2 L). A tensor is drawn in fp32 on the CPU, in the order of its canonical form, from the seed and
    its canonical name; each rank takes its part. Padding rows of the vocabulary are zero.

    Args:
        model: Of any layout, or of one device.
        seed: The same on every rank.
        parameters: Those to fill, as for `load_weights`; all unless given.

    Source: Megatron-LM's `init_method_normal` and `scaled_init_method_normal`; Radford et al., "Language Models are
        Unsupervised Multitask Learners", section 2.3, for the scale.
    """
    rules = sharding(model.architecture)
    for local, parameter in model.named_parameters() if parameters is None else parameters:
        name = model.canonical_name(local)
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            _fill(parameter, rules[name], model, f"{seed} {name}", _std(model.architecture, name))


def _std(config: LlamaConfig, name: str) -> float:
    return config.init_method_std / (math.sqrt(2 * config.num_layers) if name.endswith(SCALED) else 1.0)


def _fill(parameter: Tensor, rule: ShardRule, model: LlamaModel, key: str, std: float) -> None:
    """This rank's rows and columns of the whole tensor that `key` determines; zeros behind them."""
    view = rule.view(model.tensor_model_parallel_rank, model.tensor_model_parallel_size, model.padded_vocab_size)
    width = rule.shape[1]
    height = max(1, BLOCK // width)  # rows of a block
    assert view.columns is not None
    columns = slice(*view.columns)
    filled = 0
    for start, stop in view.rows:
        for block in range(start // height, -(-stop // height)):
            first, last = max(start, block * height), min(stop, (block + 1) * height)
            drawn = _block(f"{key} {block}", height, width, std)[first - block * height : last - block * height]
            parameter[filled : filled + last - first] = drawn[:, columns]
            filled += last - first
    parameter[filled:] = 0.0


def _block(key: str, height: int, width: int, std: float) -> Tensor:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(height, width, device="cpu").normal_(0.0, std, generator=generator)
