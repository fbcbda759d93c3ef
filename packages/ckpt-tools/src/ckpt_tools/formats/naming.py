"""What the layouts that are split over ranks call the parts of a model: one table for each, read in both directions.

A stored tensor lies in a rank's file under a path of keys (`language_model`, `encoder`, `layers.0.mlp.proj.weight`).
Files of trained models may have the same keys joined by dots already, so that reading goes by the joined path.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from ckpt_tools.layout import NamingLabel
from ckpt_tools.shard_rules import (
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    HEAD,
    INPUT_NORM,
    LAYER_TENSORS,
    MLP_NORM,
    PROJ,
    QKV,
    layer_name,
)

KeyPath = tuple[str, ...]
QKV_ORDER = "qkv_order"
"""The key under which a file of ours says which order its query heads stand in, where both are possible."""

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
"""A canonical name, in its parts."""


def renumbered(name: str, first_layer: int) -> str:
    """The canonical name over the whole model, of one whose layers are numbered within a chunk of it."""
    in_layer = LAYER.fullmatch(name)
    return layer_name(first_layer + int(in_layer[1]), in_layer[2]) if in_layer else name


class Stored(NamedTuple):
    """What a stored tensor holds a rank's share of."""

    name: str
    """A canonical name, with layers numbered within the file."""
    part: int | None = None
    """Which of the fused parts, where they are stored one by one: 0 for gate, 1 for up."""


@dataclass(frozen=True)
class Naming:
    """The names of one layout."""

    label: NamingLabel
    """The format's name."""
    outer: Mapping[str, KeyPath]
    """Where the embedding, the final norm and the head lie."""
    layers: KeyPath
    """Where a layer's tensors lie: the last key is what theirs begin with."""
    layer: Mapping[str, str]
    """The tensors of a layer: canonical to stored."""
    gate_and_up: tuple[str, str] | None = None
    """What fc1 is called where it is not merged."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of a layer's tensors that are read: stored to canonical."""
    skeleton: Mapping[str, Any] = field(default_factory=dict)
    """Dictionaries that every file has, empty ones too."""
    inv_freq: str | None = None
    """The frequencies of the rotary embedding, which each layer holds a copy of."""
    mixes_groups: bool = False
    """Whether files may have query heads in the order that AscendSpeed's converter gives them."""

    def stored(self, joined: str) -> Stored | None:
        """What the tensor under this joined path holds; None for a path that this layout has not."""
        if joined in self._outer:
            return Stored(self._outer[joined])
        number, _, tail = joined.removeprefix(self._layers).partition(".")
        known = joined.startswith(self._layers) and number.isascii() and number.isdigit() and tail in self._tails
        return Stored(layer_name(int(number), self._tails[tail].name), self._tails[tail].part) if known else None

    def paths(self, names: Iterable[str], *, merge_mlp: bool) -> Iterator[tuple[KeyPath, Stored]]:
        """Where a file holds these canonical names, whose layers are numbered within it."""
        for name in names:
            in_layer = LAYER.fullmatch(name)
            if not in_layer:
                yield self.outer[name], Stored(name)
            elif in_layer[2] == FC1 and self.gate_and_up and not merge_mlp:
                for part, tail in enumerate(self.gate_and_up):
                    yield self.in_layer(in_layer[1], tail), Stored(name, part)
            else:
                yield self.in_layer(in_layer[1], self.layer[in_layer[2]]), Stored(name)

    def in_layer(self, number: int | str, tail: str) -> KeyPath:
        """The path of a layer's tensor."""
        return *self.layers[:-1], f"{self.layers[-1]}{number}.{tail}"

    @cached_property
    def _outer(self) -> dict[str, str]:
        return {".".join(path): name for name, path in self.outer.items()}

    @cached_property
    def _layers(self) -> str:
        return ".".join(self.layers)

    @cached_property
    def _tails(self) -> dict[str, Stored]:
        """What a layer's stored names hold, as of one layer."""
        whole = {stored: Stored(name) for name, stored in self.layer.items()}
        parts = {stored: Stored(FC1, part) for part, stored in enumerate(self.gate_and_up or ())}
        return whole | parts | {stored: Stored(name) for stored, name in self.aliases.items()}


MEGATRON_CORE = Naming(
    label="megatron-core",
    outer={name: (name,) for name in (EMBEDDING, FINAL_NORM, HEAD)},
    layers=("decoder.layers.",),
    layer={name: name for name in LAYER_TENSORS},
    aliases={  # Transformer Engine's layers fuse the norms with the projections that follow
        "self_attention.linear_qkv.layer_norm_weight": INPUT_NORM,
        "mlp.linear_fc1.layer_norm_weight": MLP_NORM,
    },
)

ASCENDSPEED = Naming(
    label="ascendspeed",
    outer={
        EMBEDDING: ("language_model", "embedding", "word_embeddings", "weight"),
        FINAL_NORM: ("language_model", "encoder", "final_layernorm.weight"),
        HEAD: ("language_model", "output_layer", "weight"),
    },
    layers=("language_model", "encoder", "layers."),
    layer={
        INPUT_NORM: "input_layernorm.weight",
        QKV: "self_attention.query_key_value.weight",
        PROJ: "self_attention.dense.weight",
        MLP_NORM: "post_attention_layernorm.weight",
        FC1: "mlp.proj.weight",
        FC2: "mlp.dense_4h_to_h.weight",
    },
    gate_and_up=("mlp.gate_proj.weight", "mlp.dense_h_to_4h.weight"),
    skeleton={"language_model": {"embedding": {"word_embeddings": {"weight": {}}}, "encoder": {}, "output_layer": {}}},
    mixes_groups=True,
)

ASCENDSPEED_FLAT = Naming(
    label="ascendspeed-flat",
    outer={
        EMBEDDING: ("embedding.word_embeddings.weight",),
        FINAL_NORM: ("language_model.final_layernorm.weight",),
        HEAD: ("lm_head.lm_head.weight",),
    },
    layers=("language_model.layers.",),
    layer={
        INPUT_NORM: "input_layernorm.weight",
        QKV: "attention.query_key_value.weight",
        PROJ: "attention.dense.weight",
        MLP_NORM: "post_attention_layernorm.weight",
        FC1: "mlp.proj.weight",
        FC2: "mlp.down_proj.weight",
    },
    gate_and_up=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    inv_freq="attention.rotary_emb.inv_freq",
    mixes_groups=True,
)

NAMINGS = {naming.label: naming for naming in (MEGATRON_CORE, ASCENDSPEED, ASCENDSPEED_FLAT)}

NO_WEIGHT = re.compile(r".*(_extra_state|rotary_emb\.inv_freq)")
"""Tensors that lie among the weights and are none: state of Transformer Engine's, constants."""


def naming_of(joined: Iterable[str]) -> Naming | None:
    """The naming that knows most of these paths, or None where none knows any."""
    paths = list(joined)
    known = {label: sum(naming.stored(path) is not None for path in paths) for label, naming in NAMINGS.items()}
    best = max(known, key=lambda label: known[label])
    return NAMINGS[best] if known[best] else None
