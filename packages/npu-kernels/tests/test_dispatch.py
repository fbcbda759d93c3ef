"""Which backend runs where, and what is said when it is not the fused one."""

import sys
import types
import warnings

import npu_kernels
import pytest
import torch
from npu_kernels import KernelError, dispatch, ops, require_fused
from npu_kernels.ops.ascend_schemas import SCHEMAS

ops.load_all()
OP = dispatch.OPS["rms_norm"]


@pytest.fixture
def on(monkeypatch):
    """The backend that would run for a tensor on a device, of a torch_npu with certain ops."""

    def choose(kind, *, variable="", fused=SCHEMAS):
        monkeypatch.setenv(dispatch.VARIABLE, variable)
        monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
        monkeypatch.setattr(torch.ops, "npu", types.SimpleNamespace(**dict.fromkeys(fused)))
        dispatch.forget_choice()
        return OP.on(types.SimpleNamespace(device=types.SimpleNamespace(type=kind)))

    yield choose
    monkeypatch.undo()
    require_fused(False)
    dispatch.forget_choice()


@pytest.mark.parametrize(("kind", "backend"), [("npu", OP.ascend), ("cuda", OP.torch), ("cpu", OP.torch)])
def test_the_device_chooses_without_a_word(on, kind, backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert on(kind) is backend
        require_fused()
        assert on(kind) is backend


@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_the_reference_on_an_accelerator_is_said_or_refused(on, kind):
    with pytest.warns(UserWarning, match=f"rms_norm on {kind} runs unfused: PUNA_KERNELS=reference"):
        assert on(kind, variable="reference") is OP.reference
    require_fused()
    with pytest.raises(KernelError, match=f"rms_norm on {kind} would run unfused .*fused kernels are required"):
        on(kind, variable="reference")


def test_the_reference_on_a_cpu_is_nobodys_fault(on):
    require_fused()
    assert on("cpu", variable="reference") is OP.reference


def test_an_op_that_torch_npu_lacks_falls_back_or_is_refused(on):
    fused = [name for name in SCHEMAS if name != "npu_rms_norm"]
    with pytest.warns(UserWarning, match="rms_norm on npu runs unfused: this torch_npu lacks npu_rms_norm"):
        assert on("npu", fused=fused) is OP.torch
    assert npu_kernels.backends("npu")["rms_norm"] == "F.rms_norm or its formula"
    assert npu_kernels.backends("npu")["swiglu"] == "npu_swiglu"
    with pytest.raises(KernelError, match="lacks npu_rms_norm"):
        on("npu", variable="require-fused", fused=fused)


def test_a_fallback_is_said_once(on):
    with pytest.warns(UserWarning, match="unfused"):
        on("cuda", variable="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch._choose("rms_norm", "cuda")


def test_what_runs_can_be_printed(on):
    on("cpu", variable="reference")
    assert set(npu_kernels.backends("cpu").values()) == {"reference"}
    on("cpu")
    assert npu_kernels.backends("cpu")["attention"] == "F.scaled_dot_product_attention"
    assert npu_kernels.backends("npu")["attention"] == "npu_fusion_attention, npu_fused_infer_attention_score"


def test_an_unknown_choice_is_refused(on):
    with pytest.raises(KernelError, match="PUNA_KERNELS is 'fast': give \"reference\""):
        on("cpu", variable="fast")
