"""Small models for the tests: tensors with bits of their own, and Megatron's layout computed apart with torch."""

import json
import zlib

import torch
from ckpt_tools import LlamaConfig
from safetensors.torch import load_file, save_file

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def small(**changes):
    fields = {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 4,
        "vocab_size": 37,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**{**fields, **changes})


def hf_shapes(c):
    """Hugging Face's names and shapes, written down apart from the package."""
    h, f, d = c.hidden_size, c.ffn_hidden_size, c.kv_channels
    shapes = {"model.embed_tokens.weight": (c.vocab_size, h)}
    for n in range(c.num_layers):
        layer = {
            "input_layernorm": (h,),
            "self_attn.q_proj": (c.num_attention_heads * d, h),
            "self_attn.k_proj": (c.num_query_groups * d, h),
            "self_attn.v_proj": (c.num_query_groups * d, h),
            "self_attn.o_proj": (h, c.num_attention_heads * d),
            "post_attention_layernorm": (h,),
            "mlp.gate_proj": (f, h),
            "mlp.up_proj": (f, h),
            "mlp.down_proj": (h, f),
        }
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (h,), "lm_head.weight": (c.vocab_size, h)}


def random_bits(name, shape, dtype, seed=0):
    """Any bits at all, NaNs and infinities included, that depend on the tensor's name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    info = torch.iinfo(BITS[dtype])
    return torch.randint(info.min, info.max, shape, generator=generator).to(BITS[dtype]).view(dtype)


def hf_state(config, dtype=torch.float16, seed=0):
    return {name: random_bits(name, shape, dtype, seed) for name, shape in hf_shapes(config).items()}


def write_hf(folder, config, state, shards=1):
    """A Hugging Face folder, written by safetensors' own writer."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = NAMES[next(iter(state.values())).dtype]
    (folder / "config.json").write_text(json.dumps(config.to_hf(dtype)))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    names = list(state)
    weight_map = {name: f"model-{n % shards + 1:05d}-of-{shards:05d}.safetensors" for n, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_hf(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


def fused_qkv(q, k, v, c):
    """[groups, heads of a group + 2, channels, hidden], flattened: Megatron's own way to say it."""
    g, d, h = c.num_query_groups, c.kv_channels, c.hidden_size
    parts = [q.view(g, -1, d, h), k.view(g, 1, d, h), v.view(g, 1, d, h)]
    return torch.cat(parts, dim=1).reshape(-1, h)


def megatron_state(state, c, layers, tp, tp_rank, divisor=1, fuse=fused_qkv):
    """What a rank of Megatron holds of a range of layers, computed from Hugging Face's tensors with torch."""

    def vocabulary(table):
        padding = -len(table) % (tp * divisor)
        return torch.cat([table, table[-1:].repeat(padding, 1)]).chunk(tp)[tp_rank]

    tensors = {}
    if layers.start == 0:
        tensors["embedding.word_embeddings.weight"] = vocabulary(state["model.embed_tokens.weight"])
    for n, layer in enumerate(layers):
        hf, ours = f"model.layers.{layer}.", f"decoder.layers.{n}."
        q, k, v = (state[f"{hf}self_attn.{x}_proj.weight"] for x in "qkv")
        gate, up = (state[f"{hf}mlp.{x}_proj.weight"].chunk(tp)[tp_rank] for x in ("gate", "up"))
        tensors |= {
            ours + "input_layernorm.weight": state[hf + "input_layernorm.weight"],
            ours + "self_attention.linear_qkv.weight": fuse(q, k, v, c).chunk(tp)[tp_rank],
            ours + "self_attention.linear_proj.weight": state[hf + "self_attn.o_proj.weight"].chunk(tp, 1)[tp_rank],
            ours + "pre_mlp_layernorm.weight": state[hf + "post_attention_layernorm.weight"],
            ours + "mlp.linear_fc1.weight": torch.cat([gate, up]),
            ours + "mlp.linear_fc2.weight": state[hf + "mlp.down_proj.weight"].chunk(tp, 1)[tp_rank],
        }
    if layers.stop == c.num_layers:
        tensors["decoder.final_layernorm.weight"] = state["model.norm.weight"]
        tensors["output_layer.weight"] = vocabulary(state["lm_head.weight"])
    return tensors


def rank_file(folder, tp_rank, pp_rank, pp):
    return folder / f"mp_rank_{tp_rank:02d}{f'_{pp_rank:03d}' if pp > 1 else ''}" / "model_optim_rng.pt"
