"""What AscendSpeed's converter writes for a rank, computed with torch from Hugging Face's tensors.

The names are written down apart from the package: those of AscendSpeed's master branch (nested) and of the one before
(flat), as its files have them.
"""

import torch
from models import megatron_state

NESTED = {
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.proj",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}
FLAT = {
    "self_attention.linear_qkv": "attention.query_key_value",
    "self_attention.linear_proj": "attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.proj",
    "mlp.linear_fc2": "mlp.down_proj",
}
UNMERGED = {"nested": ("mlp.gate_proj", "mlp.dense_h_to_4h"), "flat": ("mlp.gate_proj", "mlp.up_proj")}


def mixed_qkv(tp):
    """AscendSpeed's way to fuse a rank's heads: stacked, seen as (heads of a group + 2, groups, channels), turned."""

    def fuse(q, k, v, c):
        groups = c.num_query_groups // tp
        heads = c.num_attention_heads // c.num_query_groups
        ranks = []
        for parts in zip(q.chunk(tp), k.chunk(tp), v.chunk(tp), strict=True):
            stacked = torch.cat(parts).view(heads + 2, groups, c.kv_channels, c.hidden_size)
            ranks.append(stacked.transpose(0, 1).reshape(-1, c.hidden_size))
        return torch.cat(ranks)

    return fuse


def model(kind, state, c, layers, tp, tp_rank, *, merge_mlp, divisor=128, mixed=False):
    """The value under `model` or `module`: "nested" dictionaries, or a "flat" one."""
    fuse = {"fuse": mixed_qkv(tp)} if mixed else {}
    core = megatron_state(state, c, layers, tp, tp_rank, divisor, **fuse)
    embedding, head = core.pop("embedding.word_embeddings.weight", None), core.pop("output_layer.weight", None)
    inner = dict(_renamed(kind, core, merge_mlp))
    if kind == "nested":
        return {
            "language_model": {
                "embedding": {"word_embeddings": {"weight": {} if embedding is None else embedding}},
                "encoder": inner,
                "output_layer": {} if head is None else {"weight": head},
            }
        }
    ends = {"embedding.word_embeddings.weight": embedding, "lm_head.lm_head.weight": head}
    flat = {f"language_model.{name}": tensor for name, tensor in inner.items()}
    for n in range(len(layers)):  # as transformers made them, in float32
        powers = torch.arange(0, c.kv_channels, 2).float() / c.kv_channels
        flat[f"language_model.layers.{n}.attention.rotary_emb.inv_freq"] = 1.0 / c.rotary_base**powers
    return flat | {name: tensor for name, tensor in ends.items() if tensor is not None}


def _renamed(kind, core, merge_mlp):
    for name, tensor in core.items():
        stem = name.removeprefix("decoder.").removesuffix(".weight")
        if stem == "final_layernorm":
            yield "final_layernorm.weight", tensor
            continue
        word, number, tail = stem.split(".", 2)
        layer = f"{word}.{number}"
        if tail == "mlp.linear_fc1" and not merge_mlp:
            for part, half in zip(UNMERGED[kind], tensor.chunk(2), strict=True):
                yield f"{layer}.{part}.weight", half
        else:
            yield f"{layer}.{(NESTED if kind == 'nested' else FLAT).get(tail, tail)}.weight", tensor


def save(folder, kind, state, c, tp, pp=1, *, deepspeed=False, **options):
    """A `release` folder and its tracker, as AscendSpeed's converter leaves them: nothing but weights."""
    release = folder / "release"
    share = c.num_layers // pp
    for tp_rank in range(tp):
        for stage in range(pp):
            layers = range(stage * share, (stage + 1) * share)
            tree = model(kind, state, c, layers, tp, tp_rank, **options)
            if deepspeed:
                file = release / f"mp_rank_{tp_rank:02d}_model_states.pt"
                content = {"checkpoint_version": 3.0, "module": tree, "dp_world_size": 0}
            else:
                file = release / f"mp_rank_{tp_rank:02d}{f'_{stage:03d}' if pp > 1 else ''}" / "model_optim_rng.pt"
                content = {"checkpoint_version": 3.0, "model": tree}
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, file)
    tracker = "latest" if deepspeed else "latest_checkpointed_iteration.txt"
    (folder / tracker).write_text("release\n")
    return folder
