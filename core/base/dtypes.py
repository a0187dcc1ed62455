"""The dtypes of stored arrays, by name."""

import ml_dtypes
import numpy as np

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
"""Dtypes of activations that are not quantized."""
CODE_DTYPES = {"int8": np.dtype(np.int8), "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}
"""Dtypes of the codes of quantized activations."""
ARRAY_DTYPES = DTYPES | CODE_DTYPES | {name: np.dtype(name) for name in ("uint16", "int32")}
"""Dtypes of every stored array: values or codes, scales, and indices of values."""
