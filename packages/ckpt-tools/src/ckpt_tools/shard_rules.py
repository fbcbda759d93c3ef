"""The one place that knows how each parameter splits over tensor-parallel ranks and pipeline stages.

Converter, loader and trainer read the rule of a parameter here. Canonical names are megatron-core's global ones:
layers are numbered over the whole model, QKV rows stand in Megatron's group order (for each query group its query
heads, then its key head, then its value head), fc1 holds all gate rows, then all up rows, and the vocabulary carries
no padding.
"""

from dataclasses import dataclass

from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import UsageError

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
HEAD = "output_layer.weight"
INPUT_NORM = "input_layernorm.weight"
QKV = "self_attention.linear_qkv.weight"
PROJ = "self_attention.linear_proj.weight"
MLP_NORM = "pre_mlp_layernorm.weight"
FC1 = "mlp.linear_fc1.weight"
FC2 = "mlp.linear_fc2.weight"
LAYER_TENSORS = (INPUT_NORM, QKV, PROJ, MLP_NORM, FC1, FC2)
"""The parameters of one layer, in the order in which the layer uses them."""

Range = tuple[int, int]
"""First and one past the last."""


def layer_name(layer: int, tensor: str) -> str:
    """The canonical name of one of `LAYER_TENSORS`."""
    return f"decoder.layers.{layer}.{tensor}"


@dataclass(frozen=True, slots=True)
class View:
    """The part of a canonical tensor that a stored one holds."""

    rows: tuple[Range, ...]
    """Ranges of canonical rows, in the order in which they are stored."""
    columns: Range | None
    """The range of canonical columns; None for a vector."""
    padding: int = 0
    """Stored rows after those: copies of the canonical tensor's last row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored tensor's shape."""
        height = self.true_rows + self.padding
        return (height,) if self.columns is None else (height, self.columns[1] - self.columns[0])

    @property
    def true_rows(self) -> int:
        """Stored rows that are no padding."""
        return sum(stop - start for start, stop in self.rows)

    def between(self, first: int, last: int) -> "View":
        """The view of the stored rows `first` to `last` - 1 alone."""
        rows, at = [], 0
        for start, stop in self.rows:
            low, high = max(first - at, 0), min(last - at, stop - start)
            if low < high:
                rows.append((start + low, start + high))
            at += stop - start
        return View(tuple(rows), self.columns, padding=max(0, last - max(first, at)))


