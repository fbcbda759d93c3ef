"""llama-model itself, unchanged, on the emulated NPU: it trains and writes as on the CPU."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import torch
from npu_kernels import device, require_fused, rotary_embedding

llama_model = pytest.importorskip("llama_model", reason="llama-model is another package: `nox -s npu_contract` has it")
LlamaConfig = pytest.importorskip("ckpt_tools").LlamaConfig

TESTS = Path(__file__).resolve().parent.parent
CONFIG = LlamaConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=101,
    max_position_embeddings=64,
)
ROWS = [list(range(3, 20)), [90, 1, 44, 7, 7, 7, 100, 23, 56, 78, 9, 10, 12, 45, 67, 89, 2]]


def new_model(place, dtype=torch.float32):
    torch.manual_seed(0)
    return llama_model.LlamaModel(CONFIG).to(place, dtype)


def train(place, *, steps=4, dtype=torch.float32, lr=1e-2, packed=False):
    """Losses and gradient norms of a few steps: forward, backward, clipping, AdamW."""
    model = new_model(place, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, fused=True)
    tokens = torch.tensor(ROWS)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[0, :3] = -100
    bounds = None
    if packed:
        inputs, labels = inputs.reshape(1, -1), labels.reshape(1, -1)
        bounds = torch.tensor([0, 16, 32], dtype=torch.int32).to(place)
    history = []
    for _ in range(steps):
        loss = model(inputs.to(place), labels=labels.to(place), cu_seqlens=bounds).sum() / (labels != -100).sum().item()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history += [loss.item(), norm.item()]
    return history


@pytest.fixture
def only_fused():
    """An op that fell back would raise."""
    require_fused()
    yield
    require_fused(False)


def test_a_whole_llama_trains_on_an_npu_as_on_a_cpu(only_fused):
    cpu = train("cpu")
    with emulator.recording() as calls:
        npu = train("npu")
    assert npu == pytest.approx(cpu, rel=2e-5)
    assert cpu[-2] < cpu[0] - 0.5, "it learns"
    assert train("npu", lr=1.1e-2)[2:] != pytest.approx(cpu[2:], rel=1e-3), "the control"
    counts = {op: sum(call.op == op for call in calls) for op in {call.op for call in calls}}
    layers, steps = CONFIG.num_layers, 4
    assert counts["aclnnFlashAttentionScore"] == counts["aclnnFlashAttentionScoreGrad"] == steps * layers
    assert counts["aclnnRmsNorm"] == counts["aclnnRmsNormGrad"] == steps * (2 * layers + 1)
    assert counts["aclnnSwiGlu"] == counts["aclnnSwiGluGrad"] == steps * layers
    assert counts["aclnnRotaryPositionEmbeddingV2"] == counts["aclnnRotaryPositionEmbeddingGrad"] == steps * 2 * layers
    assert counts["aclnnApplyAdamWV2"] == steps * len(list(new_model("cpu").parameters()))


WRITE_AND_TRAIN = """
import sys
from pathlib import Path
import emulator
emulator.start(Path(sys.argv[1]))
import torch
from contract.test_llama import ROWS, llama_model, new_model, train
train("npu", steps=1)
list(llama_model.generate(new_model("npu").eval(), [ROWS[0][:5], ROWS[1]], max_new_tokens=3))
print("trained", file=sys.stderr, flush=True)
torch.lgamma(torch.ones(3).npu())
"""


def test_nothing_falls_back_to_the_cpu(request):
    """torch_npu computes an op that it lacks on the host and says so on stderr, once a process: in one of its own."""
    folder = str(request.config.cache.mkdir("emulator"))
    done = subprocess.run(
        [sys.executable, "-c", WRITE_AND_TRAIN, folder], capture_output=True, text=True, check=True, cwd=TESTS
    )
    before, after = done.stderr.split("trained")
    assert "fall back" not in before
    assert "'aten::lgamma.out' is not currently supported" in after, "the control"


def test_packed_documents_train_as_rows():
    assert train("npu", packed=True) == pytest.approx(train("cpu"), rel=2e-5)


def test_a_llama_in_bf16_trains_within_two_percent():
    cpu, npu = train("cpu", dtype=torch.bfloat16), train("npu", dtype=torch.bfloat16)
    assert npu[::2] == pytest.approx(cpu[::2], rel=2e-2)
    assert npu != cpu, "the control: the same bits would be the same code"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_writes_the_same_tokens(dtype):
    def written(place):
        steps = llama_model.generate(new_model(place, dtype).eval(), [ROWS[0][:5], ROWS[1][:9]], max_new_tokens=6)
        return list(steps)

    with emulator.recording() as calls:
        npu = written("npu")
    cpu = written("cpu")
    assert [step.tokens for step in npu] == [step.tokens for step in cpu]
    for mine, other in zip(npu, cpu, strict=True):
        assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-5 if dtype == torch.float32 else 0.03)
    lengths = [call["actual_seq_lengths_kv"] for call in calls if call.op == "aclnnFusedInferAttentionScoreV2"]
    if dtype == torch.bfloat16:
        assert lengths[-1] == [10, 14]


@pytest.mark.parametrize("place", ["cpu", "npu"])
def test_position_4095_of_a_model_cast_to_bf16_is_turned_by_exact_angles(place):
    """On a CPU to the rounding of the result; on an NPU, whose op rounds the tables, to that of three products."""
    config = dataclasses.replace(CONFIG, max_position_embeddings=4096)
    model = llama_model.LlamaModel(config).to(place).to(torch.bfloat16)
    q = torch.randn(1, 1, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = model.rotary.at(torch.tensor([[4095]]).to(place))
    assert cos.dtype == torch.float32
    ours = rotary_embedding(q.to(place), q.to(place), cos, sin)[0].cpu().double()
    # The very angles of transformers and of the model: products and powers in fp32.
    angles = 4095 * (1.0 / 10000.0 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16))
    angles = torch.cat((angles, angles)).double()
    first, second = q.double().chunk(2, -1)
    parts = q.double() * angles.cos(), torch.cat((-second, first), -1) * angles.sin()
    error, unit = (ours - sum(parts)).abs(), 2**-8
    rounding = unit * sum(parts).abs()
    cast = unit * sum(part.abs() for part in parts) * (1 + unit)
    assert (error <= rounding + (cast if place == "npu" else 0) + 1e-6).all()
    off = sum((q.double() * (angles.bfloat16().double()).cos(), parts[1])) - sum(parts)
    assert not (off.abs() <= rounding + cast).all(), "the control: angles in bf16 are off by whole turns"


def test_the_npu_is_this_machines_accelerator():
    found = device()
    assert (found.type, found.collective_backend, found.count()) == ("npu", "hccl", 1)
    assert found.name == "Ascend910B3"
    assert found.torch_device() == torch.device("npu", 0)
    found.synchronize()
    assert found.max_memory_bytes() > 0
