"""The batches of a run, each computed once and stored create-only."""

import itertools
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from absl import logging

from analysis.mean_vectors.extraction import TextVectors
from analysis.mean_vectors.job import MeanJob
from analysis.mean_vectors.stored.batches import FailedText, TextId, VectorBatch, encode_batch, read_batch
from analysis.mean_vectors.stored.names import batch_name
from analysis.mean_vectors.texts import SourceText, chosen_texts
from core.base.errors import UsageError
from core.object_store import Created, ObjectStore


@dataclass(frozen=True)
class FilledBatch:
    """A batch that is stored now.

    Attributes:
      is_new: whether this run computed it, in `seconds`, without loading the model.
      failed: its texts without a vector.
    """

    number: int
    n_texts: int
    failed: tuple[FailedText, ...]
    is_new: bool
    seconds: float = 0.0


def fill(job: MeanJob, numbers: Collection[int] | None = None) -> Iterator[FilledBatch]:
    """Stores the batches of a run that are missing, in order, and gives each one once it is stored.

    numbers: of the batches to look at; None: all. Raises UsageError where a stored batch has other texts, RunError for
    a source that cannot be read.
    """
    texts = chosen_texts(job.options)
    for number in itertools.count():
        batch = list(itertools.islice(texts, job.options.batch_size))
        if not batch:
            return
        if numbers is None or number in numbers:
            yield _filled(job, number, batch)


def _filled(job: MeanJob, number: int, texts: Sequence[SourceText]) -> FilledBatch:
    ids = [text.id for text in texts]
    stored = {mode: _whole_batch(job.store, mode, number, ids) for mode in job.modes}
    missing = [mode for mode, batch in stored.items() if batch is None]
    whole = next((batch for batch in stored.values() if batch is not None), None)
    if whole is not None and not missing:
        return FilledBatch(number, len(texts), whole.failed, is_new=False)
    extractor = job.extractor
    start = time.monotonic()
    found = extractor([text.text for text in texts])
    for place, reason in found.failed.items():
        logging.warning("set aside: %s: %s", texts[place].where, reason)
    batches = [_batch_of(mode, number, ids, found) for mode in missing]
    for batch in batches:
        _store(job.store, batch, ids)
    return FilledBatch(number, len(texts), batches[0].failed, is_new=True, seconds=time.monotonic() - start)


def _whole_batch(store: ObjectStore, mode: str, number: int, wanted: Sequence[TextId]) -> VectorBatch | None:
    """The stored batch with the wanted texts. The last batch of a smaller run, with the first of them, is deleted."""
    batch = read_batch(store, mode, number)
    if batch is None or batch.is_of(wanted):
        return batch
    name = batch_name(mode, number)
    if batch.n_texts < len(wanted) and batch.is_of(wanted[: batch.n_texts]):
        store.delete(name)
        return None
    count = f"{batch.n_texts} texts, and {len(wanted)} are wanted" if batch.n_texts > len(wanted) else "other texts"
    raise UsageError(f"{store.url}/{name}: it holds {count}: use the same data, another --output, or --overwrite")


def _batch_of(mode: str, number: int, ids: Sequence[TextId], found: TextVectors) -> VectorBatch:
    return VectorBatch(
        mode=mode,
        number=number,
        texts=tuple(text for place, text in enumerate(ids) if place not in found.failed),
        vectors=found.vectors[mode],
        failed=tuple(FailedText(ids[place], reason) for place, reason in found.failed.items()),
        truncated=tuple(ids[place].sample_idx for place in found.truncated),
    )


def _store(store: ObjectStore, batch: VectorBatch, ids: Sequence[TextId]) -> None:
    """Another run may have stored it meanwhile: what stands stays, if it has the same texts."""
    name = batch_name(batch.mode, batch.number)
    if store.create_bytes(name, encode_batch(batch)) is Created.ALREADY_DIFFERENT:
        stored = read_batch(store, batch.mode, batch.number)
        if stored is None or not stored.is_of(ids):
            raise UsageError(f"{store.url}/{name}: another run stores other texts there: use another --output")
