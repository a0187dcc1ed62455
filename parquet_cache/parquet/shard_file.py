"""One Parquet file: pyarrow writes the schema and the labels, and our pages take the place of its empty hidden states.

The file is the pages of the hidden states of all row groups, as they come; then the pages of the other columns; then
pyarrow's footer, with the places of all pages set right. https://parquet.apache.org/docs/file-format/metadata/
"""

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int32
from pyarrow import parquet

from core.base.errors import RunError
from core.object_store.sinks import Sink
from parquet_cache.parquet import thrift_compact as thrift
from parquet_cache.parquet.state_pages import PLAIN, RLE, State, n_values, state_pages
from parquet_cache.parquet.thrift_compact import Field, Struct

STATES, TOKENS = "hidden_states", "input_ids"
_MAGIC = b"PAR1"
_UNCOMPRESSED = 0
_ROW_GROUP_BYTES = 64 << 20
# Fields of the structs of parquet.thrift.
_ROW_GROUPS, _COLUMNS, _GROUP_BYTES, _GROUP_START, _GROUP_STORED = 4, 1, 2, 5, 6
_CHUNK_START, _CHUNK_META = 2, 3
_ENCODINGS, _CODEC, _N_VALUES, _BYTES, _STORED, _DATA_START, _DICTIONARY_START = 2, 4, 5, 6, 7, 9, 11
_KEPT_OF_STATES = (1, 2, 3, 4)  # type, encodings, path, codec; what follows describes pyarrow's pages


@dataclass(frozen=True)
class ShardSchema:
    """The columns of a shard.

    Attributes:
      dtype: "float16" or "float32". labels: the label columns.
    """

    n_layers: int
    d_model: int
    dtype: str
    labels: pa.Schema

    @property
    def arrow(self) -> pa.Schema:
        """`hidden_states` as lists of L lists of T lists of D values, `input_ids`, then the labels."""
        value = pa.from_numpy_dtype(np.dtype(self.dtype))
        states = pa.list_(pa.list_(pa.list_(value, self.d_model)), self.n_layers)
        return pa.schema([pa.field(STATES, states), pa.field(TOKENS, pa.list_(pa.int32())), *self.labels])


@dataclass
class _RowGroup:
    start: int
    bytes: int = 0
    n_values: int = 0
    token_ids: list[Int32[np.ndarray, "T"]] = field(default_factory=list)
    labels: list[tuple[Any, ...]] = field(default_factory=list)


class ShardWriter:
    """Writes the rows of one shard to a sink; holds no hidden states.

    A row group ends with the row that brings its hidden states to 64 MiB, so what is written depends on the rows alone.
    """

    def __init__(self, sink: Sink, schema: ShardSchema) -> None:
        self._sink = sink
        self._schema = schema
        self._written = 0
        self._groups: list[_RowGroup] = []
        self._write(_MAGIC)

    def add(self, layers: Sequence[State], token_ids: Int32[np.ndarray, "T"], labels: tuple[Any, ...]) -> None:
        """Adds a row. layers: of each layer a (T, D) array of the schema's dtype."""
        if not self._groups or self._groups[-1].bytes >= _ROW_GROUP_BYTES:
            self._groups.append(_RowGroup(self._written))
        group = self._groups[-1]
        for page in state_pages([np.ascontiguousarray(layer) for layer in layers]):
            for piece in page:
                self._write(piece)
        group.bytes = self._written - group.start
        group.n_values += n_values(layers)
        group.token_ids.append(token_ids)
        group.labels.append(labels)

    def finish(self) -> int:
        """Writes labels and footer, and returns the file's bytes. Raises RunError for a label of another type."""
        template = self._template()
        footer = _footer(template)
        for group, described in zip(self._groups, footer[_ROW_GROUPS].value.members, strict=True):
            self._finish_group(group, described, template)
        data = thrift.encode_struct(footer)
        self._write(data + struct.pack("<I", len(data)) + _MAGIC)
        return self._written

    def _write(self, data: bytes | memoryview) -> None:
        self._sink.write(data)
        self._written += len(data)

    def _template(self) -> bytes:
        """The file as pyarrow writes it, with nulls for the hidden states."""
        schema, out = self._schema.arrow, io.BytesIO()
        with parquet.ParquetWriter(out, schema, compression="zstd") as writer:
            for group in self._groups:
                states, tokens = schema.field(0).type, schema.field(1).type
                columns = [pa.nulls(len(group.labels), states), pa.array(group.token_ids, tokens)]
                for place, label in enumerate(self._schema.labels):
                    columns.append(_label_array([row[place] for row in group.labels], label))
                writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(group.labels))
        return out.getvalue()

    def _finish_group(self, group: _RowGroup, described: Struct, template: bytes) -> None:
        """Writes the other columns of a row group, and sets right what the footer says of all of them."""
        states, *others = described[_COLUMNS].value.members
        _describe_states(states, group)
        described[_GROUP_BYTES] = Field(thrift.I64, group.bytes)
        for chunk in others:
            self._copy_chunk(chunk, template)
            described[_GROUP_BYTES] = _sum(described[_GROUP_BYTES], chunk[_CHUNK_META].value[_BYTES])
        described[_GROUP_START] = Field(thrift.I64, group.start)
        stored = sum(chunk[_CHUNK_META].value[_STORED].value for chunk in (states, *others))
        described[_GROUP_STORED] = Field(thrift.I64, stored)

    def _copy_chunk(self, chunk: Struct, template: bytes) -> None:
        meta = chunk[_CHUNK_META].value
        starts = [meta[key].value for key in (_DATA_START, _DICTIONARY_START) if key in meta]
        moved = self._written - min(starts)
        for key in (_DATA_START, _DICTIONARY_START):
            if key in meta:
                meta[key] = Field(thrift.I64, meta[key].value + moved)
        self._write(template[min(starts) : min(starts) + meta[_STORED].value])


def _label_array(values: list[Any], label: pa.Field) -> pa.Array:
    try:
        return pa.array(values, label.type)
    except pa.ArrowException as error:
        raise RunError(f"--ds_label_columns {label.name}: {error}") from None


def _footer(template: bytes) -> Struct:
    (size,) = struct.unpack("<I", template[-8:-4])
    return thrift.decode_struct(template[-8 - size : -8])


def _describe_states(chunk: Struct, group: _RowGroup) -> None:
    """Our pages in place of pyarrow's."""
    meta: Struct = chunk[_CHUNK_META].value
    for number in [number for number in meta if number not in _KEPT_OF_STATES]:
        del meta[number]
    meta[_ENCODINGS] = Field(thrift.LIST, thrift.ThriftList(thrift.I32, [PLAIN, RLE]))
    meta[_CODEC] = Field(thrift.I32, _UNCOMPRESSED)
    meta[_N_VALUES] = Field(thrift.I64, group.n_values)
    meta[_BYTES] = meta[_STORED] = Field(thrift.I64, group.bytes)
    meta[_DATA_START] = Field(thrift.I64, group.start)


def _sum(one: Field, other: Field) -> Field:
    return Field(thrift.I64, one.value + other.value)
