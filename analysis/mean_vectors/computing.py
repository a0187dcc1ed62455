"""A run of `mean`: its batches, then the mean of all of them."""

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from analysis.mean_vectors.filling import FilledBatch, fill
from analysis.mean_vectors.job import MeanJob, prepare
from analysis.mean_vectors.modes import modes_of
from analysis.mean_vectors.moments import VectorMoments
from analysis.mean_vectors.options import MeanOptions
from analysis.mean_vectors.stored.batches import VectorBatch, read_batch, stored_numbers
from analysis.mean_vectors.stored.means import MeanVector, encode_mean
from analysis.mean_vectors.stored.metadata import MeanMetadata
from analysis.mean_vectors.stored.names import METADATA, batch_name, mean_name
from analysis.mean_vectors.texts import expected_count
from core.base.errors import RunError, UsageError
from core.object_store import ObjectStore


@dataclass(frozen=True)
class MeanSummary:
    """The result of a run.

    Attributes:
      texts: of all batches, of which `failed` have no vector and `truncated` were cut; `computed` were run just now.
      norms: of the means, by mode. seconds: wall time, the loading of the model included.
      samples_per_hour: of the computed texts, without loading; None where nothing was left to compute.
    """

    output: str
    texts: int
    vectors: int
    failed: int
    truncated: int
    computed: int
    norms: dict[str, float]
    widths: dict[str, int]
    seconds: float
    samples_per_hour: float | None

    def to_json(self) -> dict[str, Any]:
        """The summary as plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The summary as lines of text."""
        rate = "nothing was left to compute"
        if self.samples_per_hour is not None:
            rate = f"{self.computed} computed, {self.samples_per_hour:.0f} samples/hour"
        notes = f", {self.failed} failed" * bool(self.failed) + f", {self.truncated} truncated" * bool(self.truncated)
        means = [
            f"mean_vector_{mode}: {width} values, norm {self.norms[mode]:.6g}" for mode, width in self.widths.items()
        ]
        return [f"{self.vectors} vectors of {self.texts} texts{notes} in {self.seconds:.1f} s ({rate})", *means]


def compute(options: MeanOptions, *, quiet: bool = False) -> MeanSummary:
    """Stores the batches that are missing, then the means. Raises UsageError, RunError, ModelError.

    quiet: shows no progress.
    """
    start = time.monotonic()
    job = prepare(options)
    batches = _fill_all(job, quiet)
    _check_count(job, batches)
    results = finish(job.store, job.metadata())
    return _summary(job.store.url, batches, results, time.monotonic() - start)


def _summary(output: str, batches: Sequence[FilledBatch], results: dict[str, Any], seconds: float) -> MeanSummary:
    computed = sum(batch.n_texts for batch in batches if batch.is_new)
    computing_s = sum(batch.seconds for batch in batches)
    return MeanSummary(
        output=output,
        texts=results["texts"],
        vectors=results["vectors"],
        failed=len(results["failed"]),
        truncated=results["truncated"],
        computed=computed,
        norms={mode: mean["norm"] for mode, mean in results["means"].items()},
        widths={mode: mean["width"] for mode, mean in results["means"].items()},
        seconds=round(seconds, 3),
        samples_per_hour=round(computed / computing_s * 3600, 1) if computed else None,
    )


def _fill_all(job: MeanJob, quiet: bool) -> list[FilledBatch]:
    batches: list[FilledBatch] = []
    failed = 0
    with _progress(None if quiet else expected_count(job.options), quiet) as bar:
        for batch in fill(job):
            batches.append(batch)
            failed += len(batch.failed)
            bar.update(batch.n_texts)
            _check_failures(failed, batch, job.options)
    return batches


