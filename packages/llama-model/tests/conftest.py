"""Tiny random LLaMAs of Hugging Face, their folders and gradients, and the pool of ranks."""

import copy
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

LAYERS = 4
VOCAB = 101  # odd: tensor parallelism has to pad it
GROUPS = {"mha": 4, "gqa": 2}


def tiny(groups: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
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
    return model.eval()


class Case:
    """One model: its folder, a batch, and what Hugging Face computes of it."""

    def __init__(self, folder: Path, groups: int) -> None:
        self.folder, self.hf = folder / "hf", tiny(groups)
        self.hf.save_pretrained(self.folder)
        generator = torch.Generator().manual_seed(1)
        text = torch.randint(0, VOCAB, (2, 21), generator=generator)
        self.tokens, self.labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        self.labels[0, :5] = self.labels[1, -3:] = -100
        self.logits = self.hf(self.tokens).logits
        loss = torch.nn.functional.cross_entropy(self.logits.flatten(0, 1), self.labels.flatten(), reduction="none")
        self.loss = loss.view(self.labels.shape).detach()
        loss.sum().backward()
        self.logits = self.logits.detach()
        # The gradients as a checkpoint: ckpt-tools brings them into canonical names, row orders and shards.
        self.gradients = folder / "gradients"
        twin = tiny(groups)
        twin.load_state_dict({name: parameter.grad for name, parameter in self.hf.named_parameters()})
        twin.save_pretrained(self.gradients)
        self.hf.zero_grad()

    def wrong(self, kind: str) -> Path:
        """A folder of the same model with one mistake of conversion."""
        twin = tiny(self.hf.config.num_key_value_heads)
        state = {name: value.clone() for name, value in self.hf.state_dict().items()}
        for name in state:
            if kind == "interleaved" and ("q_proj" in name or "k_proj" in name):
                halves = state[name].unflatten(0, (-1, 2, self.hf.config.head_dim // 2))
                state[name] = halves.transpose(1, 2).flatten(0, 2)  # Meta's order of a head's rows
            if kind == "swapped" and "gate_proj" in name:
                up = name.replace("gate", "up")
                state[name], state[up] = state[up], state[name]
        twin.load_state_dict(state)
        folder = self.folder.parent / kind
        twin.save_pretrained(folder)
        return folder


@pytest.fixture(scope="session", params=list(GROUPS))
def case(request, tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), GROUPS[request.param])


@pytest.fixture(scope="session")
def gqa(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("gqa-only"), GROUPS["gqa"])


class Exact:
    """Hugging Face's loss of a case's batch and every gradient, in float64, under canonical names."""

    def __init__(self, case: Case) -> None:
        hf = copy.deepcopy(case.hf).double()
        logits = hf(case.tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), case.labels.flatten(), reduction="none")
        loss.sum().backward()
        self.loss = loss.detach().view(case.labels.shape)
        grads = {name.removesuffix(".weight"): parameter.grad for name, parameter in hf.named_parameters()}
        self.gradients = {
            "embedding.word_embeddings.weight": grads["model.embed_tokens"],
            "decoder.final_layernorm.weight": grads["model.norm"],
            "output_layer.weight": grads["lm_head"],
        }
        for n in range(LAYERS):
            theirs, ours = f"model.layers.{n}.", f"decoder.layers.{n}."
            groups = hf.config.num_key_value_heads
            qkv = [grads[f"{theirs}self_attn.{x}_proj"].unflatten(0, (groups, -1)) for x in "qkv"]
            gate_up = [grads[f"{theirs}mlp.{x}_proj"] for x in ("gate", "up")]
            self.gradients |= {
                f"{ours}input_layernorm.weight": grads[f"{theirs}input_layernorm"],
                f"{ours}self_attention.linear_qkv.weight": torch.cat(qkv, 1).flatten(0, 1),
                f"{ours}self_attention.linear_proj.weight": grads[f"{theirs}self_attn.o_proj"],
                f"{ours}pre_mlp_layernorm.weight": grads[f"{theirs}post_attention_layernorm"],
                f"{ours}mlp.linear_fc1.weight": torch.cat(gate_up),
                f"{ours}mlp.linear_fc2.weight": grads[f"{theirs}mlp.down_proj"],
            }


@pytest.fixture(scope="session")
def exact(gqa) -> Exact:
    def norm(self, x):  # transformers' own computes in fp32 whatever the model's type
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", norm)
        return Exact(gqa)


@pytest.fixture(scope="session")
def ranks():
    with Ranks(2) as pool:
        yield pool
