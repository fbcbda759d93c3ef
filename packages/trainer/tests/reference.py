"""The same training, by independent code: Hugging Face's LlamaForCausalLM and PyTorch's AdamW, in one process."""

import math

import torch
from transformers import LlamaForCausalLM


def learning_rate(step, *, lr, min_lr, warmup, steps):
    """Megatron's cosine with linear warm-up, `step` counted from 0."""
    if step <= warmup and warmup:
        return lr * step / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(hf, batches, *, lr, min_lr, warmup, weight_decay, betas, eps, clip, shift=0):
    """Losses and gradient norms of every step, and the trained model.

    Args:
        hf: Folder of the model to start from.
        batches: For each step (tokens [b, s], labels [b, s] shifted by the caller, -100 ignored).
        shift: A control: how far the labels are moved from where they belong.
    """
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
    losses, norms = [], []
    for step, (tokens, labels) in enumerate(batches):
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, lr=lr, min_lr=min_lr, warmup=warmup, steps=len(batches))
        adam.zero_grad()
        logits = model(tokens).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels.roll(shift, 1).flatten(), ignore_index=-100)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        adam.step()
        losses.append(loss.item())
    return losses, norms, model
