"""The rows that are exported, in the order of the output."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int32, Int64

from core.base.errors import RunError
from parquet_cache.dataset.reading import DatasetReader
from parquet_cache.dataset.row_order import order_rows
from parquet_cache.dataset.row_spool import RowSpool, SpooledRow
from parquet_cache.dataset.source import source_rows
from parquet_cache.options import DEFAULT_BATCH_SIZE, MOST_TEXTS, PrepareOptions


@dataclass(frozen=True)
class SelectedRows:
    """Rows of the spool by their place in the output; `reader` has counted those that are not exported."""

    spool: RowSpool
    order: Int64[np.ndarray, "rows"]
    reader: DatasetReader

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def lengths(self) -> Int32[np.ndarray, "rows"]:
        """Tokens of each row."""
        return self.spool.lengths[self.order]

    def tokens_of(self, part: slice) -> int:
        """The tokens of some of the rows."""
        return int(self.lengths[part].sum(dtype=np.int64))

    def read(self, part: slice) -> list[SpooledRow]:
        """Some of the rows."""
        return [self.spool.read(int(index)) for index in self.order[part]]

    def longest(self, count: int) -> list[Int32[np.ndarray, "_"]]:
        """The token ids of the longest rows, the longest first."""
        places = np.argsort(-self.lengths, kind="stable")[:count]
        return [self.spool.read(int(index)).token_ids for index in self.order[places]]


def select_rows(options: PrepareOptions, tokenizer: Any, n_pos: int, spool: RowSpool) -> SelectedRows:
    """Reads the dataset into the spool and puts it in order.

    Raises UsageError for flags that do not fit the dataset, RunError for data that cannot be read or exported, and
    where no row is left.
    """
    reader = DatasetReader(options, tokenizer, n_pos)
    reader.read(source_rows(options), spool, _most_rows(options))
    rows = SelectedRows(spool, order_rows(spool, options), reader)
    logging.info(
        "%d rows read, %d left out by the filter, %d set aside; %d texts of %d tokens are exported, %d truncated",
        *(reader.n_read, reader.n_filtered, len(reader.set_aside)),
        *(len(rows), rows.tokens_of(slice(None)), reader.n_truncated),
    )
    if not len(rows):
        raise RunError(f"{options.ds_repo}: no row is left to export")
    return rows


def _most_rows(options: PrepareOptions) -> int | None:
    """The rows that are enough, where the first of the source are the first of the output."""
    if not options.keeps_source_order or options.max_shards_created is None:
        return None
    batch_size = MOST_TEXTS if options.auto_find_batch_size else options.batch_size or DEFAULT_BATCH_SIZE
    return options.max_shards_created * options.batches_per_shard * batch_size
