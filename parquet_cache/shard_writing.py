"""The shards of an export: batches of rows through the model, into files that appear whole or not at all."""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from core.base.errors import RunError
from core.object_store import LocalStore, ObjectStore
from core.object_store.base import Created, file_info
from core.object_store.local import disk_errors
from core.run.progress import format_bytes
from parquet_cache.dataset.row_spool import SpooledRow
from parquet_cache.dataset.selected_rows import SelectedRows
from parquet_cache.hidden_states import StateReader
from parquet_cache.parquet.shard_file import ShardSchema, ShardWriter
from parquet_cache.parquet.state_pages import State


def shard_name(index: int) -> str:
    """Shards are numbered from 0."""
    return f"activations_shard_{index}.parquet"


@dataclass(frozen=True)
class ShardExport:
    """Writes shards.

    Attributes:
      folder: for files that are not finished, where the store is not on a disk.
    """

    store: ObjectStore
    folder: Path
    rows: SelectedRows
    schema: ShardSchema
    model: StateReader
    batch_size: int

    def write(self, parts: Mapping[int, slice]) -> int:
        """Writes the shards of these numbers, each with these rows, and returns their bytes.

        Raises RunError where they do not fit on the disk, and for values that are not finite or do not fit the dtype.
        """
        total = sum(self.rows.tokens_of(part) for part in parts.values())
        self._check_disk(total)
        started, done, written = time.monotonic(), 0, 0
        with tqdm(total=total, unit="tok", unit_scale=True, disable=None) as bar:
            for index, part in parts.items():
                size = self._write_shard(shard_name(index), part, bar)
                done, written = done + self.rows.tokens_of(part), written + size
                seconds = time.monotonic() - started
                logging.info(
                    "%s: %d texts, %s; so far %.0f tokens/s, %s/s; %s left",
                    *(shard_name(index), part.stop - part.start, format_bytes(size), done / seconds),
                    *(format_bytes(int(written / seconds)), tqdm.format_interval(seconds / done * (total - done))),
                )
        return written

    def _check_disk(self, tokens: int) -> None:
        """Hidden states are not compressed, so what they need is known."""
        values = tokens * self.schema.n_layers * self.schema.d_model
        needed, free = values * np.dtype(self.schema.dtype).itemsize, self.store.free_bytes()
        logging.info("%s of hidden states will be written", format_bytes(needed))
        if free is not None and needed > free:
            more = "choose another disk, fewer --layers or --max_shards_created"
            raise RunError(f"{self.store.url} has {format_bytes(free)} free of {format_bytes(needed)} needed: {more}")

    def _write_shard(self, name: str, part: slice, bar: "tqdm[Any]") -> int:
        """Under a temporary name, then create-only. Returns the bytes of the file."""
        store = self.store
        path = store.temporary_path(name) if isinstance(store, LocalStore) else self.folder / name
        try:
            with disk_errors(path):
                with open(path, "wb", buffering=1 << 20) as file:
                    writer = ShardWriter(file, self.schema)
                    self._write_batches(writer, part, bar)
                    size = writer.finish()
            if store.create_file(name, path, file_info(path)) is Created.ALREADY_DIFFERENT:
                raise RunError(f"{store.url}/{name}: another process has written other bytes there")
        finally:
            path.unlink(missing_ok=True)
        return size

    def _write_batches(self, writer: ShardWriter, part: slice, bar: "tqdm[Any]") -> None:
        """Computes a batch while the one before it is written."""
        writing: Future[None] | None = None
        with ThreadPoolExecutor(1, "write") as thread:
            for start in range(part.start, part.stop, self.batch_size):
                rows = self.rows.read(slice(start, min(start + self.batch_size, part.stop)))
                states = self.model([row.token_ids for row in rows], [row.where for row in rows])
                if writing is not None:
                    writing.result()
                writing = thread.submit(_add_all, writer, rows, states)
                bar.update(sum(len(row.token_ids) for row in rows))
            if writing is not None:
                writing.result()


def _add_all(writer: ShardWriter, rows: list[SpooledRow], states: list[list[State]]) -> None:
    for row, layers in zip(rows, states, strict=True):
        writer.add(layers, row.token_ids, row.labels)
