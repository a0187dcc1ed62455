"""Runs of random activations, written by the project's own encoder and committed by its own storage: no model."""

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.activation_storage import ActivationStorage
from core.base.dtypes import DTYPES
from core.commit.identity import RunIdentity, StreamIdentity
from core.commit.record import CommitRecord, PartCounts, StoredFile, StoredSite
from core.object_store import LocalStore
from core.samples.windows import StreamPlace, TokenizedSample, Window
from core.shards.encoding import ShardEncoder
from core.shards.formats import FORMATS
from core.shards.window_activations import WindowActivations

VOCAB = 50_000


@dataclass(frozen=True)
class SyntheticRun:
    """What is written.

    Attributes:
      sites: by name, its layers and its width.
      dropped: the share of tokens, chosen by chance, that a selection leaves out; None: there is no selection.
      n_parts: of each window.
    """

    sites: Mapping[str, tuple[tuple[int, ...], int]]
    shard_format: str = "safetensors"
    dtype: str = "bfloat16"
    gzipped: bool = False
    dropped: float | None = None
    n_parts: int = 1
    seed: int = 0

    def identity(self) -> RunIdentity:
        """The identity of such a run."""
        return RunIdentity(
            model={"family": "synthetic", "digest": str(self.seed), "revision": None},
            tokenizer=None,
            prompts={},
            sites=tuple(self.sites),
            layers=tuple(sorted({layer for layers, _ in self.sites.values() for layer in layers})),
            dtype=self.dtype,
            compute_dtype="float32",
            format=self.shard_format,
            compress=self.gzipped,
            shard_bytes=1 << 30,
            max_seq_length=1 << 20,
            overlong="truncate",
            selection=None if self.dropped is None else {"dropped": self.dropped},
            parts=self.n_parts,
        )

    def sample(self, rng: np.random.Generator, sample_idx: int, length: int) -> TokenizedSample:
        """One sample of `length` random tokens."""
        token_ids = rng.integers(0, VOCAB, length).astype(np.int32)
        reasons = None if self.dropped is None else (rng.random(length) < self.dropped).astype(np.uint8)
        labels = {"parity": sample_idx % 2}
        return TokenizedSample(sample_idx, sample_idx, 1, token_ids, length, f"sample {sample_idx}", labels, reasons)


def write_run(
    out: Path,
    run: SyntheticRun,
    windows: Sequence[Sequence[int]],
    *,
    folder: str = "tpu_0",
    machine: tuple[int, int] = (0, 1),
    is_finished: bool = True,
) -> None:
    """Commits windows of samples of the given lengths. machine: sample i of these is number i × n + m of the stream."""
    store = LocalStore(out)
    stream = StreamIdentity({"name": "synthetic"}, machine[0], machine[1], None)
    storage = ActivationStorage(run.identity(), stream, folder, primary=store, spool=store)
    storage.open()
    rng = np.random.default_rng([run.seed, machine[0]])
    first = 0
    for number, lengths in enumerate(windows, 1):
        indices = range(first, first + len(lengths))
        samples = tuple(run.sample(rng, i * machine[1] + machine[0], n) for i, n in zip(indices, lengths, strict=True))
        first += len(lengths)
        is_last = is_finished and number == len(windows)
        window = Window(number, samples, (), None if is_last else StreamPlace(first, first))
        storage.commit(_record(storage, run, window, _store_window(storage, run, window, rng)))
    storage.write_metadata()


def _store_window(
    storage: ActivationStorage, run: SyntheticRun, window: Window, rng: np.random.Generator
) -> tuple[StoredFile, ...]:
    files: list[StoredFile] = []
    with ThreadPoolExecutor(1) as thread:
        encoder = ShardEncoder(FORMATS[run.shard_format], run.gzipped, storage.spool, storage.folder, thread)
        for part, own in enumerate(_cut(window, run.n_parts)):
            arrays = {
                site: _random(rng, len(layers), own.n_rows, width, run) for site, (layers, width) in run.sites.items()
            }
            layers = {site: layers for site, (layers, _) in run.sites.items()}
            number = part if run.n_parts > 1 else None
            encoded = encoder.encode(WindowActivations(own, layers, arrays, list(own.samples), 0, number))
            files += [storage.store(window.index, file) for file in encoded]
    return tuple(files)


def _random(rng: np.random.Generator, n_layers: int, n_rows: int, width: int, run: SyntheticRun) -> np.ndarray:
    """Normal values in the stored dtype, one layer at a time in float32."""
    array = np.empty((n_layers, n_rows, width), DTYPES[run.dtype])
    for layer in array:
        layer[:] = rng.standard_normal((n_rows, width), np.float32)
    return array


def _cut(window: Window, n_parts: int) -> list[Window]:
    bounds = np.linspace(0, len(window.samples), n_parts + 1).astype(int)
    return [
        Window(window.index, window.samples[start:stop], (), None)
        for start, stop in itertools.pairwise(bounds.tolist())
    ]


def _record(
    storage: ActivationStorage, run: SyntheticRun, window: Window, files: tuple[StoredFile, ...]
) -> CommitRecord:
    parts = tuple(_counts(own) for own in _cut(window, run.n_parts)) if run.n_parts > 1 else ()
    n_dropped = window.n_tokens - window.n_stored
    sites = {site: StoredSite(layers, width) for site, (layers, width) in run.sites.items()}
    dropped = {} if run.dropped is None else {"bos": n_dropped}
    hashes = storage.plan_hash, storage.stream_hash
    return CommitRecord.of_window(window, hashes, sites, run.dtype, files, n_dropped=dropped, parts=parts)


def _counts(own: Window) -> PartCounts:
    if not own.samples:
        return PartCounts(None, None, 0, 0)
    first, last = own.samples[0].sample_idx, own.samples[-1].sample_idx
    return PartCounts(first, last, len(own.samples), own.n_stored)
