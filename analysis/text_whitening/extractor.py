"""Whitened activations of a dataset of texts, in two passes over it and in bounded memory.

Axis letters: N texts of a chunk, T tokens of a row, padding included (`seq_len`), D width of a token, K width of a
whitened one.
"""

import errno
import hashlib
import resource
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from analysis.text_whitening.chunk_files import ChunkFile, ChunkRecord, store_chunk, stored_record
from analysis.text_whitening.dataset import DatasetCreator, WhitenedDataset
from analysis.text_whitening.padded_batches import PaddedBatch, padded_batches
from analysis.text_whitening.settings import TextSettings, claim_folder
from analysis.text_whitening.statistics_state import StatisticsState, load_state, save_state
from analysis.text_whitening.summary import METADATA_FILE, WHITENING_FILE, StoredTexts, metadata_of
from analysis.text_whitening.text_chunks import TextChunk, text_chunks
from analysis.whitening.incremental import IncrementalWhitener
from analysis.whitening.settings import WhiteningSettings
from analysis.whitening.stored_whitening import save_whitening
from analysis.whitening.whitening import Whitening
from core.base.canonical_json import canonical_json
from core.base.errors import RunError, UsageError
from core.in_memory.capturer import load_capturer
from core.object_store import open_store
from core.run.progress import format_bytes

DEFAULT_LAYER = 12


