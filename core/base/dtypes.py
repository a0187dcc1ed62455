"""The dtypes of stored arrays, by name."""

import ml_dtypes
import numpy as np

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
"""What activations are stored in as they are."""
CODE_DTYPES = {"int8": np.dtype(np.int8), "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}
"""What they are stored in when they are quantized."""
ARRAY_DTYPES = DTYPES | CODE_DTYPES | {name: np.dtype(name) for name in ("uint16", "int32")}
"""Of every array of a row: values or codes, scales, and the places of values."""