@dataclass(frozen=True, slots=True)
class ShardRule:
    """How one parameter splits."""

    shape: tuple[int, ...]
    """Global shape, vocabulary unpadded."""
    split_dim: int | None
    """The dimension that tensor-parallel ranks share out; None: each holds the whole."""
    parts: int = 1
    """Fused parts along `split_dim` that are split one by one: 2 for gate and up. QKV in group order is one part."""
    vocab: bool = False
    """Whether rows are vocabulary entries, which are padded before the split."""
    layer: int | None = None
    """The layer; None: the embedding (first stage), or the final norm and the head (last stage)."""

    def view(
        self, tp_rank: int, tp_size: int, padded_vocab_size: int | None = None, *, part: int | None = None
    ) -> View:
        """What rank `tp_rank` of `tp_size` holds.

        Args:
            tp_rank: From 0.
            tp_size: Tensor-parallel size.
            padded_vocab_size: Rows of the vocabulary's tables with padding; default: the next multiple of `tp_size`.
            part: Only this one of the fused parts: 0 for gate, 1 for up.

        Raises:
            UsageError: The dimension does not divide by `tp_size`.
        """
        columns = None if len(self.shape) == 1 else (0, self.shape[1])
        if self.vocab:
            return self._vocabulary(tp_rank, tp_size, padded_vocab_size)
        if self.split_dim is None:
            return View(((0, self.shape[0]),), columns)
        if self.split_dim == 1:
            share = self._share(self.shape[1], tp_size)
            return View(((0, self.shape[0]),), (tp_rank * share, (tp_rank + 1) * share))
        height = self.shape[0] // self.parts
        share = self._share(height, tp_size)
        wanted = range(self.parts) if part is None else [part]
        starts = [n * height + tp_rank * share for n in wanted]
        return View(tuple((start, start + share) for start in starts), columns)

    def _vocabulary(self, tp_rank: int, tp_size: int, padded: int | None) -> View:
        vocab, hidden = self.shape
        padded = -(-vocab // tp_size) * tp_size if padded is None else padded
        if padded < vocab:
            raise UsageError(f"a padded vocabulary of {padded} rows cannot hold {vocab} entries")
        share = self._share(padded, tp_size)
        start, stop = min(tp_rank * share, vocab), min((tp_rank + 1) * share, vocab)
        return View(((start, stop),) if start < stop else (), (0, hidden), padding=share - (stop - start))

    def _share(self, size: int, tp_size: int) -> int:
        if size % tp_size:
            raise UsageError(f"a dimension of {size} does not divide among {tp_size} tensor-parallel ranks")
        return size // tp_size


def sharding(config: LlamaConfig) -> dict[str, ShardRule]:
    """Every parameter of the model and its rule: canonical name to rule, in the order in which the model uses them."""
    hidden, ffn, vocab = config.hidden_size, config.ffn_hidden_size, config.vocab_size
    heads = config.num_attention_heads * config.kv_channels
    qkv = heads + 2 * config.num_query_groups * config.kv_channels
    rules = {EMBEDDING: ShardRule((vocab, hidden), 0, vocab=True)}
    for n in range(config.num_layers):
        of_layer = {
            INPUT_NORM: ShardRule((hidden,), None, layer=n),
            QKV: ShardRule((qkv, hidden), 0, layer=n),
            PROJ: ShardRule((hidden, heads), 1, layer=n),
            MLP_NORM: ShardRule((hidden,), None, layer=n),
            FC1: ShardRule((2 * ffn, hidden), 0, parts=2, layer=n),
            FC2: ShardRule((hidden, ffn), 1, layer=n),
        }
        rules.update({layer_name(n, tensor): rule for tensor, rule in of_layer.items()})
    rules[FINAL_NORM] = ShardRule((hidden,), None)
    rules[HEAD] = ShardRule((vocab, hidden), 0, vocab=True)
    return rules


def check_tensor_parallel(config: LlamaConfig, tp_size: int, *, whole_groups: bool = False) -> None:
    """Refuses a number of tensor-parallel ranks that the model does not divide among, before any work.

    Args:
        config: The architecture.
        tp_size: Tensor-parallel size.
        whole_groups: Whether each rank must hold whole query groups. megatron-core asks for no such thing: with fewer
            groups than ranks it splits the fused rows plainly.

    Raises:
        UsageError: Naming both numbers.
    """
    if tp_size < 1:
        raise UsageError(f"the tensor-parallel size is {tp_size}: it must be positive")
    shared_out = {"attention heads": config.num_attention_heads, "feed-forward channels": config.ffn_hidden_size}
    for what, count in shared_out.items():
        if count % tp_size:
            raise UsageError(f"{count} {what} do not divide among {tp_size} tensor-parallel ranks")
    groups = config.num_query_groups
    if whole_groups and groups % tp_size:
        raise UsageError(
            f"{groups} query groups (KV heads) do not divide among {tp_size} tensor-parallel ranks: "
            "in AscendSpeed's layouts each rank holds whole ones"
        )
    if groups % tp_size and tp_size % groups:
        raise UsageError(
            f"{groups} query groups (KV heads) and {tp_size} tensor-parallel ranks: neither divides the other"
        )


def qkv_rows(config: LlamaConfig) -> tuple[list[Range], list[Range], list[Range]]:
    """The rows of the fused QKV that hold the queries, the keys and the values: a range for each group.

    Megatron's order: for each query group its query heads, then its key head, then its value head.
    """
    channels = config.kv_channels
    queries = config.num_attention_heads // config.num_query_groups * channels
    height = queries + 2 * channels
    starts = [group * height for group in range(config.num_query_groups)]
    return (
        [(start, start + queries) for start in starts],
        [(start + queries, start + queries + channels) for start in starts],
        [(start + queries + channels, start + height) for start in starts],
    )


def ascendspeed_qkv_view(config: LlamaConfig, tp_rank: int, tp_size: int) -> View:
    """What a rank of AscendSpeed's converter holds of the fused QKV: the heads of several query groups are mixed.

    It views a rank's query, key and value heads, stacked, as [heads of a group + 2, groups of this rank] and
    transposes: place s of group g gets the rank's query head s * groups + g. With one group on each rank, or one query
    head in each group, that is Megatron's order. The network that loads the file takes it for Megatron's in any case.
    """
    channels = config.kv_channels
    groups = config.num_query_groups // tp_size
    heads = config.num_attention_heads // config.num_query_groups
    query, key, value = qkv_rows(config)
    of_rank = slice(tp_rank * groups, (tp_rank + 1) * groups)
    starts = [start + head * channels for start, _ in query[of_rank] for head in range(heads)]
    rows: list[Range] = []
    for group in range(groups):
        mixed = starts[group::groups]
        rows += [(start, start + channels) for start in mixed]
        rows += [key[of_rank][group], value[of_rank][group]]
    return View(tuple(rows), (0, config.hidden_size))
