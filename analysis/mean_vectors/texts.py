"""The texts of a run: read from its sources in order, or a seeded choice of them."""

import hashlib
import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from analysis.mean_vectors.options import MeanOptions
from analysis.mean_vectors.stored.batches import TextId
from analysis.mean_vectors.stored.plain_pickle import MOST_BYTES, load_plain
from core.base.errors import RunError
from core.object_store.stored_files import filesystem, is_file, storage_errors
from core.streams.sources import SourceRow, read_source

_PICKLES = (".pkl", ".pickle")


@dataclass(frozen=True)
class SourceText:
    """A text, its place among the rows of all sources, and `file:line` or the like for messages."""

    sample_idx: int
    text: str
    where: str

    @property
    def id(self) -> TextId:
        """What a batch stores of it."""
        return TextId(self.sample_idx, text_digest(self.text))


def text_digest(text: str) -> str:
    """The sha256 of a text in UTF-8; halves of surrogate pairs, which a pickle may hold, count as they are."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def chosen_texts(options: MeanOptions) -> Iterator[SourceText]:
    """The texts of a run, in the order of its batches.

    Without a seed they are the first `num_samples`. With one, each place in the source has a hash of seed and place,
    and those with the smallest hashes are chosen, smallest first: a larger number of the same source only adds texts.
    The chosen ones are held in memory then. Raises UsageError or RunError for a source that cannot be read.
    """
    texts = all_texts(options)
    if options.seed is None:
        return itertools.islice(texts, options.num_samples)
    if options.num_samples is None:
        return iter(sorted(texts, key=lambda text: _draw(options.seed, text)))
    return iter(heapq.nsmallest(options.num_samples, texts, key=lambda text: _draw(options.seed, text)))


def all_texts(options: MeanOptions) -> Iterator[SourceText]:
    """Every text of the sources, one source after another. Blank lines of a text file are left out, but counted."""
    rows = itertools.chain.from_iterable(_rows(name, options) for name in options.data)
    for place, row in enumerate(rows):
        if not row.is_blank:
            yield SourceText(place, _text_of(row, options.column), row.where)


def expected_count(options: MeanOptions) -> int | None:
    """How many texts there will be at most, for the time that is left; None where only reading a dataset would tell."""
    if options.num_samples is not None:
        return options.num_samples
    return sum(1 for _ in all_texts(options)) if all(map(is_file, options.data)) else None


def _draw(seed: int | None, text: SourceText) -> tuple[bytes, int]:
    return hashlib.sha256(f"{seed}:{text.sample_idx}".encode()).digest(), text.sample_idx


def _rows(name: str, options: MeanOptions) -> Iterator[SourceRow]:
    if name.lower().endswith(_PICKLES):
        return _pickle_rows(name, options.column)
    return read_source(name, options.split, options.config, options.text_unit)


def _text_of(row: SourceRow, column: str) -> str:
    text = row.values.get(column)
    if not isinstance(text, str):
        problem = f"no column {column!r}" if column not in row.values else f"{column!r} is {text!r:.40}, not a text"
        raise RunError(f"{row.where}: {problem}: its columns are {', '.join(map(str, row.values))}: see --column")
    return text


def _pickle_rows(path: str, column: str) -> Iterator[SourceRow]:
    """The texts of a pickled list of texts, or of objects with a column of texts."""
    try:
        value = load_plain(_read_whole(path))
    except ValueError as error:
        raise RunError(f"{path}: not a pickled list of texts: {error}") from error
    if not isinstance(value, list | tuple):
        raise RunError(f"{path}: it holds a {type(value).__name__}: expected a list of texts")
    for index, item in enumerate(value):
        if not isinstance(item, str | dict):
            raise RunError(f"{path}:item {index}: a {type(item).__name__}: expected a text")
        values: dict[str, Any] = {column: item} if isinstance(item, str) else item
        yield SourceRow(f"{path}:item {index}", values)


def _read_whole(path: str) -> bytes:
    fs, location = filesystem(path)
    with storage_errors(f"{path}: cannot read"), fs.open(location, "rb") as stored:
        data = stored.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise RunError(f"{path}: pickles of more than {MOST_BYTES >> 20} MiB are not read: use JSON Lines")
    return data
