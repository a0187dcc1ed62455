"""The texts of a dataset, some hundred or thousand at a time."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from core.base.errors import UsageError
from core.streams.sources import read_source


@dataclass(frozen=True)
class TextChunk:
    """Chunk `number`, from 0. first: the place of its first text in the dataset, which is its sample id.

    digest: sha256 over its texts and the digest of the chunk before, so that it stands for all texts so far.
    """

    number: int
    first: int
    texts: tuple[str, ...]
    digest: str


def text_chunks(dataset: Any, size: int, column: str, max_samples: int | None = None) -> Iterator[TextChunk]:
    """Cuts a dataset into chunks of `size` texts; the last may have fewer.

    dataset: texts; rows with a text under `column`, such as a `datasets.Dataset`, streaming or not; or the path or
    name of what `create_dataset_streams.py` reads. Raises UsageError naming the row without a text.
    """
    texts, digest = islice(_texts(dataset, column), max_samples), ""
    for number in count():
        chunk = tuple(islice(texts, size))
        if not chunk:
            return
        digest = _digest(digest, chunk)
        yield TextChunk(number, number * size, chunk, digest)


def _texts(dataset: Any, column: str) -> Iterator[str]:
    rows: Iterable[Any] = dataset
    if isinstance(dataset, str):
        rows = (row.values for row in read_source(dataset, "train", None, "line"))
    for place, row in enumerate(rows):
        text = row.get(column) if isinstance(row, Mapping) else row
        if not isinstance(text, str):
            raise UsageError(f"dataset, row {place}: no text under {column!r}: name the column with text_column")
        yield text


def _digest(before: str, texts: tuple[str, ...]) -> str:
    digest = hashlib.sha256(before.encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