class ChunkedActivationExtractor:
    """Whitens the activations of texts: `compute_whitening_statistics`, then `process_and_store_whitened`.

    Both go through the dataset in chunks and go on after the last whole one when they are called again. The output
    folder belongs to one model, layer and shape of chunks; with others it is refused.

    Attributes:
      settings: what decides the stored values.
      capturer: the loaded model.
    """

    def __init__(
        self,
        model_name: str,
        output_dir: str = "./processed_activations",
        chunk_size: int = 1000,
        exclude_tokens: Sequence[str] = ("bos", "pad"),
        *,
        layer: int = DEFAULT_LAYER,
        site: str = "residual",
        seq_len: int = 128,
        dtype: str = "float16",
        whitening: WhiteningSettings | None = None,
        text_column: str = "text",
        max_samples: int | None = None,
        tokenizer: Any = None,
        revision: str | None = None,
        backend: str = "auto",
        compute_dtype: str = "auto",
        batch_size: int = 4,
        trust_remote_code: bool = False,
        quiet: bool = False,
    ) -> None:
        """Loads the model.

        Args:
          model_name: a Hugging Face folder, hub id or .gguf file. output_dir: local or in a bucket.
          chunk_size: texts of a chunk: what is lost at most by an interruption.
          exclude_tokens: `bos`, `pad`, `first`: tokens that neither enter the statistics nor are stored.
          layer, site: see docs/sites.md. seq_len: longer texts are cut, shorter ones padded on the right.
          dtype: of the whitened values, float16 or float32. whitening: method, shrinkage and so on.
          text_column: of rows that are no plain texts. max_samples: at most so many texts, the first ones.
          tokenizer, revision, backend, compute_dtype, batch_size, trust_remote_code: as of `capture`.

        Raises UsageError for arguments and for a folder of other settings, ModelError for the model.
        """
        self.capturer = load_capturer(
            model_name,
            layers=layer,
            sites=site,
            tokenizer=tokenizer,
            revision=revision,
            backend=backend,
            compute_dtype=compute_dtype,
            max_seq_length=seq_len,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
        )
        ((self._site, (self._layer, *_)),) = self.capturer.layers.items()
        self.settings = TextSettings(
            model=str(model_name),
            model_digest=self.capturer.engine.model_digest(self.capturer.name, revision),
            layer=self._layer,
            site=self._site,
            seq_len=seq_len,
            chunk_size=chunk_size,
            exclude=tuple(exclude_tokens),
            dtype=dtype,
            compute_dtype=self.capturer.request.compute_dtype,
        )
        self._whitening_settings = whitening
        self._text_column, self._max_samples, self._quiet = text_column, max_samples, quiet
        self._store = open_store(str(output_dir))
        claim_folder(self._store, self.settings)

    def compute_whitening_statistics(self, dataset: Any) -> Whitening:
        """The first pass: the whitening of all tokens that count, also written to `whitening.safetensors`.

        dataset: texts, rows with a text under `text_column` (a `datasets.Dataset`, streaming or not), or a path.
        Raises UsageError for a row without a text, RunError if the texts are others than those of an earlier call.
        """
        state, whitener = load_state(self._store, self._new_whitener())
        chunks, digest = 0, ""
        for chunk in self._chunks(dataset, "statistics"):
            chunks, digest = chunk.number + 1, chunk.digest
            if chunks == state.chunks and digest != state.texts:
                raise RunError(f"{self._store.url}: its statistics are of other texts: use another output_dir")
            if chunks <= state.chunks:
                continue
            if state.is_complete:
                raise RunError(f"{self._store.url}: its statistics are of fewer texts: use another output_dir")
            for batch in self._batches(chunk):
                whitener.update(batch.activations, batch.attention_mask, batch.token_ids)
            save_state(self._store, StatisticsState(chunks, digest), whitener)
        if not chunks:
            raise UsageError("the dataset has no texts")
        if chunks < state.chunks:
            raise RunError(f"{self._store.url}: its statistics are of more texts: use another output_dir")
        if not state.is_complete:
            save_state(self._store, StatisticsState(chunks, digest, is_complete=True), whitener)
        found = whitener.finalize()
        save_whitening(found, f"{self._store.url}/{WHITENING_FILE}")
        return found

    def process_and_store_whitened(
        self, dataset: Any, whitening_params: Whitening, compression: bool = True
    ) -> StoredTexts:
        """The second pass: whitens every chunk and stores it as `chunks/chunk_0000.npz`; `metadata.json` at the end.

        whitening_params: from the first pass, or any other of this width. compression: of the files, by deflate.
        Chunks that are stored already are checked against their checksums and kept. Raises RunError for a full disk,
        for values that do not fit the dtype, and if a stored chunk is of other texts or another whitening.
        """
        self._check_width(whitening_params)
        digest = whitening_digest(whitening_params)
        records: list[ChunkRecord] = []
        for chunk in self._chunks(dataset, "whitening"):
            record = stored_record(self._store, chunk.number)
            if record is None:
                self._require_room(len(chunk.texts) * self._row_bytes(whitening_params.kept))
                content = self._whitened(chunk, whitening_params)
                record = store_chunk(self._store, content, chunk.number, chunk.digest, digest, compression=compression)
            elif (record.texts, record.whitening) != (chunk.digest, digest):
                what = "texts" if record.texts != chunk.digest else "another whitening"
                raise RunError(f"{self._store.url}/{record.name}: it is of other {what}: use another output_dir")
            records.append(record)
        if not records:
            raise UsageError("the dataset has no texts")
        save_whitening(whitening_params, f"{self._store.url}/{WHITENING_FILE}")
        metadata = metadata_of(self.settings, whitening_params, records)
        self._store.replace_bytes(METADATA_FILE, canonical_json(metadata))
        return StoredTexts.of(self._store.url, records, self._row_bytes(whitening_params.kept))

    def to_huggingface_dataset(self) -> WhitenedDataset:
        """The stored chunks as one memory-mapped dataset: see `DatasetCreator`."""
        return DatasetCreator(self._store.url).create()

    def _new_whitener(self) -> IncrementalWhitener:
        tokenizer, exclude = self.capturer.tokenizer, self.settings.exclude
        bos = tokenizer.bos_token_id
        return IncrementalWhitener(self._whitening_settings, exclude=exclude, bos_token_id=bos)

    def _chunks(self, dataset: Any, stage: str) -> Iterator[TextChunk]:
        """The chunks, counted by a bar with the time left and the most memory that this process took."""
        total = min(len(dataset), self._max_samples or len(dataset)) if hasattr(dataset, "__len__") else None
        total = None if isinstance(dataset, str) else total
        found = text_chunks(dataset, self.settings.chunk_size, self._text_column, self._max_samples)
        with tqdm(total=total, desc=stage, unit="text", disable=self._quiet) as bar:
            for chunk in found:
                yield chunk
                most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                bar.set_postfix_str(f"chunk {chunk.number}, peak memory {format_bytes(most)}", refresh=False)
                bar.update(len(chunk.texts))

    def _batches(self, chunk: TextChunk) -> Iterator[PaddedBatch]:
        try:
            yield from padded_batches(self.capturer, self._site, self._layer, chunk.texts, self.settings.seq_len)
        except (RunError, UsageError) as error:
            raise type(error)(f"texts from {chunk.first} on: {error}") from error

    def _whitened(self, chunk: TextChunk, whitening: Whitening) -> ChunkFile:
        shape = len(chunk.texts), self.settings.seq_len
        values = np.zeros((*shape, whitening.kept), self.settings.dtype)
        counts, token_ids = np.zeros(shape, bool), np.empty(shape, np.int32)
        rule = self._new_whitener().filter
        for batch in self._batches(chunk):
            rows = slice(batch.first, batch.first + len(batch.token_ids))
            counts[rows] = rule.counted(batch.token_ids.shape, batch.attention_mask, batch.token_ids)
            token_ids[rows] = batch.token_ids
            # A value beyond float16 becomes infinite, which `check` reports.
            with np.errstate(over="ignore"):
                values[rows][counts[rows]] = whitening.apply(batch.activations[counts[rows]])
        return ChunkFile(values, counts, token_ids, np.arange(chunk.first, chunk.first + shape[0]))

    def _row_bytes(self, kept: int) -> int:
        """Bytes of a text's whitened values."""
        return self.settings.seq_len * kept * np.dtype(self.settings.dtype).itemsize

    def _check_width(self, whitening: Whitening) -> None:
        width = self.capturer.shape.site_widths[self._site]
        if whitening.width != width:
            raise UsageError(f"whitening of rows {whitening.width} wide: {self._site} is {width} wide")

    def _require_room(self, n_bytes: int) -> None:
        free = self._store.free_bytes()
        if free is not None and free < n_bytes:
            raise RunError(
                f"{self._store.url}: the next chunk takes up to {format_bytes(n_bytes)}, {format_bytes(free)} are "
                "free: make room and call again, what is stored is kept"
            ) from OSError(errno.ENOSPC, "disk full")


def whitening_digest(whitening: Whitening) -> str:
    """sha256 of what `apply` computes with."""
    return hashlib.sha256(whitening.mean.tobytes() + np.ascontiguousarray(whitening.transform).tobytes()).hexdigest()
