"""Columns of Arrow tables that hold arrays, named so that Hugging Face datasets loads them as arrays.

A column of arrays is lists of (K, D). It carries the name that datasets gives to its feature Array2D((None, D)), in the
metadata of schema and fields: datasets 3 to 5 load it as arrays, and Arrow alone as nested lists. datasets 3 knows no
feature List, so lists of numbers are called Sequence, which both know.
pyarrow is imported where it is used: other formats start without it.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from core.base.dtypes import ARRAY_DTYPES
from core.base.errors import RunError
from core.reduce.reductions import VALUES

_ARRAY2D = "datasets.features.features.Array2DExtensionType"
_EXTENSION_NAME, _EXTENSION_METADATA = b"ARROW:extension:name", b"ARROW:extension:metadata"
_COLUMN = re.compile(r"[a-z][a-z0-9_]*_layer_(?P<layer>-?[0-9]{1,6})(?:_(?P<array>indices|scale))?")
_NUMBERS = "[int32]"
_MOST_VALUES = (1 << 31) - 1


@dataclass(frozen=True)
class ArrayColumn:
    """A column of arrays: its name, dtype and width of its rows, and how many each array has (None: any number)."""

    name: str
    dtype: str
    width: int
    n_rows: int | None = None

    @classmethod
    def of(cls, field: Any) -> "ArrayColumn":
        """What the field of a schema says. Raises ValueError, KeyError or TypeError if it is no column of arrays."""
        if hasattr(field.type, "shape"):  # datasets is imported, and Arrow gives its own type
            shape, dtype = field.type.shape, field.type.value_type
        else:
            shape, dtype = json.loads(field.metadata[_EXTENSION_METADATA])
        first, width = shape
        if first is not None or dtype not in ARRAY_DTYPES or type(width) is not int or not 0 < width < _MOST_VALUES:
            raise ValueError(f"column {field.name} is {dtype} of shape {shape}")
        return cls(field.name, dtype, width)

    def field(self) -> Any:
        """The field of a schema."""
        import pyarrow

        stored = pyarrow.list_(pyarrow.list_(_arrow_type(self.dtype)))
        described = json.dumps([[self.n_rows, self.width], self.dtype])
        return pyarrow.field(self.name, stored, metadata={_EXTENSION_NAME: _ARRAY2D, _EXTENSION_METADATA: described})

    def feature(self) -> dict[str, Any]:
        """The feature of datasets."""
        return {"shape": [self.n_rows, self.width], "dtype": self.dtype, "_type": "Array2D"}


def column_name(site: str, layer: int, array: str = VALUES) -> str:
    """The column of an array of a layer."""
    return f"{site}_layer_{layer}" if array == VALUES else f"{site}_layer_{layer}_{array}"


def parse_column(name: str) -> tuple[int, str] | None:
    """Layer and array of a column; None for one that holds something else."""
    match = _COLUMN.fullmatch(name)
    return None if match is None else (int(match["layer"]), match["array"] or VALUES)


def table_schema(arrays: Sequence[ArrayColumn], more: dict[str, str]) -> Any:
    """The schema of a table.

    more: further columns, by name their dtype; `[int32]` for lists of int32, `[int32]*4` for lists of 4.
    """
    import pyarrow

    fields = [pyarrow.field(name, _plain_type(dtype)) for name, dtype in more.items()]
    features: dict[str, Any] = {name: _feature(dtype) for name, dtype in more.items()}
    features |= {column.name: column.feature() for column in arrays}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pyarrow.schema([*fields, *(column.field() for column in arrays)], metadata)


def _plain_type(dtype: str) -> Any:
    import pyarrow

    if dtype.startswith(_NUMBERS):
        return pyarrow.list_(pyarrow.int32(), _list_length(dtype))
    return {"int64": pyarrow.int64(), "int32": pyarrow.int32(), "string": pyarrow.string()}[dtype]


def _feature(dtype: str) -> dict[str, Any]:
    if dtype.startswith(_NUMBERS):
        number = {"dtype": "int32", "_type": "Value"}
        return {"feature": number, "length": _list_length(dtype), "_type": "Sequence"}
    return {"dtype": dtype, "_type": "Value"}


def _list_length(dtype: str) -> int:
    """-1 where lists have any length."""
    return int(dtype.removeprefix(_NUMBERS)[1:] or -1)


def number_lists(arrays: Sequence[Int32[np.ndarray, "_"]]) -> Any:
    """A column of lists of numbers."""
    import pyarrow

    joined = np.concatenate([np.empty(0, np.int32), *arrays]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(_offsets([len(array) for array in arrays]), pyarrow.array(joined))


def nested_lists(values: Shaped[np.ndarray, "N W"], lengths: Iterable[int]) -> Any:
    """A column of arrays: the rows of each sample. Raises RunError for more values than Arrow counts in 32 bits."""
    import pyarrow

    if values.size > _MOST_VALUES:
        raise RunError(f"a sample has {values.size} values at one layer, Arrow at most {_MOST_VALUES}: use safetensors")
    flat = np.ascontiguousarray(values).reshape(-1)
    buffers = [None, pyarrow.py_buffer(flat)]
    items = pyarrow.Array.from_buffers(_arrow_type(values.dtype.name), flat.size, buffers)
    ends = np.arange(len(values) + 1, dtype=np.int32) * np.int32(values.shape[1])
    rows = pyarrow.ListArray.from_arrays(pyarrow.array(ends), items)
    return pyarrow.ListArray.from_arrays(_offsets(lengths), rows)


def _offsets(lengths: Iterable[int]) -> Any:
    import pyarrow

    return pyarrow.array(np.cumsum([0, *lengths], dtype=np.int32))


def _arrow_type(dtype: str) -> Any:
    import pyarrow

    return pyarrow.from_numpy_dtype(ARRAY_DTYPES[dtype])


def read_nested(
    column: Any, dtype: np.dtype, width: int
) -> tuple[Shaped[np.ndarray, "N W"], Int64[np.ndarray, "S_plus_1"]]:
    """The rows of a column of arrays of one batch, as a view, and where those of each sample begin.

    Raises ValueError if a row does not have `width` values of `dtype`.
    """
    column = getattr(column, "storage", column)  # datasets is imported: its type wraps the lists
    offsets, rows = column.offsets.to_numpy().astype(np.int64), column.values
    ends = rows.offsets.to_numpy()
    if column.null_count or rows.null_count or rows.values.null_count or (np.diff(ends) != width).any():
        raise ValueError(f"a row has nulls, or not {width} values")
    values = rows.values.to_numpy()
    if values.dtype != dtype:
        raise ValueError(f"its values are {values.dtype}, not {dtype}")
    by_row = values[ends[0] : ends[-1]].reshape(-1, width)
    return by_row[offsets[0] : offsets[-1]], offsets - offsets[0]


def read_numbers(column: Any) -> tuple[Int32[np.ndarray, "N"], Int64[np.ndarray, "S_plus_1"]]:
    """The numbers of a column of lists of int32 of one batch, and where those of each sample begin."""
    offsets, values = column.offsets.to_numpy().astype(np.int64), column.values.to_numpy()
    if column.null_count or column.values.null_count or values.dtype != np.int32:
        raise ValueError("its lists of numbers have nulls, or are not int32")
    return values[offsets[0] : offsets[-1]], offsets - offsets[0]
