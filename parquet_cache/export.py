"""The export: rows in, shards out; what is finished is kept."""

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int32, Int64
from tqdm import tqdm

from core.base.canonical_json import canonical_json, content_hash
from core.base.errors import RunError
from core.object_store import LocalStore, ObjectStore, open_store
from core.object_store.base import Created, file_info
from core.object_store.local import disk_errors
from parquet_cache.arguments_file import arguments_of, read_arguments, require_same, write_arguments
from parquet_cache.batch_size import find_batch_size
from parquet_cache.dataset.reading import RowReader
from parquet_cache.dataset.row_order import order_rows
from parquet_cache.dataset.row_spool import RowSpool, SpooledRow, open_spool
from parquet_cache.dataset.source import source_rows
from parquet_cache.device import require_device
from parquet_cache.hidden_states import ModelFacts, StateReader, load_states, model_facts
from parquet_cache.options import DEFAULT_BATCH_SIZE, PrepareOptions
from parquet_cache.parquet.shard_file import ShardSchema, ShardWriter
from parquet_cache.parquet.state_pages import State
from qwen2_jax import load_tokenizer

SET_ASIDE = "set_aside.json"


@dataclass(frozen=True)
class PrepareSummary:
    """What an export has made.

    Attributes:
      texts, tokens: in all shards. written: shards of this call; the others were there.
      filtered, set_aside, truncated: rows that the filter left out, rows without a text, texts cut to `n_pos`.
    """

    output: str
    shards: int
    written: int
    texts: int
    tokens: int
    bytes_written: int
    filtered: int
    set_aside: int
    truncated: int
    batch_size: int
    seconds: float


@dataclass(frozen=True)
class Rows:
    """The rows that are exported: `order` are their numbers in the spool, in the order of the output."""

    spool: RowSpool
    order: Int64[np.ndarray, "rows"]
    reader: RowReader

    @cached_property
    def lengths(self) -> Int32[np.ndarray, "rows"]:
        """Tokens of each row, in the order of the output."""
        return self.spool.lengths[self.order]

    def tokens_of(self, part: slice) -> int:
        """The tokens of some of the rows."""
        return int(self.lengths[part].sum(dtype=np.int64))


def shard_name(index: int) -> str:
    """Shards are numbered from 0."""
    return f"activations_shard_{index}.parquet"


def prepare(options: PrepareOptions) -> PrepareSummary:
    """Writes the hidden states of a dataset's texts as Parquet shards, and goes on where an earlier call stopped.

    Raises UsageError for invalid options or a folder made with others, ModelError for the model, RunError for data,
    disk and storage.
    """
    started = time.monotonic()
    facts = model_facts(options)
    require_device(options.device, facts.engine.name)
    store = open_store(options.output_dir)
    with _folder_for(store) as folder, open_spool(folder) as spool:
        rows = _read_rows(options, facts, spool)
        run = _Export(options, facts, store, rows, Path(folder))
        return run.finish(started)


@contextmanager
def _folder_for(store: ObjectStore) -> Iterator[str]:
    """Where temporary files lie: on the disk of the output, else in the folder for temporary files."""
    if isinstance(store, LocalStore):
        with disk_errors(store.root):
            store.root.mkdir(parents=True, exist_ok=True)
        store.remove_stale_temporaries()
        yield str(store.root)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def _read_rows(options: PrepareOptions, facts: ModelFacts, spool: RowSpool) -> Rows:
    tokenizer = load_tokenizer(options.tokenizer_path or options.model_checkpoint, options.revision)
    reader = RowReader(options, tokenizer, facts.n_pos)
    # With an automatic batch size the number of rows is not known yet.
    limit = None
    if options.keeps_source_order and options.max_shards_created and not options.auto_find_batch_size:
        limit = options.max_shards_created * options.batches_per_shard * (options.batch_size or DEFAULT_BATCH_SIZE)
    reader.read(source_rows(options), spool, limit)
    rows = Rows(spool, order_rows(spool, options), reader)
    logging.info(
        "%d rows read, %d left out by the filter, %d set aside; %d texts of %d tokens are exported, %d truncated",
        *(reader.n_read, reader.n_filtered, len(reader.set_aside)),
        *(len(rows.order), rows.tokens_of(slice(None)), reader.n_truncated),
    )
    if not len(rows.order):
        raise RunError(f"{options.ds_repo}: no row is left to export")
    return rows


