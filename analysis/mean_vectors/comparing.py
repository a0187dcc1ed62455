"""Cosines of texts, of stored vectors or of another mean with a mean vector.

Axis letters: S samples, W width of a vector.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from analysis.mean_vectors.extraction import VectorExtractor, load_extractor
from analysis.mean_vectors.modes import POOLS
from analysis.mean_vectors.options import MeanOptions
from analysis.mean_vectors.stored.batches import read_batch, stored_numbers
from analysis.mean_vectors.stored.means import MeanVector, read_mean
from analysis.mean_vectors.stored.metadata import MeanMetadata, read_metadata
from analysis.mean_vectors.texts import SourceText, chosen_texts
from core.backends import choose_backend
from core.base.errors import UsageError
from core.base.redaction import printable
from core.object_store import ObjectStore, open_store

_PREVIEW = 60
_TEXTS_AT_ONCE = 200


@dataclass(frozen=True)
class ComparedVector:
    """What was compared, and its cosine; None with a reason where a text has no vector."""

    sample_idx: int | None
    name: str
    cosine: float | None
    failed: str | None = None


@dataclass(frozen=True)
class MeanComparison:
    """The cosines of some vectors with a mean. `spread` is their standard deviation, 0 for one."""

    mode: str
    compared: tuple[ComparedVector, ...]
    count: int
    failed: int
    mean_cosine: float | None
    spread: float | None
    lowest: float | None
    highest: float | None

    @classmethod
    def of(cls, mode: str, compared: Sequence[ComparedVector]) -> "MeanComparison":
        """With the summary of what was compared."""
        cosines = np.array([one.cosine for one in compared if one.cosine is not None])
        summary: list[float | None] = [None] * 4
        if len(cosines):
            summary = [float(cosines.mean()), float(cosines.std()), float(cosines.min()), float(cosines.max())]
        return cls(mode, tuple(compared), len(cosines), len(compared) - len(cosines), *summary)

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """One line for each vector, then the summary."""
        shown = [printable(f"{one.failed or format(one.cosine, '+.6f')}  {one.name}") for one in self.compared]
        if self.mean_cosine is None:
            return [*shown, f"{self.mode}: nothing was compared, {self.failed} failed"]
        summary = f"cosine {self.mean_cosine:.6f} on average, {self.lowest:.6f} to {self.highest:.6f}"
        return [
            *shown,
            f"{self.mode}: {self.count} compared, {self.failed} failed: {summary}, spread {self.spread:.6f}",
        ]


def cosines(vectors: Float32[np.ndarray, "S W"], mean: Float32[np.ndarray, "W"]) -> Float64[np.ndarray, "S"]:
    """The cosine of each vector with `mean`, in float64; 0 where either is zero."""
    wide, other = vectors.astype(np.float64), mean.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1) * np.linalg.norm(other)
    return (wide @ other) / np.where(lengths > 0, lengths, 1.0)


def stored_mode(store: ObjectStore, mode: str | None) -> tuple[MeanMetadata, str]:
    """The metadata of a folder, and the mode: that of its run, where it has but one. Raises UsageError."""
    metadata = read_metadata(store)
    if metadata is None:
        raise UsageError(f"{store.url}: no metadata.json: it is not an output of `mean`")
    mode = mode or str(metadata.identity["mode"])
    if mode not in POOLS:
        raise UsageError(f"--mode {mode}: must be one of {', '.join(POOLS)}")
    return metadata, mode


def compare_texts(folder: str, options: MeanOptions, mode: str | None) -> MeanComparison:
    """Compares texts, through the model that made the mean. `options` say which texts, and where the model is now.

    An empty `model_path` stands for the stored one. Raises UsageError where the model there is another.
    """
    options.validate()
    store = open_store(folder)
    metadata, mode = stored_mode(store, mode)
    mean = read_mean(store, mode)
    if not options.model_path:
        options = replace(options, model_path=metadata.model_path, revision=metadata.revision)
    extractor = _same_model(metadata, options, mode)
    compared: list[ComparedVector] = []
    texts = chosen_texts(options)
    while batch := [text for text, _ in zip(texts, range(_TEXTS_AT_ONCE), strict=False)]:
        compared += _of_texts(batch, extractor, mean)
    return MeanComparison.of(mode, compared)


def compare_vectors(folder: str, other: str, mode: str | None) -> MeanComparison:
    """Compares the stored vectors of another folder, or of the same one."""
    mean, theirs, mode = _two_folders(folder, other, mode)
    compared: list[ComparedVector] = []
    for number in stored_numbers(theirs, mode):
        batch = read_batch(theirs, mode, number)
        if batch is None:
            continue
        _check_width(mean, batch.vectors.shape[1], theirs)
        found = cosines(batch.vectors, mean.mean)
        places = [text.sample_idx for text in batch.texts]
        compared += [
            ComparedVector(place, f"sample {place}", float(cosine)) for place, cosine in zip(places, found, strict=True)
        ]
    return MeanComparison.of(mode, compared)


def compare_means(folder: str, other: str, mode: str | None) -> MeanComparison:
    """Compares the mean of another folder."""
    mean, theirs, mode = _two_folders(folder, other, mode)
    vector = read_mean(theirs, mode).mean
    _check_width(mean, len(vector), theirs)
    return MeanComparison.of(mode, [ComparedVector(None, theirs.url, float(cosines(vector[None], mean.mean)[0]))])


def _two_folders(folder: str, other: str, mode: str | None) -> tuple[MeanVector, ObjectStore, str]:
    store, theirs = open_store(folder), open_store(other)
    _, mode = stored_mode(store, mode)
    return read_mean(store, mode), theirs, mode


def _check_width(mean: MeanVector, width: int, theirs: ObjectStore) -> None:
    if width != len(mean.mean):
        raise UsageError(f"{theirs.url}: its vectors have {width} values, the mean has {len(mean.mean)}")


def _same_model(metadata: MeanMetadata, options: MeanOptions, mode: str) -> VectorExtractor:
    identity = metadata.identity
    trust = options.trust_remote_code
    backend = choose_backend(identity["backend"], options.model_path, options.revision, trust_remote_code=trust)
    digest = backend.model_digest(options.model_path, options.revision)
    if digest != identity["model"]["digest"]:
        raise UsageError(f"{options.model_path}: not the model of the mean: its digest is {digest[:12]}…")
    return load_extractor(
        options.model_path,
        modes=(mode,),
        layers=identity["layers"],
        max_seq_length=identity["max_seq_length"],
        overlong=identity["overlong"],
        revision=options.revision,
        backend=identity["backend"],
        compute_dtype=identity["compute_dtype"],
        trust_remote_code=trust,
    )


def _of_texts(texts: Sequence[SourceText], extractor: VectorExtractor, mean: MeanVector) -> list[ComparedVector]:
    found = extractor([text.text for text in texts])
    values = iter(cosines(found.vectors[mean.mode], mean.mean).tolist())
    names = [f"{text.where}  {' '.join(text.text[: 2 * _PREVIEW].split())[:_PREVIEW]}" for text in texts]
    return [
        ComparedVector(text.sample_idx, name, None, found.failed[place])
        if place in found.failed
        else ComparedVector(text.sample_idx, name, next(values))
        for place, (text, name) in enumerate(zip(texts, names, strict=True))
    ]
