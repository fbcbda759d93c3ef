"""A tiny model, global batches, and what Hugging Face with PyTorch's AdamW makes of them, in one process."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rank_cases import LENGTH, OPTIMIZER, SAMPLES
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, VOCAB, LAYERS = 10, 101, 4
GROUPS = {"mha": 4, "gqa": 2}


@dataclass(frozen=True)
class EngineCase:
    """What the ranks are told; picklable."""

    folder: Path
    gradients: Path
    """The first step's, as a checkpoint: ckpt-tools brings them into canonical names, row orders and shards."""
    weights: Path
    """After the last step."""
    batches: list[tuple[torch.Tensor, torch.Tensor]]
    history: list[tuple[float, float]]
    """Loss a token and gradient norm of every step."""


def tiny(groups: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,  # odd: tensor parallelism has to pad it
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=groups,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a norm that is left out or taken twice
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random tokens, and labels of which random ones carry no loss: each micro-batch has another share of it."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(0, VOCAB, (2, SAMPLES, LENGTH + 1), generator=generator).repeat(-(-count // 2), 1, 1)[:count]
    kept = torch.rand(count, SAMPLES, 1, generator=generator)
    masked = torch.rand(count, SAMPLES, LENGTH, generator=generator) > kept
    labels = text[..., 1:].masked_fill(masked, -100)
    return list(zip(text[..., :-1].contiguous(), labels, strict=True))


def make(home: Path, groups: int, count: int = STEPS) -> EngineCase:
    """Trains the reference, and writes its folders below `home`."""
    model, steps, history = tiny(groups), batches(count), []
    model.save_pretrained(home / "hf")
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        lr=OPTIMIZER["lr"],
        betas=(OPTIMIZER["adam_beta1"], OPTIMIZER["adam_beta2"]),
        eps=OPTIMIZER["adam_eps"],
    )
    for tokens, labels in steps:
        adam.zero_grad()
        logits = model(tokens).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100)
        loss.backward()
        if not history:
            twin = tiny(groups)
            twin.load_state_dict({name: parameter.grad for name, parameter in model.named_parameters()})
            twin.save_pretrained(home / "gradients")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_grad"])
        adam.step()
        history.append((loss.item(), norm.item()))
    model.save_pretrained(home / "weights")
    return EngineCase(home / "hf", home / "gradients", home / "weights", steps, history)


def swapped(case: EngineCase, home: Path) -> Path:
    """The case's folder with one mistake: gate and up projection of a layer exchanged."""
    model = LlamaForCausalLM.from_pretrained(case.folder)
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    model.save_pretrained(home)
    return home