@dataclass(frozen=True)
class _Export:
    _options: PrepareOptions
    _facts: ModelFacts
    _store: ObjectStore
    _rows: Rows
    _folder: Path

    def finish(self, started: float) -> PrepareSummary:
        """Writes the shards that are not there."""
        stored = read_arguments(self._store)
        shards = {name for name in self._store.list() if name.endswith(".parquet")}
        if stored is None and shards:
            raise RunError(f"{self._store.url} has Parquet files but no arguments.json: choose another --output_dir")
        model, batch_size = self._settle(stored)
        parts = self._parts(batch_size)
        missing = {index: part for index, part in enumerate(parts) if shard_name(index) not in shards}
        if missing and model is None:
            model = self._load()
        written = self._write_shards(missing, model, batch_size) if missing and model is not None else 0
        whole = slice(0, parts[-1].stop)
        reader = self._rows.reader
        return PrepareSummary(
            output=self._store.url,
            shards=len(parts),
            written=len(missing),
            texts=whole.stop,
            tokens=self._rows.tokens_of(whole),
            bytes_written=written,
            filtered=reader.n_filtered,
            set_aside=len(reader.set_aside),
            truncated=reader.n_truncated,
            batch_size=batch_size,
            seconds=round(time.monotonic() - started, 3),
        )

    def _settle(self, stored: dict[str, Any] | None) -> tuple[StateReader | None, int]:
        """The batch size, with the model if it had to be tried; the arguments are stored, or are those stored."""
        model, batch_size = None, self._options.batch_size or DEFAULT_BATCH_SIZE
        if self._options.auto_find_batch_size:
            if stored is not None:
                batch_size = int(stored["resolved"]["batch_size"])
                logging.info("batch size %d: that of the shards that are there", batch_size)
            else:
                model = self._load()
                batch_size = self._found(model)
        wanted = arguments_of(self._options, self._resolved(batch_size), self._found_facts())
        if stored is None:
            write_arguments(self._store, wanted)
        else:
            require_same(stored, wanted, self._store.url)
        if self._rows.reader.set_aside:
            rows = [asdict(row) for row in self._rows.reader.set_aside]
            self._store.create_bytes(SET_ASIDE, canonical_json(rows))
        return model, batch_size

    def _resolved(self, batch_size: int) -> dict[str, Any]:
        return {"batch_size": batch_size, "layers": list(self._facts.layers), "n_pos": self._facts.n_pos}

    def _found_facts(self) -> dict[str, Any]:
        engine, options = self._facts.engine, self._options
        labels = self._rows.reader.label_types.schema
        return {
            "backend": engine.name,
            "family": self._facts.shape.family,
            "model_digest": engine.model_digest(options.model_checkpoint, options.revision),
            "dataset_digest": self._rows.spool.digest,
            "rows": len(self._rows.order),
            "label_types": {field.name: str(field.type) for field in labels},
            "set_aside": content_hash([asdict(row) for row in self._rows.reader.set_aside]),
        }

    def _load(self) -> StateReader:
        return load_states(self._options, self._facts, int(self._rows.lengths.max()))

    def _found(self, model: StateReader) -> int:
        lengths = self._rows.lengths
        longest = self._rows.order[np.argsort(-lengths, kind="stable")[:64]]
        texts = [self._rows.spool.read(int(index)).token_ids for index in longest]
        return find_batch_size(model.blocks, lengths, texts, self._options.batch_size)

    def _parts(self, batch_size: int) -> list[slice]:
        """The rows of each shard."""
        size, count = batch_size * self._options.batches_per_shard, len(self._rows.order)
        most = self._options.max_shards_created
        parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        return parts[:most]

    def _write_shards(self, missing: dict[int, slice], model: StateReader, batch_size: int) -> int:
        """Returns the bytes of all shards that it writes."""
        model = model.with_batch_size(batch_size)
        total = sum(self._rows.tokens_of(part) for part in missing.values())
        written = 0
        with tqdm(total=total, unit="tok", unit_scale=True, disable=None) as bar:
            for index, part in missing.items():
                started = time.monotonic()
                size = self._write_shard(shard_name(index), part, model, batch_size, bar)
                written += size
                tokens, seconds = self._rows.tokens_of(part), time.monotonic() - started
                logging.info(
                    "%s: %d texts, %d tokens, %d bytes in %.1f s (%.0f tokens/s, %.1f MB/s)",
                    *(shard_name(index), part.stop - part.start, tokens, size, seconds),
                    *(tokens / seconds, size / seconds / 1e6),
                )
        return written

    def _write_shard(self, name: str, part: slice, model: StateReader, batch_size: int, bar: "tqdm[Any]") -> int:
        """Under a temporary name, then create-only. Returns the bytes of the file."""
        store = self._store
        path = store.temporary_path(name) if isinstance(store, LocalStore) else self._folder / name
        try:
            with disk_errors(store.root / name if isinstance(store, LocalStore) else path):
                with open(path, "wb", buffering=1 << 20) as file:
                    writer = ShardWriter(file, self._schema)
                    self._write_batches(writer, part, model, batch_size, bar)
                    size = writer.finish()
            if store.create_file(name, path, file_info(path)) is Created.ALREADY_DIFFERENT:
                raise RunError(f"{store.url}/{name}: another process has written other bytes there")
        finally:
            path.unlink(missing_ok=True)
        return size

    def _write_batches(
        self, writer: ShardWriter, part: slice, model: StateReader, batch_size: int, bar: "tqdm[Any]"
    ) -> None:
        """Computes a batch while the one before it is written."""
        with ThreadPoolExecutor(1, "write") as thread:
            writing: Future[None] | None = None
            for start in range(part.start, part.stop, batch_size):
                indices = self._rows.order[start : min(start + batch_size, part.stop)]
                rows = [self._rows.spool.read(int(index)) for index in indices]
                states = model([row.token_ids for row in rows], [row.where for row in rows])
                if writing is not None:
                    writing.result()
                writing = thread.submit(_add_all, writer, rows, states)
                bar.update(sum(len(row.token_ids) for row in rows))
            if writing is not None:
                writing.result()

    @property
    def _schema(self) -> ShardSchema:
        labels = self._rows.reader.label_types.schema
        n_layers = len(self._facts.layers) + self._options.with_embedding
        return ShardSchema(n_layers, self._facts.shape.d_model, self._options.dtype, labels)


def _add_all(writer: ShardWriter, rows: list[SpooledRow], states: list[list[State]]) -> None:
    for row, layers in zip(rows, states, strict=True):
        writer.add(layers, row.token_ids, row.labels)