def finish(store: ObjectStore, metadata: MeanMetadata) -> dict[str, Any]:
    """Writes the mean of every mode from the stored batches, and the metadata; returns the latter's results."""
    facts: dict[str, Any] = {}
    modes = modes_of(metadata.identity["mode"])
    for mode in modes:
        mean = merge_mean(store, metadata, mode)
        data = encode_mean(mean)
        facts[mode] = {
            "file": mean_name(mode),
            "sha256": hashlib.sha256(data).hexdigest(),
            "count": mean.count,
            "width": len(mean.mean),
            "norm": mean.norm,
        }
    results = _counts(store, modes[0]) | {"means": facts}
    store.replace_bytes(METADATA, replace(metadata, results=results).encode())
    return results


def merge_mean(store: ObjectStore, metadata: MeanMetadata, mode: str) -> MeanVector:
    """The mean of all stored batches of a mode, in their order; also written. One batch is in memory at a time.

    Raises RunError where a batch is missing or damaged, or no text has a vector.
    """
    moments: VectorMoments | None = None
    for batch in _batches(store, mode):
        one = VectorMoments.of(batch.vectors)
        moments = one if moments is None else moments.merged(one)
    if moments is None or not moments.count:
        raise RunError(f"{store.url}: no text has a vector, so there is no mean")
    norm = np.linalg.norm(moments.mean)
    mean = MeanVector(
        mean=moments.mean.astype(np.float32),
        normalized=(moments.mean / (norm or 1.0)).astype(np.float32),
        standard_error=moments.standard_error().astype(np.float32),
        count=moments.count,
        mode=mode,
        layers=tuple(metadata.identity["layers"]),
        model_digest=metadata.identity["model"]["digest"],
    )
    store.replace_bytes(mean_name(mode), encode_mean(mean))
    return mean


def _batches(store: ObjectStore, mode: str) -> Iterator[VectorBatch]:
    for place, number in enumerate(stored_numbers(store, mode)):
        batch = read_batch(store, mode, place) if number == place else None
        if batch is None:
            raise RunError(f"{store.url}/{batch_name(mode, place)} is missing: run `mean` again")
        yield batch


def _counts(store: ObjectStore, mode: str) -> dict[str, Any]:
    """Of one mode: the texts of all modes are the same."""
    counts: dict[str, Any] = {"batches": 0, "texts": 0, "vectors": 0, "truncated": 0, "failed": []}
    for batch in _batches(store, mode):
        counts["batches"] += 1
        counts["texts"] += batch.n_texts
        counts["vectors"] += len(batch.vectors)
        counts["truncated"] += len(batch.truncated)
        counts["failed"] += [one.to_json() for one in batch.failed]
    return counts


def _check_failures(failed: int, batch: FilledBatch, options: MeanOptions) -> None:
    if options.max_failed is not None and failed > options.max_failed:
        last = next(iter(batch.failed))
        more = f"one is sample {last.text.sample_idx}: {last.reason}"
        raise RunError(f"{failed} texts have failed, more than --max_failed {options.max_failed}; {more}")


def _check_count(job: MeanJob, batches: Sequence[FilledBatch]) -> None:
    """Raises UsageError where the folder holds more than this run; says so where there are fewer texts than wanted."""
    wanted, n_texts = job.options.num_samples, sum(batch.n_texts for batch in batches)
    if not batches:
        raise UsageError(f"{', '.join(job.options.data)}: there are no texts")
    if wanted is not None and n_texts < wanted:
        logging.warning("there are %d texts, fewer than --num_samples %d", n_texts, wanted)
    for mode in job.modes:
        stored = stored_numbers(job.store, mode)
        if stored and stored[-1] >= len(batches):
            reason = f"it holds {len(stored)} batches of {mode}, and this run has {len(batches)}"
            raise UsageError(f"{job.store.url}: {reason}: use the same data, another --output, or --overwrite")


def _progress(total: int | None, quiet: bool) -> tqdm:
    """Samples, rate and time left, on stderr; where that is no terminal, a line every ten seconds at most."""
    is_terminal = sys.stderr.isatty()
    return tqdm(total=total, unit=" samples", disable=quiet, mininterval=0.5 if is_terminal else 10.0)
