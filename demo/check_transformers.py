"""Shows that plain `transformers` loads the demo's model and says what `llama-model generate` said.

    python demo/check_transformers.py MODEL GENERATED.json

Exit code 3 where the greedy tokens differ.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def greedy(folder: Path, prompt: str, length: int) -> list[int]:
    """The first `length` tokens of the answer, prompt and end token as the folder's own files say."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length)
    answer: list[int] = out[0, ids.shape[1] :].tolist()
    return answer


def main(folder: Path, generated: Path) -> int:
    """0 where both give the same tokens, else 3."""
    said = json.loads(generated.read_text("utf-8"))
    ours = said["outputs"][0]["tokens"]
    theirs = greedy(folder, said["prompt"], len(ours))
    print(f"transformers {theirs}\nllama-model  {ours}")
    return 0 if ours == theirs else 3


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
