"""`npu-kernels bench` measures what it says, on shapes small enough for a test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from npu_kernels import Device, KernelError, bench, bench_cases, dispatch, ops

TINY = bench_cases.Shape(name="tiny", h=8, n=4, g=2, d=4, f=6, v=11, s=5, decode_rows=3, slots=7)


@pytest.fixture
def result(monkeypatch):
    monkeypatch.setitem(bench_cases.LLAMA_2, "tiny", TINY)
    return bench.measure(Device("cpu"), "float32", ["tiny"], full=True, seconds=0)


def test_every_op_is_measured_with_every_backend_and_pass(result):
    ops.load_all()
    rows = {(row["op"], row["pass"], row["backend"]) for row in result["rows"]}
    passes = {op: 1 if op == "decode_attention" else 2 for op in dispatch.OPS}
    assert len(rows) == len(result["rows"]) == 2 * sum(passes.values())
    assert {op for op, _, _ in rows} == set(dispatch.OPS)
    assert all(row["seconds"] > 0 for row in result["rows"])
    assert json.loads(json.dumps(result)) == result


def test_a_rate_is_the_least_work_over_the_time(result):
    by = {(row["op"], row["pass"], row["backend"]): row for row in result["rows"]}
    norm = by["rms_norm", "forward", "torch"]
    assert norm["gb_per_s"] == pytest.approx(2 * 5 * 8 * 4 / norm["seconds"] / 1e9), "read once, written once"
    attention = by["attention", "forward", "reference"]
    assert attention["tflop_per_s"] == pytest.approx(4 * 5 * 5 * 4 * 4 / 2 / attention["seconds"] / 1e12)
    ratio = by["swiglu", "forward", "reference"]["seconds"] / by["swiglu", "forward", "torch"]["seconds"]
    assert by["swiglu", "forward", "torch"]["speedup"] == pytest.approx(ratio)
    assert by["swiglu", "forward", "reference"]["speedup"] == 1


def test_the_share_of_the_peak_is_told_where_it_is_known(result, monkeypatch):
    assert all(row["of_peak"] is None for row in result["rows"])
    monkeypatch.setattr(Device, "peak_flops", lambda self, dtype: 1e9)
    monkeypatch.setattr(Device, "peak_bytes_per_s", lambda self: 1e6)
    known = bench.measure(Device("cpu"), "float32", ["tiny"], full=True, seconds=0)
    for row in known["rows"]:
        rate = row["tflop_per_s"] * 1e12 / 1e9 if row["op"] == "attention" else row["gb_per_s"] * 1e9 / 1e6
        assert row["of_peak"] == pytest.approx(rate)


def test_the_backward_reaches_every_input():
    (case,) = [case for case in bench_cases.cases(TINY, torch.float32, torch.device("cpu")) if case.op == "attention"]
    grads = bench._run(dispatch.OPS["attention"].reference, case, True)()
    assert [grad.shape for grad in grads] == [x.shape for x in case.inputs[:3]]
    assert all(grad.abs().sum() > 0 for grad in grads[2:])


def test_people_get_a_table(result):
    lines = bench.table(result).splitlines()
    assert len({len(line) for line in lines[2:]}) == 1, "columns"
    assert "tiny rotary_embedding forward + backward  torch" in bench.table(result)


def test_models_are_cut_short_on_a_cpu_unless_all_is_asked_for():
    small = bench_cases.LLAMA_2["70b"].scaled_down()
    assert (small.h, small.f, small.v) == (8192, 28672, 32000)
    assert small.s < 4096


@pytest.mark.parametrize(("dtype", "model"), [("int8", "7b"), ("float32", "13b")])
def test_what_bench_does_not_know_is_refused(dtype, model):
    with pytest.raises(KernelError, match=r"bench knows no '(int8|13b)': choose from"):
        bench.measure(Device("cpu"), dtype, [model])


def test_the_command_refuses_in_one_line():
    command = [str(Path(sys.executable).parent / "npu-kernels"), "bench", "--device", "tpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: no device is called 'tpu': choose from npu, cuda, cpu\n")
