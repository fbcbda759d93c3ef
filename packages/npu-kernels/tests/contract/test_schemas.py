"""The locked schemas are the wheel's own."""

import pytest
import torch
from npu_kernels.ops.ascend_schemas import SCHEMAS


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_lock_is_what_the_wheel_registers(name):
    assert str(getattr(torch.ops.npu, name).default._schema) == f"npu::{SCHEMAS[name]}"
    assert str(torch._C.parse_schema(f"npu::{SCHEMAS[name]}")) == f"npu::{SCHEMAS[name]}", "the lock parses"


def test_another_schema_would_be_noticed():
    changed = SCHEMAS["npu_fusion_attention"].replace("pre_tockens", "pre_tokens")
    assert str(torch.ops.npu.npu_fusion_attention.default._schema) != f"npu::{changed}"
