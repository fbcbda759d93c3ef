"""ckpt-tools against a plain load and save of the same weights: 1.1 B parameters, fp16, to and from TP 2 PP 2.

    python benchmarks/convert_checkpoint.py FOLDER [ROUNDS]

FOLDER gets the model (2.2 GB, made once) and the results (removed again). The peers are what copying costs at least:
`cp`, with a checksum (torch's zip files hold one of each tensor), and safetensors' own load_file + save_file, which
imports torch as every other converter does. A second table has every format into every other.
"""

import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
from measure import SCRIPTS, Command, compare, remove, run_once
from safetensors.numpy import save_file

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 22, 2048, 5632, 32, 4, 32000
LAYOUT = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
LOAD_AND_SAVE = (
    "import sys; from safetensors.torch import load_file, save_file; save_file(load_file(sys.argv[1]), sys.argv[2])"
)


def make_model(folder: Path) -> None:
    """A random LLaMA of TinyLlama's sizes, as one safetensors file."""
    head = HIDDEN // HEADS
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj": (KV_HEADS * head, HIDDEN) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj": (FFN, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (HIDDEN, FFN)}
        shapes |= {f"{layer}.{name}": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": rng.standard_normal(shape, np.float32).astype(np.float16) for name, shape in shapes.items()
    }
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=HIDDEN, intermediate_size=FFN,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=VOCAB,
        max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
        torch_dtype="float16", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def main(folder: Path, rounds: int) -> None:
    """Makes the model where it is missing, then measures."""
    source = folder / "hf"
    if not (source / "config.json").exists():
        remove(source)
        # In a process of its own: a process that is started later counts the memory of this one as its own peak.
        maker = multiprocessing.get_context("spawn").Process(target=make_model, args=(source,))
        maker.start()
        maker.join()
    weights, megatron, out = source / "model.safetensors", folder / "megatron", folder / "out"
    remove(megatron, out)
    ckpt_tools = SCRIPTS / "ckpt-tools"
    to_megatron = ("--to", "megatron-core", *LAYOUT)
    run_once([ckpt_tools, "convert", source, megatron, *to_megatron])  # the source of the way back
    commands: dict[str, Command] = {
        "safetensors load + save": [sys.executable, "-c", LOAD_AND_SAVE, weights, out],
        "cp": ["cp", weights, out],
        "cp + checksum": ["sh", "-c", 'cp "$0" "$1" && cksum "$1"', weights, out],
        "Hugging Face -> TP 2 PP 2": [ckpt_tools, "convert", source, out, *to_megatron],
        "TP 2 PP 2 -> Hugging Face": [ckpt_tools, "convert", megatron, out, "--to", "hf"],
        "verify": [ckpt_tools, "verify", source, megatron],
    }
    compare(commands, rounds=rounds, clean=lambda: remove(out))
    remove(megatron)
    compare_pairs(folder, source)


def compare_pairs(folder: Path, source: Path) -> None:
    """Every format into every other, once each: time, memory, and how often each byte was read and written."""
    formats = {
        "hf": ("--to", "hf"),
        "megatron-core": ("--to", "megatron-core", *LAYOUT),
        "megatron-core, virtual": ("--to", "megatron-core", *LAYOUT, "--num-layers-per-virtual-pipeline-stage", "1"),
        "ascendspeed": ("--to", "ascendspeed", *LAYOUT),
        "ascendspeed-flat, merged": ("--to", "ascendspeed-flat", *LAYOUT, "--merge-mlp"),
        "deepspeed": ("--to", "deepspeed", *LAYOUT[:2]),
    }
    ckpt_tools, made, out = SCRIPTS / "ckpt-tools", folder / "made", folder / "out"
    print(f"\n{'from':24}  {'to':24}  {'wall s':>6}  {'CPU s':>6}  {'peak MiB':>8}  {'read':>5}  {'written':>7}")
    for one, options in formats.items():
        run_once([ckpt_tools, "convert", source, made, *options])
        size = _bytes_in(made)
        for other, wanted in formats.items():
            cost = run_once([ckpt_tools, "convert", made, out, *wanted, "--qkv-order", "megatron"])
            read, written = cost.read_gb * 1e9 / size, cost.written_gb * 1e9 / _bytes_in(out)
            print(
                f"{one:24}  {other:24}  {cost.wall_s:6.2f}  {cost.cpu_s:6.2f}  {cost.peak_mib:8.0f}  "
                f"{read:4.2f}x  {written:6.2f}x"
            )
            remove(out)
        remove(made)


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
