"""The export: rows in, shards out; what is finished is kept."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from absl import logging

from core.base.canonical_json import canonical_json, content_hash
from core.base.errors import RunError
from core.object_store import LocalStore, ObjectStore, open_store
from core.object_store.local import disk_errors
from parquet_cache.arguments_file import arguments_of, read_arguments, require_same, write_arguments
from parquet_cache.batch_size import find_batch_size
from parquet_cache.dataset.row_spool import open_spool
from parquet_cache.dataset.selected_rows import SelectedRows, select_rows
from parquet_cache.device import require_device
from parquet_cache.hidden_states import ModelFacts, StateReader, load_states, model_facts
from parquet_cache.options import DEFAULT_BATCH_SIZE, PrepareOptions
from parquet_cache.parquet.shard_file import ShardSchema
from parquet_cache.shard_writing import ShardExport, shard_name
from qwen2_jax import load_tokenizer

SET_ASIDE = "set_aside.json"
# Texts that a trial of batch sizes is made of.
_TRIED_TEXTS = 64


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


def prepare(options: PrepareOptions) -> PrepareSummary:
    """Writes the hidden states of a dataset's texts as Parquet shards, and goes on where an earlier call stopped.

    Raises UsageError for invalid options or a folder made with others, ModelError for the model, RunError for data,
    disk and storage.
    """
    started = time.monotonic()
    facts = model_facts(options)
    require_device(options.device, facts.engine.name)
    tokenizer = load_tokenizer(options.tokenizer_path or options.model_checkpoint, options.revision)
    store = open_store(options.output_dir)
    with _folder_for(store) as folder, open_spool(folder) as spool:
        rows = select_rows(options, tokenizer, facts.n_pos, spool)
        return _Export(options, facts, store, rows, Path(folder)).finish(started)


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


@dataclass(frozen=True)
class _Export:
    options: PrepareOptions
    facts: ModelFacts
    store: ObjectStore
    rows: SelectedRows
    folder: Path

    def finish(self, started: float) -> PrepareSummary:
        """Writes the shards that are not there."""
        stored = read_arguments(self.store)
        there = {name for name in self.store.list() if name.endswith(".parquet")}
        if stored is None and there:
            raise RunError(f"{self.store.url} has Parquet files but no arguments.json: choose another --output_dir")
        model, batch_size = self._settle(stored)
        parts = self._parts(batch_size)
        missing = {index: part for index, part in enumerate(parts) if shard_name(index) not in there}
        written = 0
        if missing:
            reader = (model or self._load()).with_batch_size(batch_size)
            written = ShardExport(self.store, self.folder, self.rows, self._schema(), reader, batch_size).write(missing)
        counts = {"shards": len(parts), "written": len(missing), "bytes_written": written, "batch_size": batch_size}
        return self._summary(slice(0, parts[-1].stop), started, counts)

    def _summary(self, whole: slice, started: float, counts: dict[str, int]) -> PrepareSummary:
        reader = self.rows.reader
        return PrepareSummary(
            output=self.store.url,
            texts=whole.stop,
            tokens=self.rows.tokens_of(whole),
            filtered=reader.n_filtered,
            set_aside=len(reader.set_aside),
            truncated=reader.n_truncated,
            seconds=round(time.monotonic() - started, 3),
            **counts,
        )

    def _settle(self, stored: dict[str, Any] | None) -> tuple[StateReader | None, int]:
        """The batch size, with the model if it had to be tried. The arguments are stored now, or are those stored."""
        model, batch_size = None, self.options.batch_size or DEFAULT_BATCH_SIZE
        if self.options.auto_find_batch_size and stored is not None:
            batch_size = int(stored["resolved"]["batch_size"])
            logging.info("batch size %d: that of the shards that are there", batch_size)
        elif self.options.auto_find_batch_size:
            model = self._load()
            longest = self.rows.longest(_TRIED_TEXTS)
            batch_size = find_batch_size(model.blocks, self.rows.lengths, longest, self.options.batch_size)
        wanted = arguments_of(self.options, self._resolved(batch_size), self._found())
        if stored is None:
            write_arguments(self.store, wanted)
        else:
            require_same(stored, wanted, self.store.url)
        if self.rows.reader.set_aside:
            self.store.create_bytes(SET_ASIDE, canonical_json([asdict(row) for row in self.rows.reader.set_aside]))
        return model, batch_size

    def _resolved(self, batch_size: int) -> dict[str, Any]:
        return {"batch_size": batch_size, "layers": list(self.facts.layers), "n_pos": self.facts.n_pos}

    def _found(self) -> dict[str, Any]:
        engine, options = self.facts.engine, self.options
        return {
            "backend": engine.name,
            "family": self.facts.shape.family,
            "model_digest": engine.model_digest(options.model_checkpoint, options.revision),
            "dataset_digest": self.rows.spool.digest,
            "rows": len(self.rows),
            "label_types": {label.name: str(label.type) for label in self.rows.reader.label_types.schema},
            "set_aside": content_hash([row.reason for row in self.rows.reader.set_aside]),
        }

    def _load(self) -> StateReader:
        return load_states(self.options, self.facts, int(self.rows.lengths.max()))

    def _schema(self) -> ShardSchema:
        n_layers = len(self.facts.layers) + self.options.with_embedding
        labels = self.rows.reader.label_types.schema
        return ShardSchema(n_layers, self.facts.shape.d_model, self.options.dtype, labels)

    def _parts(self, batch_size: int) -> list[slice]:
        """The rows of each shard."""
        size, count = batch_size * self.options.batches_per_shard, len(self.rows)
        parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        return parts[: self.options.max_shards_created]
