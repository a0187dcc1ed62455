"""Which rows are exported, in which order: after the filter, deduplicate, shuffle, sample, sort."""

import numpy as np
from jaxtyping import Int64

from core.base.errors import UsageError
from parquet_cache.dataset.row_spool import RowSpool
from parquet_cache.options import PrepareOptions


def order_rows(spool: RowSpool, options: PrepareOptions) -> Int64[np.ndarray, "rows"]:
    """The numbers of the spooled rows, in the order of the output. The same options give the same order.

    Raises UsageError for a sample of more rows than there are.
    """
    rows = spool.first_of_each_text() if options.deduplicate else np.arange(len(spool))
    seed = options.ds_shuffle_seed
    if seed is not None:
        rows = np.random.default_rng(seed).permutation(rows)
    if options.ds_sample is not None:
        rows = _sample(rows, options.ds_sample, is_shuffled=seed is not None)
    if options.sort_ds_by_len:
        lengths = spool.lengths[rows]
        rows = rows[np.argsort(-lengths if options.sort_ds_reversed else lengths, kind="stable")]
    return rows


def _sample(rows: Int64[np.ndarray, "rows"], count: int, *, is_shuffled: bool) -> Int64[np.ndarray, "count"]:
    """Any `count` of the rows, in their order; the first of shuffled rows are any."""
    if count > len(rows):
        raise UsageError(f"--ds_sample {count}: there are {len(rows)} rows after the filter and the deduplication")
    if is_shuffled:
        return rows[:count]
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), count, replace=False))]
