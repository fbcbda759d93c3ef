"""Writes a small LLaMA-2 with random weights and grouped-query attention as a Hugging Face folder.

python demo/make_model.py TOKENIZER OUT
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

SEED = 1


def main(tokenizer: Path, out: Path) -> None:
    """1.6 million parameters: 2 layers, 6 query heads on 2 key/value heads."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(out)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, out / file.name)
    print(f"{model.num_parameters():,} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
