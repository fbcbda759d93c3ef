"""`npu-kernels bench` and the references on the emulated NPU: figures mean nothing there, that they come does."""

import pytest
import torch
from npu_kernels import Device, bench, bench_cases, dispatch, ops

from contract.compare import same

ops.load_all()
TINY = bench_cases.Shape(name="tiny", h=8, n=4, g=2, d=16, f=6, v=11, s=5, decode_rows=3, slots=7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_measures_the_fused_ops_against_the_references(dtype, monkeypatch):
    monkeypatch.setitem(bench_cases.LLAMA_2, "tiny", TINY)
    result = bench.measure(Device("npu"), dtype, ["tiny"], seconds=0)
    assert {row["backend"] for row in result["rows"]} == {"reference", "ascend"}
    assert {row["op"] for row in result["rows"]} == set(dispatch.OPS)
    known = {row["op"] for row in result["rows"] if row["of_peak"] is not None}
    assert known == ({"attention"} if dtype == "bfloat16" else set()), "an Ascend's fp32 peak is not known"
    assert "Ascend910B3" in bench.table(result)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_the_references_run_there_too(op):
    (case,) = [case for case in bench_cases.cases(TINY, torch.float32, torch.device("cpu")) if case.op == op]
    moved = [x.npu() if isinstance(x, torch.Tensor) else x for x in case.inputs]
    outputs = [dispatch.OPS[op].reference(*inputs) for inputs in (case.inputs, moved)]
    cpu, npu = (out if isinstance(out, tuple) else (out,) for out in outputs)
    assert same([x.cpu() for x in npu], cpu)
