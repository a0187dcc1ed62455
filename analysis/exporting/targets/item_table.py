"""Items as rows of an Arrow table, for the targets parquet and arrow."""

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from analysis.exporting.items.part_items import ItemBlock
from analysis.exporting.items.request import ExportRequest
from analysis.exporting.targets.base import FileContent
from core.reading import ShardPart
from core.shards.formats.arrow_columns import ArrayColumn, nested_lists, number_lists, table_schema

_PLAIN = {
    "sample_idx": "int64",
    "token_ids": "[int32]",
    "positions": "[int32]",
    "text_preview": "string",
    "labels": "string",
}


def item_column(request: ExportRequest) -> ArrayColumn:
    """The column of activations."""
    return ArrayColumn(request.hook_name, request.dtype, request.width)


def item_schema(request: ExportRequest) -> Any:
    """A row for each item: its sample, the tokens and their positions in it, previews and labels as JSON, the array."""
    return table_schema([item_column(request)], _PLAIN)


def item_batches(content: FileContent) -> Iterator[Any]:
    """A record batch for each block."""
    import pyarrow

    schema, name = item_schema(content.request), content.request.hook_name
    for block in content.blocks():
        ends = np.cumsum(block.lengths)[:-1]
        columns = described(block)
        columns["token_ids"] = number_lists(np.split(block.token_ids, ends))
        columns["positions"] = number_lists(np.split(block.positions, ends))
        columns[name] = nested_lists(block.values, block.lengths.tolist())
        yield pyarrow.record_batch([columns[field] for field in schema.names], schema=schema)


def described(block: ItemBlock) -> dict[str, Any]:
    """The columns of the sample table."""
    import pyarrow

    table = _table(block.part)
    samples = [table[place] for place in block.samples.tolist()]
    labels = [json.dumps(sample.labels, sort_keys=True, ensure_ascii=False) for sample in samples]
    return {
        "sample_idx": pyarrow.array(block.sample_idx),
        "text_preview": pyarrow.array([sample.text_preview for sample in samples], pyarrow.string()),
        "labels": pyarrow.array(labels, pyarrow.string()),
    }


@lru_cache(maxsize=2)
def _table(part: ShardPart) -> tuple[Any, ...]:
    return part.table()
