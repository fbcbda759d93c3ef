"""The element types of stored tensors, by torch's names for them."""

from typing import Any

import ml_dtypes
import numpy as np

DType = np.dtype[Any]

ITEM_SIZE = {
    "complex128": 16,
    "complex64": 8,
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of an element, for every type that a file may hold."""

WEIGHT_DTYPES: dict[str, DType] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The types that a model's weights may have."""
